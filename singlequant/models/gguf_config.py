# SPDX-License-Identifier: Apache-2.0
"""GGUF's metadata as config.json says the same, and its names of tensors.

llama.cpp's converters change some weights. A row says what they changed, so that it can be undone
or done: q and k are reordered for a rotary embedding of neighbours, 1 is added to norms' weights.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .._C import FormatError
from .rope import FULL, ORIGINAL, SLIDING
from .spec import ModelSpec

ROPE_FACTORS, ROPE_LONG, ROPE_SHORT = (
    "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
ROTARY_TENSORS = (ROPE_FACTORS, ROPE_LONG, ROPE_SHORT)
SCALING = "rope.scaling."
EXPERT = re.compile(r"\.experts\.(\d+)\.")

KEYS = {  # of all architectures; without the architecture in front
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.sliding_window": "sliding_window",
    "rope.freq_base": "rope_theta",
}
# Keys that are read in other ways, or change nothing.
READ = ("vocab_size", "attention.value_length", "attention.sliding_window_pattern",
        "rope.dimension_count", "rope.scale_linear", "tensor_data_layout", "pooling_type")
TOKENS = {"tokenizer.ggml.bos_token_id": "bos_token_id",
          "tokenizer.ggml.eos_token_id": "eos_token_id",
          "tokenizer.ggml.padding_token_id": "pad_token_id"}
EXPERTS = {"expert_used_count": "num_experts_per_tok",
           "expert_feed_forward_length": "moe_intermediate_size"}
GATING_SOFTMAX = 1

Config = dict[str, Any]
Extra = Callable[[Config, Mapping[str, Any], set[str]], Config]


@dataclass(frozen=True)
class Row:
    """An architecture of GGUF. keys: of its own, beside KEYS. extra: what else config.json says,
    of the config so far, the metadata and the names of tensors."""

    architecture: str  # of transformers
    model_type: str  # likewise
    keys: Mapping[str, str] = field(default_factory=dict)
    permuted: bool = False  # rows of q and k are reordered
    offset: float = 0.0  # was added to norms' weights
    extra: Extra | None = None


def _llama(config: Config, meta: Mapping[str, Any], names: set[str]) -> Config:
    """LLaMA, Mistral and Mixtral are one architecture there."""
    biased = {"attention_bias": "blk.0.attn_q.bias" in names,
              "mlp_bias": "blk.0.ffn_up.bias" in names}
    if meta.get("llama.expert_count"):
        return {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral",
                "num_local_experts": meta["llama.expert_count"], "num_experts_per_tok":
                meta.get("llama.expert_used_count"), "sliding_window": None}
    if config.get("sliding_window"):
        return {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
    return biased


def _gemma(layers: int) -> Extra:
    """Queries are scaled by head_dim, but in the largest size, of so many layers, by another."""
    def extra(config: Config, meta: Mapping[str, Any], names: set[str]) -> Config:
        large = config.get("num_hidden_layers") == layers
        scale = config.get("head_dim", 256)
        if large:
            scale = config["hidden_size"] / config["num_attention_heads"]
        return {"query_pre_attn_scalar": scale}
    return extra


def _qwen_moe(normalized: bool) -> Extra:
    """norm_topk_prob is not stored; llama.cpp takes what the published models have."""
    return lambda config, meta, names: {"norm_topk_prob": normalized}


def _cohere(config: Config, meta: Mapping[str, Any], names: set[str]) -> Config:
    return {"use_qk_norm": "blk.0.attn_q_norm.weight" in names}


QWEN_MOE = {**EXPERTS, "expert_count": "num_experts"}
GEMMA2 = {"attn_logit_softcapping": "attn_logit_softcapping",
          "final_logit_softcapping": "final_logit_softcapping"}
ROWS = {
    "llama": Row("LlamaForCausalLM", "llama", {"expert_count": "num_local_experts",
                                      "expert_used_count": "num_experts_per_tok"},
                 permuted=True, extra=_llama),
    "qwen2": Row("Qwen2ForCausalLM", "qwen2"),
    "qwen2moe": Row("Qwen2MoeForCausalLM", "qwen2_moe", {
        **QWEN_MOE, "expert_shared_feed_forward_length": "shared_expert_intermediate_size"},
        extra=_qwen_moe(False)),
    "qwen3": Row("Qwen3ForCausalLM", "qwen3"),
    "qwen3moe": Row("Qwen3MoeForCausalLM", "qwen3_moe", QWEN_MOE, extra=_qwen_moe(True)),
    "gemma": Row("GemmaForCausalLM", "gemma", offset=1.0),
    "gemma2": Row("Gemma2ForCausalLM", "gemma2", GEMMA2, offset=1.0, extra=_gemma(46)),
    "gemma3": Row("Gemma3ForCausalLM", "gemma3_text", {
        **GEMMA2, "rope.freq_base_swa": "rope_local_base_freq"}, offset=1.0, extra=_gemma(62)),
    "phi3": Row("Phi3ForCausalLM", "phi3"),
    "granite": Row("GraniteForCausalLM", "granite", {
        "attention.scale": "attention_multiplier", "embedding_scale": "embedding_multiplier",
        "residual_scale": "residual_multiplier", "logit_scale": "logits_scaling"}, permuted=True),
    "smollm3": Row("SmolLM3ForCausalLM", "smollm3", permuted=True),
    "starcoder2": Row("Starcoder2ForCausalLM", "starcoder2", {
        "attention.layer_norm_epsilon": "norm_epsilon"}),
    "command-r": Row("CohereForCausalLM", "cohere", {
        "attention.layer_norm_epsilon": "layer_norm_eps", "logit_scale": "logit_scale"},
        extra=_cohere),
}  # fmt: skip


def gguf_package() -> Any:
    """The gguf package. ImportError says what to install."""
    try:
        import gguf
    except ImportError:
        raise ImportError("GGUF files need the gguf package (pip install 'singlequant[gguf]')"
                          ) from None
    return gguf


def tensor_names(
    package: Any, architecture: str, spec: ModelSpec
) -> dict[str, tuple[str, int | None]]:
    """By the spec's name of a tensor: GGUF's, and which of the experts that it stacks."""
    number = next(n for n, name in package.MODEL_ARCH_NAMES.items() if name == architecture)
    names = package.get_tensor_name_map(number, spec.layers)
    sources = {}
    for name, _ in spec.tensors():
        stem, _, part = name.rpartition(".")
        expert = EXPERT.search(stem)
        found = names.get_name(EXPERT.sub(".experts.", stem))
        if found is not None:
            sources[name] = f"{found}.{part}", int(expert[1]) if expert else None
    return sources


def reordered_heads(row: Row, source: str, spec: ModelSpec) -> int:
    """How many heads the rows of GGUF's tensor `source` have where they are reordered; else 0."""
    part = re.search(r"\.attn_([qk])\.(weight|bias)$", source) if row.permuted else None
    if part is None:
        return 0
    return spec.attention.heads if part[1] == "q" else spec.attention.kv_heads


def make_config(
    path: Path, name: str, row: Row, meta: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]], view: Callable[[str], NDArray[Any]],
) -> Config:
    """The config.json of a file with that metadata and tensors of those shapes; view gives one.

    FormatError for a key that is on and that nothing reads.
    """
    if meta.get("split.count", 1) not in (0, 1):
        raise FormatError(f"{path}: split.count: expected a whole model, found one of "
                          f"{meta['split.count']} files; join them by llama-gguf-split --merge")
    own = {key.removeprefix(f"{name}."): value for key, value in meta.items()
           if key.startswith(f"{name}.")}
    keys = KEYS | row.keys
    config: Config = {key: _plain(own[there]) for there, key in keys.items() if there in own}
    if config.get("sliding_window") == 0:
        config["sliding_window"] = None
    config["architectures"] = [row.architecture]
    config["model_type"] = row.model_type
    config["tie_word_embeddings"] = "output.weight" not in shapes
    if "token_embd.weight" in shapes:
        config["vocab_size"] = shapes["token_embd.weight"][0]
    config["pad_token_id"] = None  # transformers' classes have ids of their own beyond small tables
    config |= {key: meta[there] for there, key in TOKENS.items() if there in meta}
    config |= _heads(path, own, config, row)
    config |= _layer_types(own, config)
    config |= _scaling(path, own, config, shapes.keys(), view)
    if row.extra is not None:
        config |= row.extra(config, meta, set(shapes))
    for key, value in own.items():
        known = key in keys or key in READ or key.startswith(SCALING)
        if key == "expert_gating_func":
            known = value == GATING_SOFTMAX
        if not known and value:
            raise FormatError(f"{path}: {name}.{key}: expected no such key, as nothing reads it, "
                              f"found {value!r:.80}")
    return config


def _plain(value: Any) -> Any:
    """A float32 as the shortest decimal that it is: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _heads(path: Path, own: Mapping[str, Any], config: Config, row: Row) -> Config:
    """The size of a head, and the share of it that turns."""
    size, turning = config.get("head_dim"), own.get("rope.dimension_count")
    if own.get("attention.value_length", size) != size:
        raise FormatError(f"{path}: attention.value_length: expected attention.key_length = {size},"
                          f" found {own['attention.value_length']}")
    hidden, heads = config.get("hidden_size"), config.get("num_attention_heads")
    if size is None and type(hidden) is int and type(heads) is int and heads > 0:
        size = hidden // heads
    if not turning or turning == size:
        return {}
    if row.permuted and "head_dim" not in config:  # the files of old have no key_length
        return {"head_dim": turning}
    return {"partial_rotary_factor": turning / size} if size else {}


def _layer_types(own: Mapping[str, Any], config: Config) -> Config:
    """sliding_window_pattern is a flag per layer, or n: every n-th layer sees all."""
    pattern, layers = own.get("attention.sliding_window_pattern"), config.get("num_hidden_layers")
    if type(pattern) is int and pattern > 0 and type(layers) is int and layers < 2**16:
        pattern = [(i + 1) % pattern != 0 for i in range(layers)]
    if not isinstance(pattern, list):
        return {}
    return {"layer_types": [SLIDING if slides else FULL
                            for slides in pattern]}


def _scaling(
    path: Path, own: Mapping[str, Any], config: Config, names: Any,
    view: Callable[[str], NDArray[Any]],
) -> Config:
    """rope_scaling, of metadata or of tensors with a factor per frequency."""
    kind = own.get(f"{SCALING}type", "linear" if own.get("rope.scale_linear") else "none")
    length = config.get("max_position_embeddings")
    original = own.get(f"{SCALING}original_context_length", length)
    attention = own.get(f"{SCALING}attn_factor", own.get(f"{SCALING}yarn_attn_factor"))
    found: Config = {}
    if ROPE_LONG in names and ROPE_SHORT in names:
        found = {"rope_type": "longrope", ORIGINAL: original,
                 "long_factor": view(ROPE_LONG).tolist(), "short_factor": view(ROPE_SHORT).tolist()}
    elif ROPE_FACTORS in names:  # llama3's frequencies, which longrope's factors express as well
        factors, attention = view(ROPE_FACTORS).tolist(), 1.0
        found = {"rope_type": "longrope", ORIGINAL: length,
                 "long_factor": factors, "short_factor": factors}
    elif kind in ("linear", "yarn"):
        factor = own.get(f"{SCALING}factor", own.get("rope.scale_linear"))
        found = {"rope_type": kind, "factor": _plain(factor)}
        if kind == "yarn":
            found |= {ORIGINAL: original}
            found |= {there: _plain(own[f"{SCALING}yarn_{there}"])
                      for there in ("beta_fast", "beta_slow") if f"{SCALING}yarn_{there}" in own}
    elif kind != "none":
        raise FormatError(f"{path}: {SCALING}type: expected none, linear, yarn or the factors of "
                          f"longrope, found {kind!r:.80}")
    if found and attention and found["rope_type"] != "linear":
        found["attention_factor"] = _plain(attention)
    # Phi-3's class in transformers has a length of its own where config.json has none.
    beside = {ORIGINAL: found[ORIGINAL]} if "long_factor" in found else {}
    return {"rope_scaling": found} | beside if found else {}
