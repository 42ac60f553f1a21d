# SPDX-License-Identifier: Apache-2.0
"""Gemma: norms that multiply by 1 + w, a scaled embedding, GELU with a gate."""

from __future__ import annotations

import math
from dataclasses import replace

from .family import ROOT
from .llama import HEAD_NORMS, LLAMA, every
from .parts import Norm, Rotary

GEMMA = replace(
    LLAMA, name="GemmaForCausalLM", norm=Norm(offset=1.0),
    embed_scale=lambda c: math.sqrt(c.integer("hidden_size")),
    activations={"gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu_tanh"},  # it never meant erf's
    bias_keys={"attention_bias": "attention"}, ignored_keys=("hidden_activation",),
    defaults={**LLAMA.defaults, "num_key_value_heads": 16, "head_dim": 256,
              "max_position_embeddings": 8192, "hidden_act": "gelu_pytorch_tanh",
              "tie_word_embeddings": True},
)  # fmt: skip

GEMMA2 = replace(
    GEMMA, name="Gemma2ForCausalLM", keys={"hidden_act": "hidden_activation"},
    norms={"before_attention": ROOT + "input_layernorm",
           "after_attention": ROOT + "post_attention_layernorm",
           "before_mlp": ROOT + "pre_feedforward_layernorm",
           "after_mlp": ROOT + "post_feedforward_layernorm"},
    scale=lambda c: c.number("query_pre_attn_scalar") ** -0.5, sliding=every(2),
    softcap="attn_logit_softcapping", logit_softcap="final_logit_softcapping",
    ignored_keys=("hidden_act", "cache_implementation", "sliding_window_size"),
    defaults={**GEMMA.defaults, "num_key_value_heads": 4, "sliding_window": 4096,
              "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 256,
              "final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0},
)  # fmt: skip

GEMMA3 = replace(
    GEMMA2, name="Gemma3ForCausalLM", sliding=every(6),
    wrappers=("Gemma3ForConditionalGeneration",), head_norms=HEAD_NORMS,
    rotary=Rotary(by_kind=True, local_theta="rope_local_base_freq"), softcap=0.0,
    ignored_keys=(*GEMMA2.ignored_keys, "attn_logit_softcapping"),  # transformers caps no scores
    defaults={**GEMMA2.defaults, "max_position_embeddings": 131072, "rope_theta": 1e6,
              "rope_local_base_freq": 10000.0, "final_logit_softcapping": None},
)  # fmt: skip
