"""Seconds and peak memory of the sweep over layers of LLaMA-2-7B's shapes (a made checkpoint).

    python benchmarks/bench_quantize.py [--layers 1] [--scheme w4a4] [--weights gptq] [--json FILE]

The weights are random with a few large channels in the norms; they say nothing about quality.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path

import common
import numpy as np
from safetensors.numpy import save_file

from singlequant import QuantConfig, bundled_model, quantize_folder

HIDDEN, INTERMEDIATE, HEADS, VOCAB = 4096, 11008, 32, 32000


def write_checkpoint(folder: Path, layers: int) -> None:
    """A LlamaForCausalLM folder of LLaMA-2-7B's widths in float16."""
    rng = np.random.default_rng(0)
    folder.mkdir()

    def matrix(n: int, k: int) -> np.ndarray:
        return (rng.standard_normal((n, k), np.float32) * k**-0.5).astype(np.float16)

    norm = np.ones(HIDDEN, np.float16)
    norm[rng.permutation(HIDDEN)[:8]] = 12
    tensors = {"model.embed_tokens.weight": matrix(VOCAB, HIDDEN), "model.norm.weight": norm,
               "lm_head.weight": matrix(VOCAB, HIDDEN)}
    for i in range(layers):
        prefix = f"model.layers.{i}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}{name}.weight"] = norm
        for name in "qkvo":
            tensors[f"{prefix}self_attn.{name}_proj.weight"] = matrix(HIDDEN, HIDDEN)
        tensors[f"{prefix}mlp.gate_proj.weight"] = matrix(INTERMEDIATE, HIDDEN)
        tensors[f"{prefix}mlp.up_proj.weight"] = matrix(INTERMEDIATE, HIDDEN)
        tensors[f"{prefix}mlp.down_proj.weight"] = matrix(HIDDEN, INTERMEDIATE)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE, "num_hidden_layers": layers,
        "num_attention_heads": HEADS, "num_key_value_heads": HEADS, "vocab_size": VOCAB,
        "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "hidden_act": "silu",
        "rope_theta": 10000.0, "tie_word_embeddings": False, "dtype": "float16",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(bundled_model() / name, folder / name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--scheme", default="w4a4")
    parser.add_argument("--weights", default=QuantConfig().weights)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    environment = common.environment()
    common.print_environment(environment)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "made"
        write_checkpoint(source, arguments.layers)
        cpu = time.process_time()
        summary = quantize_folder(source, Path(folder) / "out",
                                  QuantConfig(scheme=arguments.scheme, weights=arguments.weights))
    cpu = time.process_time() - cpu
    weights = 4 * HIDDEN**2 + 3 * HIDDEN * INTERMEDIATE
    states = summary.calibration_tokens * HIDDEN * 4
    bound = 1.5 * weights * 4 + states
    result = {
        "layers": arguments.layers,
        "seconds per layer": summary.seconds / arguments.layers,
        "CPU seconds per layer": cpu / arguments.layers,
        "calibrate": summary.calibration_seconds,
        "solve": summary.solve_seconds,
        "quantize and pack": summary.quantize_seconds,
        "peak anonymous memory, MB": summary.peak_memory / 1e6,
        "1.5 x layer in float32 + calibration states, MB": bound / 1e6,
    }
    for key, value in result.items():
        print(f"{key:<50} {value if not isinstance(value, float) else round(value, 2)}")
    if arguments.json:
        common.write_json(arguments.json, [result], environment)


if __name__ == "__main__":
    main()
