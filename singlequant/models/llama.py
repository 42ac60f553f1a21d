# SPDX-License-Identifier: Apache-2.0
"""Families whose layers are LLaMA's but for a norm, a bias, a window or a factor."""

from __future__ import annotations

from dataclasses import replace

from .config_json import Fields
from .family import ROOT, Family
from .parts import HeadNorms, Norm, Rotary, Stored
from .rope import FULL, ORIGINAL

ALL_LAYERS = lambda c, i: True  # noqa: E731  sliding where sliding_window is set
PARTIAL = Rotary(partial_key="partial_rotary_factor")
HEAD_NORMS = HeadNorms(ROOT + "self_attn.{role}_norm")
LAYER_NORM = Norm("layer", "layer_norm_eps", bias=True)
AFTER = {
    "after_attention": ROOT + "post_attention_layernorm",
    "after_mlp": ROOT + "post_feedforward_layernorm",
}
QKV_BIAS = {"attention_bias": ("q", "k", "v")}


def qwen_slides(c: Fields, i: int) -> bool:
    """Layers from max_window_layers on, where use_sliding_window is on."""
    return c["use_sliding_window"] and i >= c.integer("max_window_layers", 0)


def ministral3_growth(c: Fields) -> tuple[float, int] | None:
    """(beta, original): queries grow by 1 + beta ln(1 + floor(position / original))."""
    rope = c.object_or_none("rope_parameters") or c.object_or_none("rope_scaling")
    if rope is None or not rope["llama_4_scaling_beta"] or not rope[ORIGINAL]:
        return None
    return rope.number("llama_4_scaling_beta"), rope.integer(ORIGINAL)


def every(period: int):
    """Sliding layers, but for the last of each `period` (or sliding_window_pattern)."""
    def slides(c: Fields, i: int) -> bool:
        return (i + 1) % c.integer_or("sliding_window_pattern", period) != 0
    return slides


def cohere2_unrotated(c: Fields, i: int) -> bool:
    """Layers that see everything have no rotary embedding."""
    types = c["layer_types"]
    return types[i] == FULL if types else not every(4)(c, i)


def smollm3_unrotated(c: Fields, i: int) -> bool:
    """no_rope_layers holds 1 where there is a rotary embedding."""
    layers, count = c.integers_or("no_rope_layers", [], 0), c.integer("num_hidden_layers")
    if layers and len(layers) != count:
        raise c.error("no_rope_layers", f"{count} entries, one for each layer", len(layers))
    return not layers[i] if layers else (i + 1) % c.integer("no_rope_layer_interval") == 0


def smollm3_slides(c: Fields, i: int) -> bool:
    """Layers without rotary embedding, where use_sliding_window is on."""
    return bool(c["use_sliding_window"]) and smollm3_unrotated(c, i)


LLAMA = Family(
    "LlamaForCausalLM",
    norms={
        "before_attention": ROOT + "input_layernorm",
        "before_mlp": ROOT + "post_attention_layernorm",
    },
    linears={"attention": ROOT + "self_attn.{role}_proj", "mlp": ROOT + "mlp.{role}_proj"},
    bias_keys={"attention_bias": "attention", "mlp_bias": "mlp"},
    ignored_keys=("sliding_window", "max_window_layers"),
    wrappers=("LlavaForConditionalGeneration",),
    defaults={
        "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "hidden_act": "silu",
        "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False,
        "rope_theta": 10000.0,
    },
)  # fmt: skip

MISTRAL = replace(
    LLAMA, name="MistralForCausalLM", bias_keys={}, sliding=ALL_LAYERS,
    wrappers=("LlavaForConditionalGeneration", "Mistral3ForConditionalGeneration"),
    ignored_keys=("attention_bias", "mlp_bias"),
    defaults={**LLAMA.defaults, "num_key_value_heads": 8, "max_position_embeddings": 131072,
              "sliding_window": 4096},
)  # fmt: skip

MINISTRAL = replace(MISTRAL, name="MinistralForCausalLM")

MINISTRAL3 = replace(
    MISTRAL, name="Ministral3ForCausalLM", wrappers=("Mistral3ForConditionalGeneration",),
    query_growth=ministral3_growth,
    defaults={**MISTRAL.defaults, "head_dim": 128, "max_position_embeddings": 262144,
              "rms_norm_eps": 1e-5, "sliding_window": None},
)  # fmt: skip

QWEN2 = replace(
    LLAMA, name="Qwen2ForCausalLM", biases=("q", "k", "v"), bias_keys={},
    sliding=qwen_slides,
    ignored_keys=("attention_bias", "mlp_bias", "dual_chunk_attention_config"),
    defaults={**LLAMA.defaults, "num_key_value_heads": 32, "max_position_embeddings": 32768,
              "use_sliding_window": False, "max_window_layers": 28},
)  # fmt: skip

QWEN3 = replace(
    QWEN2, name="Qwen3ForCausalLM", biases=(), head_norms=HEAD_NORMS,
    bias_keys={"attention_bias": "attention"}, ignored_keys=("mlp_bias",),
    defaults={**QWEN2.defaults, "head_dim": 128},
)  # fmt: skip

GRANITE = replace(
    LLAMA, name="GraniteForCausalLM", embed_scale="embedding_multiplier",
    residual_scale="residual_multiplier", scale="attention_multiplier",
    logit_scale=lambda c: 1 / c.number("logits_scaling"),
    defaults={**LLAMA.defaults, "embedding_multiplier": 1.0, "logits_scaling": 1.0,
              "residual_multiplier": 1.0, "attention_multiplier": 1.0},
)  # fmt: skip

SMOLLM3 = replace(
    LLAMA, name="SmolLM3ForCausalLM", unrotated=smollm3_unrotated,
    sliding=smollm3_slides,
    ignored_keys=("no_rope_layer_interval", "rope_parameters", "rope_scaling", "rope_theta"),
    defaults={**LLAMA.defaults, "num_key_value_heads": 4, "max_position_embeddings": 32768,
              "tie_word_embeddings": True, "rope_theta": 2e6, "no_rope_layer_interval": 4},
)  # fmt: skip

PHI3 = replace(
    LLAMA, name="Phi3ForCausalLM", bias_keys={}, sliding=ALL_LAYERS,
    rotary=PARTIAL,
    fused=(Stored(ROOT + "self_attn.qkv_proj.weight", ("q", "k", "v")),
           Stored(ROOT + "mlp.gate_up_proj.weight", ("gate", "up"))),
    ignored_keys=("attention_bias", "mlp_bias", "full_attn_mod", "interpolate_factor"),
    defaults={**LLAMA.defaults, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
)  # fmt: skip

OLMO = replace(
    LLAMA, name="OlmoForCausalLM", qkv_clip="clip_qkv",
    norm=Norm("layer", 1e-5, weight=False), bias_keys={"attention_bias": "attention"},
)  # fmt: skip

OLMO2 = replace(
    LLAMA, name="Olmo2ForCausalLM", norms=AFTER,
    head_norms=replace(HEAD_NORMS, shape="whole"), bias_keys={"attention_bias": "attention"},
    defaults={**LLAMA.defaults, "rms_norm_eps": 1e-5},
)  # fmt: skip

OLMO3 = replace(
    OLMO2, name="Olmo3ForCausalLM", sliding=every(4), ignored_keys=(),
    rotary=Rotary(by_kind=True, local_theta="rope_theta"),
    defaults={**OLMO2.defaults, "sliding_window": 4096, "rope_theta": 500000.0},
)  # fmt: skip

GLM = replace(
    LLAMA, name="GlmForCausalLM", bias_keys=QKV_BIAS,
    rotary=replace(PARTIAL, interleaved=True),
    fused=(Stored(ROOT + "mlp.gate_up_proj.weight", ("gate", "up")),),
    defaults={**LLAMA.defaults, "num_key_value_heads": 2, "head_dim": 128,
              "max_position_embeddings": 131072, "rms_norm_eps": 1.5625e-07,
              "attention_bias": True, "partial_rotary_factor": 0.5},
)  # fmt: skip

GLM4 = replace(
    GLM, name="Glm4ForCausalLM",
    norms={**LLAMA.norms, "after_attention": ROOT + "post_self_attn_layernorm",
           "after_mlp": ROOT + "post_mlp_layernorm"},
)  # fmt: skip

COHERE = replace(
    LLAMA, name="CohereForCausalLM", parallel=True,
    norm=replace(LAYER_NORM, bias=False), norms={"before_attention": ROOT + "input_layernorm"},
    rotary=Rotary(interleaved=True), logit_scale="logit_scale",
    head_norms=lambda c: replace(HEAD_NORMS, shape="heads") if c["use_qk_norm"] else None,
    bias_keys={"attention_bias": "attention"},
    defaults={**LLAMA.defaults, "max_position_embeddings": 8192, "layer_norm_eps": 1e-5,
              "tie_word_embeddings": True, "rope_theta": 500000.0, "logit_scale": 0.0625},
)  # fmt: skip

COHERE2 = replace(
    COHERE, name="Cohere2ForCausalLM", head_norms=None, sliding=every(4),
    unrotated=cohere2_unrotated,
    ignored_keys=("order_of_interleaved_layers", "rotary_pct", "layer_switch", "use_parallel_*",
                  "use_gated_activation", "use_embedding_sharing", "position_embedding_type",
                  "rope_parameters", "rope_scaling", "rope_theta"),
    defaults={**COHERE.defaults, "sliding_window": 4096},
)  # fmt: skip

STABLELM = replace(
    LLAMA, name="StableLmForCausalLM", norm=LAYER_NORM,
    norms=lambda c: {place: name for place, name in LLAMA.norms.items()
                     if place == "before_attention" or not c["use_parallel_residual"]},
    parallel="use_parallel_residual", bias_keys={"use_qkv_bias": ("q", "k", "v")},
    head_norms=lambda c: HeadNorms(
        ROOT + "self_attn.{role}_layernorm.norms.{h}", "heads", replace(LAYER_NORM, bias=False)
    ) if c["qk_layernorm"] else None,
    ignored_keys=("rope_pct",), rotary=PARTIAL,
    defaults={**LLAMA.defaults, "num_key_value_heads": 32, "max_position_embeddings": 4096,
              "layer_norm_eps": 1e-5, "use_qkv_bias": False, "partial_rotary_factor": 0.25},
)  # fmt: skip

STARCODER2 = replace(
    LLAMA, name="Starcoder2ForCausalLM", gated=False, sliding=ALL_LAYERS,
    norm=replace(LAYER_NORM, eps="norm_epsilon"),
    ignored_keys=("mlp_type", "norm_type", "layer_norm_epsilon", "activation_function",
                  "*attention_softmax_in_fp32", "scale_attn_weights"),
    linears={"attention": ROOT + "self_attn.{role}_proj", "up": ROOT + "mlp.c_fc",
             "down": ROOT + "mlp.c_proj"},
    bias_keys={"use_bias": ("q", "k", "v", "o", "up", "down")},
    defaults={**LLAMA.defaults, "num_key_value_heads": 2, "max_position_embeddings": 4096,
              "norm_epsilon": 1e-5, "hidden_act": "gelu_pytorch_tanh", "use_bias": True,
              "tie_word_embeddings": True},
)  # fmt: skip

NEMOTRON = replace(
    LLAMA, name="NemotronForCausalLM", gated=False,
    norm=Norm("layer", "norm_eps", 1.0, bias=True), ignored_keys=("rope_percent",), rotary=PARTIAL,
    bias_keys={"attention_bias": "attention", "mlp_bias": ("up", "down")},
    defaults={**LLAMA.defaults, "max_position_embeddings": 4096, "norm_eps": 1e-5,
              "hidden_act": "relu2", "partial_rotary_factor": 0.5},
)  # fmt: skip

