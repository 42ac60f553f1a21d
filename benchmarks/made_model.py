"""A made checkpoint: random weights of any LLaMA widths, or of a mixture of experts, for questions
of speed and memory.

The weights are normal numbers with a few large channels in the norms; they say nothing about
quality, but every engine can read them and their logits can be compared.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from singlequant import bundled_model

LARGE_CHANNELS, LARGE_GAIN = 8, 12  # of each norm's weight


@dataclass(frozen=True)
class Widths:
    """Sizes of a LLaMA."""

    hidden: int
    intermediate: int
    heads: int
    vocab: int  # at least the bundled tokenizer's 2048
    kv_heads: int | None = None  # as many as heads
    experts: int = 0  # of a layer, each `intermediate` wide; 0: one MLP
    chosen: int = 8  # experts of a token

    @property
    def kv_width(self) -> int:
        """Outputs of k and of v."""
        return self.hidden // self.heads * (self.kv_heads or self.heads)

    @property
    def layer_weights(self) -> int:
        """Weights in the linears of one layer."""
        attention = 2 * self.hidden**2 + 2 * self.hidden * self.kv_width
        return attention + 3 * self.hidden * self.intermediate * max(1, self.experts)

    @property
    def head_weights(self) -> int:
        """Weights of the head, and of the embedding."""
        return self.vocab * self.hidden


LLAMA_2_7B = Widths(hidden=4096, intermediate=11008, heads=32, vocab=32000)
QWEN_2_5_7B = Widths(hidden=3584, intermediate=18944, heads=28, vocab=152064, kv_heads=4)
TOY = Widths(hidden=256, intermediate=512, heads=4, vocab=2048)


def write_checkpoint(folder: Path, layers: int, widths: Widths = LLAMA_2_7B) -> None:
    """A folder of these widths in float16, of LlamaForCausalLM or, with experts,
    Qwen3MoeForCausalLM; appears only when whole."""
    rng = np.random.default_rng(0)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    hidden, intermediate = widths.hidden, widths.intermediate

    def matrix(n: int, k: int) -> np.ndarray:
        return (rng.standard_normal((n, k), np.float32) * k**-0.5).astype(np.float16)

    norm = np.ones(hidden, np.float16)
    norm[rng.permutation(hidden)[:LARGE_CHANNELS]] = LARGE_GAIN
    tensors = {"model.embed_tokens.weight": matrix(widths.vocab, hidden),
               "model.norm.weight": norm, "lm_head.weight": matrix(widths.vocab, hidden)}
    for i in range(layers):
        prefix = f"model.layers.{i}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}{name}.weight"] = norm
        for name in "qkvo":
            rows = widths.kv_width if name in "kv" else hidden
            tensors[f"{prefix}self_attn.{name}_proj.weight"] = matrix(rows, hidden)
        mlps = [f"mlp.experts.{e}." for e in range(widths.experts)] or ["mlp."]
        for mlp in mlps:
            tensors[f"{prefix}{mlp}gate_proj.weight"] = matrix(intermediate, hidden)
            tensors[f"{prefix}{mlp}up_proj.weight"] = matrix(intermediate, hidden)
            tensors[f"{prefix}{mlp}down_proj.weight"] = matrix(hidden, intermediate)
        if widths.experts:
            tensors[f"{prefix}mlp.gate.weight"] = matrix(widths.experts, hidden)
            for name in "qk":
                ones = np.ones(hidden // widths.heads, np.float16)
                tensors[f"{prefix}self_attn.{name}_norm.weight"] = ones
    save_file(tensors, partial / "model.safetensors", {"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden,
        "intermediate_size": intermediate, "num_hidden_layers": layers,
        "num_attention_heads": widths.heads, "num_key_value_heads": widths.kv_heads or widths.heads,
        "vocab_size": widths.vocab, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
        "hidden_act": "silu", "rope_theta": 10000.0, "tie_word_embeddings": False,
        "dtype": "float16",
    }
    if widths.experts:
        config |= {
            "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe",
            "num_experts": widths.experts, "num_experts_per_tok": widths.chosen,
            "moe_intermediate_size": intermediate, "norm_topk_prob": True,
            "head_dim": hidden // widths.heads,
        }
    (partial / "config.json").write_text(json.dumps(config, indent=2))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(bundled_model() / name, partial / name)
    partial.replace(folder)
