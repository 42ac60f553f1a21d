"""llm-compressor's GPTQ in quantize_side_by_side.py: W4A16, a scale per output channel, on the CPU.

    python quantize_llm_compressor.py MODEL WINDOWS THREADS

WINDOWS is a .npy file of token ids [count, length]. The last line printed is JSON: the seconds of
`oneshot` alone, the model being in memory, and the versions.
"""

import json
import sys
import time

import numpy as np


def main() -> None:
    import compressed_tensors
    import llmcompressor
    import torch
    import transformers
    from datasets import Dataset

    folder, windows, threads = sys.argv[1], np.load(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(threads)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    rows = Dataset.from_dict({"input_ids": windows.tolist(),
                              "attention_mask": np.ones_like(windows).tolist()})
    from llmcompressor.modifiers.quantization import GPTQModifier

    recipe = GPTQModifier(ignore=["lm_head"], config_groups={"all": {
        "targets": ["Linear"],
        "weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "channel"}}})
    start = time.perf_counter()
    llmcompressor.oneshot(model=model, dataset=rows, recipe=recipe,
                          max_seq_length=windows.shape[1], num_calibration_samples=len(windows))
    seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "version": f"llm-compressor {llmcompressor.__version__}, "
                      f"compressed-tensors {compressed_tensors.__version__}, torch "
                      f"{torch.__version__}"}))


if __name__ == "__main__":
    main()
