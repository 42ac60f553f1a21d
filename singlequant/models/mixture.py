# SPDX-License-Identifier: Apache-2.0
"""Families with experts."""

from __future__ import annotations

from dataclasses import replace

from .config_json import Fields
from .family import ROOT
from .llama import GRANITE, HEAD_NORMS, LLAMA, MISTRAL, QWEN2, QWEN3, every
from .parts import Experts, Rotary, Stored
from .rope import yarn_mscale

EXPERTS = ROOT + "mlp.experts."
# How transformers 5 holds experts in memory, and some folders store them.
STACK = (Stored(EXPERTS + "gate_up_proj", ("gate", "up")), Stored(EXPERTS + "down_proj", ("down",)))
QWEN_EXPERTS = Experts(
    router=ROOT + "mlp.gate", each={"mlp": EXPERTS + "{e}.{role}_proj"}, stacks=(STACK,),
    normalize="norm_topk_prob")


def qwen_routed(c: Fields, i: int) -> bool:
    """Every decoder_sparse_step-th layer that mlp_only_layers does not name."""
    step, dense = c.integer("decoder_sparse_step"), c.integers_or("mlp_only_layers", [], 0)
    return i not in dense and (i + 1) % step == 0


def qwen2_slides(c: Fields, i: int) -> bool:
    """Every second layer before max_window_layers, where use_sliding_window is on."""
    return c["use_sliding_window"] and i % 2 == 0 and i < c.integer("max_window_layers", 0)


def deepseek_routed(c: Fields, i: int) -> bool:
    """Layers from first_k_dense_replace on."""
    return i >= c.integer("first_k_dense_replace", 0)


def deepseek_scale(c: Fields) -> float:
    """1 / sqrt(channels of a query), times yarn's factor where it has one."""
    channels = c.integer("qk_nope_head_dim") + c.integer("qk_rope_head_dim")
    return channels**-0.5 * yarn_mscale(c) ** 2


def deepseek_shared(c: Fields) -> int:
    """The shared experts are one MLP, so many times as wide."""
    return c.integer("moe_intermediate_size") * c.integer_or("n_shared_experts", 0)


def limited(key: str):
    """A number of groups, where topk_method limits the choice to the best groups."""
    return lambda c: c.integer(key) if c["topk_method"] == "group_limited_greedy" else 1


def gpt_oss_limit(c: Fields) -> float:
    """The clamp of its SwiGLU, whose slope is the block's own."""
    if c["swiglu_alpha"] not in (None, 1.702):
        raise c.error("swiglu_alpha", "1.702")
    return c.number("swiglu_limit")


MIXTRAL = replace(
    MISTRAL, name="MixtralForCausalLM",
    respelled={".mlp.": ".block_sparse_moe."},
    experts=Experts(
        router=ROOT + "block_sparse_moe.gate",
        each={role: ROOT + f"block_sparse_moe.experts.{{e}}.{name}"
              for role, name in (("gate", "w1"), ("up", "w3"), ("down", "w2"))},
        stacks=(tuple(replace(s, name=s.name.replace("mlp", "block_sparse_moe")) for s in STACK),),
        count="num_local_experts", intermediate="intermediate_size"),
    defaults={**MISTRAL.defaults, "rms_norm_eps": 1e-5, "rope_theta": 1e6, "sliding_window": None,
              "num_experts_per_tok": 2, "num_local_experts": 8},
)  # fmt: skip

QWEN2_MOE = replace(
    QWEN2, name="Qwen2MoeForCausalLM", biases=(), sliding=qwen2_slides,
    bias_keys={"qkv_bias": ("q", "k", "v")}, routed=qwen_routed,
    experts=replace(QWEN_EXPERTS, shared="shared_expert_intermediate_size",
                    shared_linears=ROOT + "mlp.shared_expert.{role}_proj",
                    shared_router=ROOT + "mlp.shared_expert_gate.weight"),
    defaults={**QWEN2.defaults, "num_key_value_heads": 16, "decoder_sparse_step": 1,
              "qkv_bias": True, "moe_intermediate_size": 1408, "num_experts_per_tok": 4,
              "shared_expert_intermediate_size": 5632, "num_experts": 60},
)  # fmt: skip

QWEN3_MOE = replace(
    QWEN3, name="Qwen3MoeForCausalLM", routed=qwen_routed,
    experts=QWEN_EXPERTS, sliding=lambda c, i: c["use_sliding_window"],
    keys={"num_experts": ("num_experts", "num_local_experts")},
    defaults={**LLAMA.defaults, "num_key_value_heads": 4, "max_position_embeddings": 32768,
              "decoder_sparse_step": 1, "moe_intermediate_size": 768, "num_experts_per_tok": 8,
              "num_experts": 128},
)  # fmt: skip

OLMOE = replace(
    LLAMA, name="OlmoeForCausalLM", qkv_clip="clip_qkv",
    head_norms=replace(HEAD_NORMS, shape="whole"), bias_keys={"attention_bias": "attention"},
    experts=replace(QWEN_EXPERTS, intermediate="intermediate_size"),
    defaults={**LLAMA.defaults, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
              "num_experts": 64, "num_experts_per_tok": 8},
)  # fmt: skip

SPARSE = ROOT + "block_sparse_moe."
GRANITE_MOE = replace(
    GRANITE, name="GraniteMoeForCausalLM",
    bias_keys={"attention_bias": "attention"},
    respelled={".block_sparse_moe.experts.gate_up_proj": ".block_sparse_moe.input_linear.weight",
               ".block_sparse_moe.experts.down_proj": ".block_sparse_moe.output_linear.weight",
               ".block_sparse_moe.router.weight": ".block_sparse_moe.router.layer.weight"},
    experts=Experts(
        router=SPARSE + "router.layer", each={}, count="num_local_experts",
        stacks=((Stored(SPARSE + "input_linear.weight", ("gate", "up")),
                 Stored(SPARSE + "output_linear.weight", ("down",))),),
        intermediate="intermediate_size", scoring=lambda c: "chosen", normalize=False),
    defaults={**GRANITE.defaults, "num_local_experts": 8, "num_experts_per_tok": 2},
)  # fmt: skip

GRANITE_MOE_SHARED = replace(
    GRANITE_MOE, name="GraniteMoeSharedForCausalLM",
    experts=replace(
        GRANITE_MOE.experts, shared="shared_intermediate_size",
        shared_fused=(Stored(ROOT + "shared_mlp.input_linear.weight", ("shared_gate", "shared_up")),
                      Stored(ROOT + "shared_mlp.output_linear.weight", ("shared_down",)))),
)  # fmt: skip

DEEPSEEK_V2 = replace(
    LLAMA, name="DeepseekV2ForCausalLM", latent=True,
    linears={**LLAMA.linears, "kv_a": ROOT + "self_attn.kv_a_proj_with_mqa"},
    bias_keys={"attention_bias": ("q_a", "kv_a", "o")},
    rotary=Rotary(interleaved=True), scale=deepseek_scale, routed=deepseek_routed,
    experts=replace(
        QWEN_EXPERTS, count="n_routed_experts", scale="routed_scaling_factor", normalize=False,
        groups=limited("n_group"), chosen_groups=limited("topk_group"), shared=deepseek_shared,
        shared_linears=ROOT + "mlp.shared_experts.{role}_proj"),
    ignored_keys=("head_dim", "qk_head_dim", "num_key_value_heads", "norm_topk_prob", "aux_loss*",
                  "seq_aux", "ep_size", "moe_layer_freq", "scoring_func", "topk_group", "n_group"),
    defaults={**LLAMA.defaults, "first_k_dense_replace": 0, "kv_lora_rank": 512,
              "n_shared_experts": 2, "n_routed_experts": 64, "topk_method": "greedy",
              "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
              "moe_intermediate_size": 1407},
)  # fmt: skip

DEEPSEEK_V3 = replace(
    DEEPSEEK_V2, name="DeepseekV3ForCausalLM",
    rotary=Rotary(interleaved="rope_interleave"),
    experts=replace(
        DEEPSEEK_V2.experts, scoring=lambda c: "sigmoid", normalize="norm_topk_prob",
        groups="n_group", chosen_groups="topk_group", group_score="top2",
        correction=ROOT + "mlp.gate.e_score_correction_bias"),
    ignored_keys=(*DEEPSEEK_V2.ignored_keys, "num_nextn_predict_layers", "num_mtp_layers",
                  "topk_method"),
    defaults={**DEEPSEEK_V2.defaults, "max_position_embeddings": 4096, "rope_interleave": True,
              "first_k_dense_replace": 3, "n_shared_experts": 1, "n_routed_experts": 256,
              "n_group": 8, "topk_group": 4, "num_experts_per_tok": 8, "norm_topk_prob": True,
              "routed_scaling_factor": 2.5, "q_lora_rank": 1536, "moe_intermediate_size": 2048},
)  # fmt: skip

GPT_OSS = replace(
    LLAMA, name="GptOssForCausalLM", sliding=every(2),
    sinks=ROOT + "self_attn.sinks", biases=("gate", "up", "down"),
    bias_keys={"attention_bias": "attention"},
    experts=Experts(
        router=ROOT + "mlp.router", router_bias=ROOT + "mlp.router.bias", each={},
        stacks=((Stored(EXPERTS + "gate_up_proj", ("gate", "up"), EXPERTS + "gate_up_proj_bias",
                        "intermediate", transposed=True),
                 Stored(EXPERTS + "down_proj", ("down",), EXPERTS + "down_proj_bias",
                        transposed=True)),),
        count="num_local_experts", intermediate="intermediate_size", scoring=lambda c: "chosen",
        normalize=False, activation="swiglu_clamped", limit=gpt_oss_limit),
    ignored_keys=("experts_per_token", "initial_context_length"),
    defaults={**LLAMA.defaults, "num_key_value_heads": 8, "head_dim": 64, "rms_norm_eps": 1e-5,
              "max_position_embeddings": 131072, "sliding_window": 128, "attention_bias": True,
              "rope_theta": 150000.0, "num_local_experts": 128, "num_experts_per_tok": 4,
              "swiglu_limit": 7.0},
)  # fmt: skip
