# SPDX-License-Identifier: Apache-2.0
"""Families of transformers as small random models: several configurations of each.

`FAMILIES` is the table. `make_family` writes a folder by save_pretrained; it needs torch and
transformers. The options of a variant are arguments of the family's config class.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

VOCAB = 260  # what the byte-level tokenizer needs, and two
SIZES = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip
NO_GROUPS = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}
GPT2_SIZES = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
EPSILON = 3e-3  # of the norms; large, so that a wrong one shows
EPSILON_KEYS = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps", "norm_epsilon")
TOKENS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}


@dataclass(frozen=True)
class Variant:
    """One configuration. golden: its folder and logits lie in tests/data/families. refused: the key
    of config.json that is named when it is not loaded."""

    options: Mapping[str, Any]
    golden: bool = False
    refused: str = ""
    text: int = 56  # tokens of a sequence
    shorter: tuple[int, ...] = (9, 33)  # lengths of the other sequences of a batch

    @property
    def positions(self) -> list[int]:
        """The tokens whose logits a golden folder holds: the first and each sequence's last."""
        return [0, *(length - 1 for length in self.shorter), self.text - 1]


def plain(**options: Any) -> Variant:
    return Variant(options)


def kept(**options: Any) -> Variant:
    return Variant(options, golden=True)


def refused(key: str, **options: Any) -> Variant:
    return Variant({key: True, **options}, refused=key)


def beyond(golden: bool = False, **options: Any) -> Variant:
    """The whole batch lies beyond the original length: transformers scales a batch as one."""
    return Variant(options, golden, shorter=(41, 48))


@dataclass(frozen=True)
class ModelFamily:
    """Config{sizes, variant} makes the model. zero_norms: norms add 1 to their weights."""

    config: str  # transformers' class
    model: str
    variants: Mapping[str, Variant]
    sizes: Mapping[str, Any] = field(default_factory=lambda: SIZES)
    zero_norms: bool = False
    experts: bool = False  # whether save_pretrained can write experts in two layouts
    attention: str = "eager"  # transformers' implementation


def family(stem: str, variants: Mapping[str, Variant], **rest: Any) -> ModelFamily:
    """The family whose classes begin with stem."""
    return ModelFamily(f"{stem}Config", f"{stem}ForCausalLM", variants, **rest)


def rope(kind: str, theta: float = 10000.0, **values: Any) -> dict[str, Any]:
    return {"rope_type": kind, "rope_theta": theta, **values}


ORIGINAL = {"original_max_position_embeddings": 32}
LLAMA3 = rope("llama3", 500000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, **ORIGINAL)
YARN = rope("yarn", factor=4.0, **ORIGINAL)
LONGROPE = {"short_factor": [1.0, 1.1, 1.3], "long_factor": [1.0, 2.5, 4.0], **ORIGINAL}
GROWING = rope("yarn", factor=4.0, llama_4_scaling_beta=0.1, mscale=1.0, mscale_all_dim=1.0)
DYNAMIC = {"rope_parameters": rope("dynamic", factor=2.0), "max_position_embeddings": 32}
PARTIAL = {"rope_parameters": rope("default", partial_rotary_factor=0.5)}
ODD = {"hidden_size": 60, "intermediate_size": 89, "head_dim": 20, "num_attention_heads": 3,
       "num_key_value_heads": 1}
NINETY = {"hidden_size": 90, "intermediate_size": 101, "num_attention_heads": 9,
          "num_key_value_heads": 3}
ALTERNATING = ["sliding_attention", "full_attention"]
UNTIED, TIED = {"tie_word_embeddings": False}, {"tie_word_embeddings": True}
MIXTURE = {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 12}
QWEN_MIXTURE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12,
                "num_hidden_layers": 2}
GEMMA = {**SIZES, "head_dim": 12}
GEMMA2 = {**GEMMA, "query_pre_attn_scalar": 24, "sliding_window": 16}
LATENT = {
    **SIZES, "num_key_value_heads": 4, "q_lora_rank": 12, "kv_lora_rank": 10,
    "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8, "n_routed_experts": 6,
    "n_shared_experts": 1, "moe_intermediate_size": 9, "num_experts_per_tok": 2,
    "first_k_dense_replace": 1, "intermediate_size": 19,
}  # fmt: skip
DEEPSEEK_YARN = rope("yarn", factor=4.0, mscale=0.7, mscale_all_dim=0.9, beta_fast=32,
                     beta_slow=1, **ORIGINAL)

DENSE = {
    "llama": family("Llama", {
        "tied": kept(**TIED),
        "llama3": beyond(True, rope_parameters=LLAMA3, **TIED),
        "mha-biases": plain(num_key_value_heads=4, attention_bias=True, mlp_bias=True),
        "linear": plain(rope_parameters=rope("linear", factor=4.0)),
        "dynamic": Variant(DYNAMIC, shorter=(56, 56)),
        "yarn": beyond(rope_parameters=YARN),
        "proportional": plain(rope_parameters=rope("proportional", partial_rotary_factor=0.5)),
        "odd": plain(**ODD, num_hidden_layers=3),
        "ninety": plain(**NINETY),
    }),
    "mistral": family("Mistral", {
        "window": kept(sliding_window=16, **TIED),
        "full": plain(sliding_window=None),
        "odd": plain(sliding_window=7, **ODD),
    }),
    "ministral": family("Ministral", {
        "kinds": kept(sliding_window=16, layer_types=ALTERNATING, head_dim=8, **TIED),
        "window": plain(sliding_window=16, head_dim=16),
        "odd": plain(sliding_window=7, num_hidden_layers=3, **ODD,
                     layer_types=[*ALTERNATING, "full_attention"]),
    }),
    "ministral3": family("Ministral3", {
        "beyond": beyond(True, rope_parameters=GROWING | ORIGINAL, head_dim=8, **TIED),
        "within": plain(rope_parameters=GROWING | {"original_max_position_embeddings": 64},
                        head_dim=8),
        "odd": plain(rope_parameters=rope("default", llama_4_scaling_beta=0.0,
                                          original_max_position_embeddings=64), **ODD),
    }),
    "qwen2": family("Qwen2", {
        "tied": kept(**TIED),
        "window": plain(use_sliding_window=True, sliding_window=16, max_window_layers=1,
                        num_hidden_layers=3),
        "yarn": beyond(rope_parameters=YARN),
        "ninety": plain(**NINETY),
    }),
    "qwen3": family("Qwen3", {
        "tied": kept(head_dim=12, intermediate_size=29, **TIED),
        "window-biases": plain(head_dim=8, use_sliding_window=True, sliding_window=16,
                               max_window_layers=1, attention_bias=True),
        "odd-yarn": beyond(**ODD, rope_parameters=YARN),
    }),
    "gemma": family("Gemma", {
        "tied": kept(intermediate_size=29),
        "mqa": plain(num_key_value_heads=1, head_dim=20, hidden_act="gelu_pytorch_tanh"),
        "biases": plain(attention_bias=True, **ODD),
    }, sizes=GEMMA, zero_norms=True),
    "gemma2": family("Gemma2", {
        "tied": kept(intermediate_size=29, final_logit_softcapping=2.0,
                     attn_logit_softcapping=1.5),
        "no-caps": plain(final_logit_softcapping=None, attn_logit_softcapping=None),
        "odd": plain(**ODD, num_hidden_layers=3, sliding_window=7, final_logit_softcapping=3.0),
    }, sizes=GEMMA2, zero_norms=True),
    "gemma3": ModelFamily("Gemma3TextConfig", "Gemma3ForCausalLM", {
        "tied": kept(intermediate_size=29, layer_types=ALTERNATING, rope_parameters={
            "sliding_attention": rope("default"),
            "full_attention": rope("linear", 1000000.0, factor=8.0)}),
        "six": plain(num_hidden_layers=7),
        "caps-odd": plain(**ODD, final_logit_softcapping=3.0, attn_logit_softcapping=2.0,
                          rope_parameters={"sliding_attention": rope("default", 300.0),
                                           "full_attention": rope("default", 1000000.0)}),
    }, sizes=GEMMA2, zero_norms=True),
    "phi": family("Phi", {
        "phi-2": kept(num_key_value_heads=4, rope_parameters=rope(
            "default", partial_rotary_factor=0.5), num_hidden_layers=1),
        "norms": plain(qk_layernorm=True, **PARTIAL),
        "odd": plain(hidden_size=60, num_attention_heads=3, num_key_value_heads=1,
                     intermediate_size=89, rope_parameters=rope(
                         "default", partial_rotary_factor=0.4)),
    }),
    "phi3": family("Phi3", {
        "longrope": beyond(True, rope_parameters=rope(
            "longrope", partial_rotary_factor=0.75, **LONGROPE), **ORIGINAL, **TIED),
        "window": plain(sliding_window=16),
        "short": Variant({"rope_parameters": rope("longrope", partial_rotary_factor=0.75,
                                                  **LONGROPE), **ORIGINAL}, text=30,
                         shorter=(9, 21)),
        "odd": plain(hidden_size=60, num_attention_heads=3, num_key_value_heads=1,
                     intermediate_size=89),
    }),
    "opt": family("OPT", {
        "before": kept(word_embed_proj_dim=32, ffn_dim=31, max_position_embeddings=64),
        "350m": kept(do_layer_norm_before=False, word_embed_proj_dim=20,
                     max_position_embeddings=64),
        "no-biases": plain(enable_bias=False, activation_function="gelu", word_embed_proj_dim=32),
        "untied-odd": plain(hidden_size=60, num_attention_heads=3, ffn_dim=89,
                            word_embed_proj_dim=60, **UNTIED),
    }, sizes={"vocab_size": VOCAB, "hidden_size": 32, "ffn_dim": 44, "num_hidden_layers": 2,
              "num_attention_heads": 4, "max_position_embeddings": 128}),
    "falcon": family("Falcon", {
        "7b": kept(),
        "40b": kept(new_decoder_architecture=True, num_kv_heads=2),
        "rw": kept(alibi=True, multi_query=False, parallel_attn=False, bias=True, **UNTIED,
                   num_hidden_layers=1),
        "rw-long": Variant({"alibi": True, "multi_query": False, "parallel_attn": False,
                            "max_position_embeddings": 512}, text=300, shorter=(9, 270)),
        "11b": plain(new_decoder_architecture=True, num_kv_heads=2, num_ln_in_parallel_attn=1),
        "rotary-not-parallel": plain(multi_query=False, parallel_attn=False, hidden_size=48,
                                     num_attention_heads=6, ffn_hidden_size=89),
        "odd-alibi": plain(alibi=True, multi_query=False, parallel_attn=False, bias=True,
                           hidden_size=60, num_attention_heads=3),
    }, sizes={"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads":
              4, "ffn_hidden_size": 44, "max_position_embeddings": 128},
        attention="sdpa"),  # eager adds ALiBi twice
    "gpt-neox": family("GPTNeoX", {
        "parallel": kept(**TIED, **PARTIAL),
        "sequential": plain(use_parallel_residual=False, rope_parameters=rope(
            "default", partial_rotary_factor=0.25)),
        "no-biases": plain(attention_bias=False, hidden_act="gelu_new", **PARTIAL),
        "odd": plain(hidden_size=60, num_attention_heads=3, intermediate_size=89,
                     rope_parameters=rope("default", partial_rotary_factor=0.4)),
    }, sizes=NO_GROUPS),
    "gpt2": ModelFamily("GPT2Config", "GPT2LMHeadModel", {
        "tied": kept(n_inner=29, n_positions=64),
        "untied": plain(n_layer=3, **UNTIED),
        "layer-scales": refused("scale_attn_by_inverse_layer_idx"),
        "no-scale-odd": plain(scale_attn_weights=False, n_embd=60, n_head=3, n_inner=89,
                              activation_function="relu"),
    }, sizes=GPT2_SIZES),
    "gptj": family("GPTJ", {
        "partial": kept(rotary_dim=4, n_inner=44, **TIED),
        "whole": plain(rotary_dim=8),
        "odd": plain(rotary_dim=8, n_embd=60, n_head=3, n_inner=89),
    }, sizes=GPT2_SIZES),
    "bloom": family("Bloom", {
        "power-of-two": kept(hidden_size=32, n_head=4, n_layer=1),
        "six-heads": plain(hidden_size=48, n_head=6),
        "untied-odd": plain(hidden_size=60, n_head=3, **UNTIED),
        "residual-behind": refused("apply_residual_connection_post_layernorm", n_head=4),
    }, sizes={"vocab_size": VOCAB, "n_layer": 2}),
    "mpt": family("Mpt", {
        "alibi": kept(n_layers=1),
        "clip": plain(attn_config={"clip_qkv": 0.7, "softmax_scale": 0.3}),
        "six-heads": plain(d_model=60, n_heads=6, **UNTIED),
    }, sizes={"vocab_size": VOCAB, "d_model": 32, "n_heads": 4, "n_layers": 2,
              "max_seq_len": 128}),
    "stablelm": family("StableLm", {
        "partial": kept(**PARTIAL, **TIED),
        "parallel-norms": kept(use_parallel_residual=True, qk_layernorm=True, **PARTIAL, **TIED),
        "biases": plain(use_qkv_bias=True, **PARTIAL),
        "odd": plain(hidden_size=60, num_attention_heads=3, num_key_value_heads=1,
                     intermediate_size=89, qk_layernorm=True, rope_parameters=rope(
                         "default", partial_rotary_factor=0.4)),
    }),
    "olmo": family("Olmo", {
        "clip": kept(clip_qkv=0.7, **TIED),
        "biases": plain(attention_bias=True, num_key_value_heads=4),
        "ninety": plain(**NINETY),
    }),
    "olmo2": family("Olmo2", {
        "tied": kept(**TIED),
        "biases": plain(attention_bias=True, num_key_value_heads=4),
        "ninety": plain(**NINETY, rope_parameters=LLAMA3),
    }),
    "olmo3": family("Olmo3", {
        "kinds": kept(layer_types=ALTERNATING, sliding_window=16, **TIED),
        "yarn": beyond(sliding_window=16, num_hidden_layers=4, rope_parameters={
            "sliding_attention": rope("default", 500000.0),
            "full_attention": {**YARN, "rope_theta": 500000.0}}),
        "ninety": plain(**NINETY, sliding_window=7),
        "bases": plain(layer_types=ALTERNATING, sliding_window=16, rope_parameters={
            "sliding_attention": rope("default", 300.0), "full_attention": rope("default")}),
    }),
    "granite": family("Granite", {
        "factors": kept(embedding_multiplier=6.0, logits_scaling=0.5, residual_multiplier=0.4,
                        attention_multiplier=0.2, **TIED),
        "biases": plain(attention_bias=True, mlp_bias=True, attention_multiplier=0.3),
        "ninety": plain(**NINETY, logits_scaling=2.0, residual_multiplier=0.7),
    }),
    "smollm3": family("SmolLM3", {
        "no-rope": kept(no_rope_layers=[1, 0]),
        "never": plain(no_rope_layer_interval=1),
        "interval": plain(num_hidden_layers=5, no_rope_layer_interval=4, attention_bias=True,
                          **UNTIED),
        "window": plain(use_sliding_window=True, sliding_window=16, num_hidden_layers=4,
                        no_rope_layers=[1, 0, 1, 1]),
    }),
    "starcoder2": family("Starcoder2", {
        "window": kept(sliding_window=16),
        "no-biases": plain(use_bias=False, sliding_window=None, **UNTIED),
        "ninety": plain(**NINETY, sliding_window=7),
    }),
    "cohere": family("Cohere", {
        "command-r": kept(logit_scale=0.6),
        "qk-norm": kept(use_qk_norm=True, logit_scale=0.5),
        "biases-ninety": plain(**NINETY, attention_bias=True, logit_scale=1.5),
    }),
    "cohere2": family("Cohere2", {
        "kinds": kept(layer_types=ALTERNATING, sliding_window=16, head_dim=8, logit_scale=0.5),
        "pattern": plain(num_hidden_layers=5, sliding_window=7, head_dim=8, logit_scale=0.7),
        "full": plain(layer_types=[ALTERNATING[1]] * 2, head_dim=8, logit_scale=0.7),
        "odd-biases": plain(**ODD, sliding_window=16, attention_bias=True, num_hidden_layers=4,
                            logit_scale=0.4),
    }),
    "glm": family("Glm", {
        "biases": kept(head_dim=8, **PARTIAL, **TIED),
        "no-biases": plain(head_dim=16, attention_bias=False, **PARTIAL),
        "odd": plain(**ODD, **PARTIAL),
    }),
    "glm4": family("Glm4", {
        "biases": kept(head_dim=8, **PARTIAL, **TIED),
        "no-biases": plain(head_dim=16, attention_bias=False, **PARTIAL),
        "odd": plain(**ODD, **PARTIAL),
    }),
    "nemotron": family("Nemotron", {
        "tied": kept(**PARTIAL, **TIED),
        "biases": plain(attention_bias=True, mlp_bias=True, head_dim=8, **PARTIAL),
        "odd": plain(**{**ODD, "head_dim": 20}, rope_parameters=rope(
            "default", partial_rotary_factor=0.4)),
    }, zero_norms=True),
}  # fmt: skip

EXPERTS = {
    "mixtral": family("Mixtral", {
        "tied": kept(**TIED),
        "window": plain(sliding_window=16, num_local_experts=8),
        "odd": plain(**{**ODD, "intermediate_size": 23}, num_experts_per_tok=3),
    }, sizes={**SIZES, **MIXTURE}, experts=True),
    "qwen2-moe": family("Qwen2Moe", {
        "shared": kept(moe_intermediate_size=7, shared_expert_intermediate_size=9, **TIED),
        "dense-layers": plain(num_hidden_layers=3, mlp_only_layers=[1], norm_topk_prob=True),
        "all-dense": plain(mlp_only_layers=[0, 1]),
        "step": plain(num_hidden_layers=4, decoder_sparse_step=2, qkv_bias=False),
        "ninety": plain(**NINETY, use_sliding_window=True, sliding_window=16),
    }, sizes={**SIZES, **QWEN_MIXTURE, "shared_expert_intermediate_size": 16}, experts=True),
    "qwen3-moe": family("Qwen3Moe", {
        "tied": kept(norm_topk_prob=True, head_dim=8, **TIED),
        "dense-layers": plain(num_hidden_layers=3, mlp_only_layers=[1], head_dim=8),
        "odd-biases": plain(**ODD, attention_bias=True, num_experts_per_tok=3,
                            norm_topk_prob=True),
    }, sizes={**SIZES, **QWEN_MIXTURE}, experts=True),
    "olmoe": family("Olmoe", {
        "tied": kept(**TIED),
        "clip": plain(clip_qkv=0.7, norm_topk_prob=True),
        "ninety": plain(**{**NINETY, "intermediate_size": 23}, attention_bias=True),
    }, sizes={**SIZES, "num_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 12},
        experts=True),
    "granitemoe": family("GraniteMoe", {
        "factors": kept(embedding_multiplier=6.0, logits_scaling=0.5, residual_multiplier=0.4,
                        attention_multiplier=0.2, **TIED),
        "biases": plain(attention_bias=True, attention_multiplier=0.3),
        "ninety": plain(**{**NINETY, "intermediate_size": 23}, num_experts_per_tok=3),
    }, sizes={**SIZES, **MIXTURE}, experts=True),
    "granitemoeshared": family("GraniteMoeShared", {
        "shared": kept(shared_intermediate_size=12, attention_multiplier=0.3, intermediate_size=9,
                       **TIED),
        "not-shared": plain(shared_intermediate_size=0, attention_multiplier=0.3),
        "ninety": plain(**{**NINETY, "intermediate_size": 23}, shared_intermediate_size=31,
                        residual_multiplier=0.7),
    }, sizes={**SIZES, **MIXTURE}, experts=True),
    "deepseek-v2": family("DeepseekV2", {
        "latent": kept(**TIED),
        "lite": plain(q_lora_rank=None, rope_parameters=DEEPSEEK_YARN, num_hidden_layers=3),
        "groups": plain(topk_method="group_limited_greedy", n_group=3, topk_group=2,
                        routed_scaling_factor=1.7, n_shared_experts=2, v_head_dim=6,
                        hidden_size=60, num_attention_heads=3, num_key_value_heads=3),
        "biases": plain(attention_bias=True, mlp_bias=False, v_head_dim=12),
    }, sizes=LATENT, experts=True),
    "deepseek-v3": family("DeepseekV3", {
        "latent": kept(**TIED),
        "yarn": beyond(rope_parameters=DEEPSEEK_YARN, q_lora_rank=None, num_hidden_layers=3),
        "not-interleaved": plain(rope_interleave=False, norm_topk_prob=False, v_head_dim=6,
                                 n_shared_experts=2, hidden_size=60, num_attention_heads=3,
                                 num_key_value_heads=3),
        "biases": plain(attention_bias=True, v_head_dim=12),
        "all-dense": plain(first_k_dense_replace=2),
    }, sizes={**LATENT, "n_group": 3, "topk_group": 2, "routed_scaling_factor": 1.7},
        experts=True),
    "gpt-oss": family("GptOss", {
        "tied": kept(**TIED, rope_parameters=rope("yarn", 150000.0, factor=4.0, beta_fast=32.0,
                                                  beta_slow=1.0, truncate=False, **ORIGINAL)),
        "no-biases": plain(attention_bias=False, rope_parameters=rope("default")),
        "odd": plain(**{**ODD, "intermediate_size": 23}, num_hidden_layers=3, sliding_window=7,
                     swiglu_limit=0.5, rope_parameters=YARN),
    }, sizes={**SIZES, **MIXTURE, "head_dim": 8, "sliding_window": 16, "swiglu_limit": 1.5}),
}  # fmt: skip

FAMILIES: dict[str, ModelFamily] = {**DENSE, **EXPERTS}

# Golden models of RMSNorms with a weight in front of attention and MLP, and no others.
COMMUTING = {
    "gemma-tied", "glm-biases", "gpt-oss-tied", "granite-factors", "granitemoe-factors",
    "granitemoeshared-shared", "llama-llama3", "llama-tied", "ministral-kinds", "ministral3-beyond",
    "mistral-window", "mixtral-tied", "olmoe-tied", "phi3-longrope", "qwen2-moe-shared",
    "qwen2-tied", "qwen3-moe-tied", "qwen3-tied", "smollm3-no-rope",
}  # fmt: skip


def variants(golden: bool = False) -> list[tuple[str, str]]:
    """(family, variant) of all; only of the golden ones if told."""
    return [(name, variant) for name, row in FAMILIES.items()
            for variant, values in row.variants.items()
            if not values.refused and (values.golden or not golden)]


def config_of(name: str, variant: str) -> Any:
    """The config of transformers."""
    import transformers

    row = FAMILIES[name]
    kind = getattr(transformers, row.config)
    values = {**TOKENS, **row.sizes, **row.variants[variant].options}
    values |= {key: EPSILON for key in EPSILON_KEYS if hasattr(kind, key)}
    if not transformers.__version__.startswith("4."):  # which would write it to config.json
        values["experts_implementation"] = "eager"
    return kind(**values, attn_implementation=row.attention)


def random_model(name: str, variant: str, dtype: str = "bfloat16", seed: int = 0) -> Any:
    """A float32 model whose weights are exact in dtype; see `randomize`."""
    import torch
    import transformers

    row = FAMILIES[name]
    torch.manual_seed(seed)
    model = getattr(transformers, row.model)(config_of(name, variant)).float().eval()
    return randomize(model, row.zero_norms, dtype)


def randomize(model: Any, zero_norms: bool, dtype: str) -> Any:
    """The model with weights far enough from their initial values to tell blocks apart.

    Norms scatter around 1 (or 0, where 1 is added), all else around 0. Routers are wider, so that
    no two experts tie.
    """
    import torch

    with torch.no_grad():
        for name, values in [*model.named_parameters(), *correction_biases(model)]:
            values.normal_(mean_of(name, zero_norms), deviation_of(name))
            values.copy_(values.to(getattr(torch, dtype)))
    return model


def correction_biases(model: Any) -> list[tuple[str, Any]]:
    """Buffers that decide which experts are chosen; save_pretrained writes them."""
    return [(n, b) for n, b in model.named_buffers() if n.endswith("e_score_correction_bias")]


def mean_of(name: str, zero_norms: bool) -> float:
    """Of a parameter's random values."""
    norm = any(part in name for part in ("norm", "ln_", ".ln")) and name.endswith("weight")
    return 1.0 if norm and not zero_norms else 0.0


def deviation_of(name: str) -> float:
    """Of a parameter's random values; a router's weight is mlp.gate or in a router."""
    router = "router" in name or name.endswith((".gate.weight", "e_score_correction_bias"))
    return 0.4 if router or name.endswith("sinks") else 0.15


def save_model(model: Any, folder: Path, dtype: str = "bfloat16", **options: Any) -> None:
    """save_pretrained with the parameters in dtype; the model is as it was afterwards."""
    import torch

    parameters = list(model.parameters())
    for values in parameters:
        values.data = values.data.to(getattr(torch, dtype))
    model.save_pretrained(folder, **options)
    for values in parameters:
        values.data = values.data.float()


def make_family(
    folder: Path, name: str, variant: str, dtype: str = "bfloat16", fused: bool = False
) -> Any:
    """Writes a variant's folder with a tokenizer and returns the float32 model of transformers.

    fused: experts as tensors of three dimensions, as transformers holds them in memory.
    """
    from conftest import write_tokenizer

    model = random_model(name, variant, dtype)
    save_model(model, folder, dtype, save_original_format=not fused)
    write_tokenizer(folder, VOCAB)
    return model


def random_tokens(length: int, seed: int = 0) -> NDArray[np.int64]:
    """Token ids [length]."""
    return np.random.default_rng(seed).integers(2, VOCAB, length)
