# SPDX-License-Identifier: Apache-2.0
"""Families that compute as LLaMA does: RMSNorm, rotary embedding, gated SiLU."""

from __future__ import annotations

from dataclasses import replace

from .family import Family

LLAMA = Family(
    "LlamaForCausalLM",
    norms={
        "before_attention": "model.layers.{i}.input_layernorm",
        "before_mlp": "model.layers.{i}.post_attention_layernorm",
    },
    linears={
        "attention": "model.layers.{i}.self_attn.{role}_proj",
        "mlp": "model.layers.{i}.mlp.{role}_proj",
    },
    activations={"silu": "silu", "swish": "silu"},
    bias_keys={"attention_bias": "attention", "mlp_bias": "mlp"},
    ignored_keys=("sliding_window", "max_window_layers"),
    defaults={
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "rope_theta": 10000.0,
    },
)

MISTRAL = replace(
    LLAMA,
    name="MistralForCausalLM",
    bias_keys={},
    window=True,
    ignored_keys=("attention_bias", "mlp_bias"),
    defaults={
        **LLAMA.defaults,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
)

QWEN2 = replace(
    LLAMA,
    name="Qwen2ForCausalLM",
    biases=("q", "k", "v"),
    bias_keys={},
    ignored_keys=(
        *LLAMA.ignored_keys, "attention_bias", "mlp_bias", "dual_chunk_attention_config"),
    defaults={
        **LLAMA.defaults,
        "num_key_value_heads": 32,
        "max_position_embeddings": 32768,
    },
)
