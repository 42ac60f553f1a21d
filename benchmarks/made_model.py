"""A made checkpoint: random weights of any LLaMA widths, or of a mixture of experts, for questions
of speed and memory.

The weights are normal numbers with a few large channels in the norms; they say nothing about
quality, but every engine can read them and their logits can be compared.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from singlequant import bundled_model
from singlequant.tensors import INDEX_FILE, SINGLE_FILE, write_safetensors

LARGE_CHANNELS, LARGE_GAIN = 8, 12  # of each norm's weight
DTYPES = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
SHARD_BYTES = 5 * 10**9  # at most in a file, and in memory


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
    head_dim: int | None = None  # the heads share `hidden`

    @property
    def head_width(self) -> int:
        """Outputs of a head."""
        return self.head_dim or self.hidden // self.heads

    @property
    def q_width(self) -> int:
        """Outputs of q, and inputs of o."""
        return self.head_width * self.heads

    @property
    def kv_width(self) -> int:
        """Outputs of k and of v."""
        return self.head_width * (self.kv_heads or self.heads)

    @property
    def layer_weights(self) -> int:
        """Weights in the linears of one layer."""
        attention = 2 * self.hidden * (self.q_width + self.kv_width)
        return attention + 3 * self.hidden * self.intermediate * max(1, self.experts)

    @property
    def head_weights(self) -> int:
        """Weights of the head, and of the embedding."""
        return self.vocab * self.hidden


LLAMA_2_7B = Widths(hidden=4096, intermediate=11008, heads=32, vocab=32000)
LLAMA_2_13B = Widths(hidden=5120, intermediate=13824, heads=40, vocab=32000)
LLAMA_2_70B = Widths(hidden=8192, intermediate=28672, heads=64, vocab=32000, kv_heads=8)
QWEN_2_5_7B = Widths(hidden=3584, intermediate=18944, heads=28, vocab=152064, kv_heads=4)
QWEN_3_30B_A3B = Widths(hidden=2048, intermediate=768, heads=32, vocab=151936, kv_heads=4,
                        experts=128, head_dim=128)
TOY = Widths(hidden=256, intermediate=512, heads=4, vocab=2048)
NAMED = {"llama-2-7b": LLAMA_2_7B, "llama-2-13b": LLAMA_2_13B, "llama-2-70b": LLAMA_2_70B,
         "qwen2.5-7b": QWEN_2_5_7B, "qwen3-30b-a3b": QWEN_3_30B_A3B, "toy": TOY}


def write_checkpoint(
    folder: Path, layers: int, widths: Widths = LLAMA_2_7B, dtype: str = "float16",
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """A folder of these widths as `save_pretrained` writes it, of LlamaForCausalLM or, with
    experts, Qwen3MoeForCausalLM; appears only when whole.

    dtype: of DTYPES. A model of more than shard_bytes has several files, which are written one by
    one.
    """
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    _write_shards(partial, _tensors(layers, widths, DTYPES[dtype]), shard_bytes)
    (partial / "config.json").write_text(json.dumps(_config(layers, widths, dtype), indent=2))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(bundled_model() / name, partial / name)
    partial.replace(folder)


def _tensors(layers: int, widths: Widths, dtype: np.dtype) -> Iterator[tuple[str, NDArray]]:
    """(name, tensor) of the whole model; one is made when it is asked for."""
    rng = np.random.default_rng(0)
    hidden, intermediate = widths.hidden, widths.intermediate

    def matrix(n: int, k: int) -> NDArray:
        return (rng.standard_normal((n, k), np.float32) * np.float32(k**-0.5)).astype(dtype)

    norm = np.ones(hidden, dtype)
    norm[rng.permutation(hidden)[:LARGE_CHANNELS]] = LARGE_GAIN
    yield "model.embed_tokens.weight", matrix(widths.vocab, hidden)
    yield "model.norm.weight", norm
    yield "lm_head.weight", matrix(widths.vocab, hidden)
    rows = {"q": widths.q_width, "k": widths.kv_width, "v": widths.kv_width, "o": hidden}
    mlps = [f"mlp.experts.{e}." for e in range(widths.experts)] or ["mlp."]
    for prefix in (f"model.layers.{i}." for i in range(layers)):
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"{prefix}{name}.weight", norm
        for name, n in rows.items():
            k = widths.q_width if name == "o" else hidden
            yield f"{prefix}self_attn.{name}_proj.weight", matrix(n, k)
        for mlp in mlps:
            yield f"{prefix}{mlp}gate_proj.weight", matrix(intermediate, hidden)
            yield f"{prefix}{mlp}up_proj.weight", matrix(intermediate, hidden)
            yield f"{prefix}{mlp}down_proj.weight", matrix(hidden, intermediate)
        if widths.experts:
            yield f"{prefix}mlp.gate.weight", matrix(widths.experts, hidden)
            for name in "qk":
                ones = np.ones(widths.head_width, dtype)
                yield f"{prefix}self_attn.{name}_norm.weight", ones


def _write_shards(
    folder: Path, tensors: Iterator[tuple[str, NDArray]], shard_bytes: int
) -> None:
    """One file, or files and their index."""
    shards: list[list[str]] = []
    held: dict[str, NDArray] = {}
    total = 0

    def write() -> None:
        shards.append([*held])
        write_safetensors(folder / f"{len(shards)}.safetensors", held)
        held.clear()

    for name, tensor in tensors:
        if held and sum(t.nbytes for t in held.values()) + tensor.nbytes > shard_bytes:
            write()
        held[name] = tensor
        total += tensor.nbytes
    write()
    if len(shards) == 1:
        (folder / "1.safetensors").replace(folder / SINGLE_FILE)
        return
    files = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    for i, file in enumerate(files, 1):
        (folder / f"{i}.safetensors").replace(folder / file)
    where = {name: file for file, names in zip(files, shards, strict=True) for name in names}
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2, sort_keys=True))


def _config(layers: int, widths: Widths, dtype: str) -> dict[str, object]:
    """What config.json says."""
    config: dict[str, object] = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": widths.hidden,
        "intermediate_size": widths.intermediate, "num_hidden_layers": layers,
        "num_attention_heads": widths.heads, "num_key_value_heads": widths.kv_heads or widths.heads,
        "vocab_size": widths.vocab, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
        "hidden_act": "silu", "rope_theta": 10000.0, "tie_word_embeddings": False,
        "head_dim": widths.head_width, "dtype": dtype,
    }
    if widths.experts:
        config |= {
            "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe",
            "num_experts": widths.experts, "num_experts_per_tok": widths.chosen,
            "moe_intermediate_size": widths.intermediate, "norm_topk_prob": True,
        }
    return config
