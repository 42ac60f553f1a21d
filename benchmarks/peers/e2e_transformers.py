"""transformers in end_to_end.py: the folder as it is, KIND float32 or bfloat16, on the CPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from .e2e_worker import serve


class Transformers:
    """SDPA attention over a StaticCache, which does not copy its keys and values at each step."""

    def __init__(self, folder: Path, kind: str, threads: int) -> None:
        import torch
        import transformers

        self.torch, self.transformers = torch, transformers
        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, kind), attn_implementation="sdpa"
        ).eval()
        self.vocab = self.model.config.vocab_size
        self.version = f"{transformers.__version__}, torch {torch.__version__}"
        self.note = f"capability {torch.backends.cpu.get_cpu_capability()}"
        self.cache = None

    def run(self, tokens: np.ndarray, keep: int) -> np.ndarray:
        """Logits [count, keep, vocab]; keep 0 is all of them."""
        ids = self.torch.from_numpy(np.ascontiguousarray(tokens))
        options = {}
        if self.cache is not None:
            positions = self.torch.arange(self.length, self.length + ids.shape[1])
            options = {"past_key_values": self.cache, "use_cache": True,
                       "position_ids": positions[None].expand(len(ids), -1)}
            self.length += ids.shape[1]
        out = self.model(ids, logits_to_keep=keep, **options)
        return out.logits.float().numpy()

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        self.cache = None
        return self.run(tokens, 0)

    def open(self, count: int, capacity: int) -> None:
        self.cache = None  # the old one goes before the new one comes
        config = self.model.config
        self.cache = self.transformers.StaticCache(config=config, max_cache_len=capacity)
        self.cache.early_initialization(count, config.num_key_value_heads, config.head_dim,
                                        self.model.dtype, self.model.device)
        self.length = 0

    def prefill(self, tokens: np.ndarray) -> np.ndarray:
        return self.run(tokens, 1)[:, 0]

    def decode(self, tokens: np.ndarray) -> np.ndarray:
        return self.run(tokens[:, None], 1)[:, 0]

    def rewind(self, length: int) -> None:
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(length)
        self.length = length

    def fill(self, tokens: np.ndarray) -> None:
        for layer in self.cache.layers:
            layer.keys.normal_()
            layer.values.normal_()
        self.rewind(tokens.shape[1])


if __name__ == "__main__":
    serve(Transformers)
