# SPDX-License-Identifier: Apache-2.0
"""Families of GPT's line: LayerNorm, no gate, positions that are learned, rotary or ALiBi."""

from __future__ import annotations

import math
from dataclasses import replace

from .config_json import Fields
from .family import ROOT, Family
from .llama import LAYER_NORM
from .parts import HeadNorms, Norm, Rotary, Stored

H = "transformer.h.{i}."
NEOX = "gpt_neox.layers.{i}."
OPT = "model.decoder.layers.{i}."
MPT = "transformer.blocks.{i}."
BIASED = ("q", "k", "v", "o", "up", "down")
EPSILON = Norm("layer", "layer_norm_epsilon", bias=True)


def four_times(c: Fields) -> int:
    """The usual width of an MLP."""
    return 4 * c.integer("hidden_size")


def own_or_four_times(c: Fields) -> int:
    """The width that config.json gives, or the usual one."""
    return c.integer_or("intermediate_size", four_times(c))


def alibi_slopes(c: Fields) -> tuple[float, ...]:
    """ALiBi's slopes as BLOOM and Falcon take them (arXiv 2108.12409)."""
    heads = c.integer("num_attention_heads")
    power = 2 ** math.floor(math.log2(heads))
    base, extra = (2 ** -(2 ** -(math.log2(n) - 3)) for n in (power, 2 * power))
    return (*(base**i for i in range(1, power + 1)),
            *(extra**i for i in range(1, 2 * (heads - power) + 1, 2)))


def mpt_slopes(c: Fields) -> tuple[float, ...]:
    """ALiBi's slopes as MPT takes them: every second one first where heads are no power of 2."""
    heads = c.integer("num_attention_heads")
    power = 2 ** math.ceil(math.log2(heads))
    slopes = [2 ** -(i * 8 / power) for i in range(1, power + 1)]
    return tuple((slopes if power == heads else slopes[1::2] + slopes[::2])[:heads])


def mpt_number(key: str):
    """A number of attn_config, None where there is none. FormatError for what is not handled."""
    def rule(c: Fields) -> float | None:
        found = c.object_or_none("attn_config")
        for name in ("qk_ln", "prefix_lm"):
            if found is not None and found[name]:
                raise found.error(name, "false")
        return found.number(key) if found is not None and found[key] else None
    return rule


def falcon_norms(c: Fields) -> dict[str, str]:
    """One norm or two, by the age of the layer."""
    new, parallel = c["new_decoder_architecture"], c["parallel_attn"]
    count = c.integer_or("num_ln_in_parallel_attn", 2 if new else 1)
    if not parallel:
        return {"before_attention": H + "input_layernorm",
                "before_mlp": H + "post_attention_layernorm"}
    if count == 2:
        return {"before_attention": H + "ln_attn", "before_mlp": H + "ln_mlp"}
    return {"before_attention": H + "input_layernorm"}


def falcon_kv_heads(c: Fields) -> int:
    """num_kv_heads counts only in the new layer; one head serves all with multi_query."""
    heads = c.integer("num_attention_heads")
    if c["new_decoder_architecture"]:
        return c.integer_or("num_kv_heads", heads)
    return 1 if c["multi_query"] else heads


def falcon_slopes(c: Fields) -> tuple[float, ...] | None:
    """Added before the scores are scaled."""
    return alibi_slopes(c) if c["alibi"] else None


GPT2 = Family(
    "GPT2LMHeadModel", embed="transformer.wte", positions="transformer.wpe",
    final_norm="transformer.ln_f", norm=EPSILON, gated=False, rotary=None, kv_heads=None,
    keys={"hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head",
          "max_position_embeddings": "n_positions", "hidden_act": "activation_function",
          "intermediate_size": "n_inner"},
    norms={"before_attention": H + "ln_1", "before_mlp": H + "ln_2"}, biases=BIASED,
    fused=(Stored(H + "attn.c_attn.weight", ("q", "k", "v"), transposed=True),
           Stored(H + "attn.c_proj.weight", ("o",), transposed=True),
           Stored(H + "mlp.c_fc.weight", ("up",), transposed=True),
           Stored(H + "mlp.c_proj.weight", ("down",), transposed=True)),
    intermediate=own_or_four_times,
    scale=lambda c: None if c["scale_attn_weights"] else 1.0,
    ignored_keys=("summary_*", "n_ctx", "reorder_and_upcast_attn"),
    defaults={"n_positions": 1024, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5,
              "tie_word_embeddings": True, "scale_attn_weights": True},
)  # fmt: skip

GPTJ = replace(
    GPT2, name="GPTJForCausalLM", positions=None, parallel=True,
    norms={"before_attention": H + "ln_1"}, biases=("up", "down"), fused=(), head_bias=True,
    linears={"q": H + "attn.q_proj", "k": H + "attn.k_proj", "v": H + "attn.v_proj",
             "o": H + "attn.out_proj", "up": H + "mlp.fc_in", "down": H + "mlp.fc_out"},
    rotary=Rotary(interleaved=True, dim="rotary_dim"), scale=None,
    ignored_keys=("summary_*", "n_ctx", "scale_attn_weights", "rotary"),
    defaults={**GPT2.defaults, "n_positions": 2048, "tie_word_embeddings": False,
              "rotary_dim": 64, "rope_theta": 10000.0},
)  # fmt: skip

GPT_NEOX = Family(
    "GPTNeoXForCausalLM", embed="gpt_neox.embed_in", head="embed_out",
    final_norm="gpt_neox.final_layer_norm", norm=LAYER_NORM,
    norms={"before_attention": NEOX + "input_layernorm",
           "before_mlp": NEOX + "post_attention_layernorm"},
    linears={"o": NEOX + "attention.dense", "up": NEOX + "mlp.dense_h_to_4h",
             "down": NEOX + "mlp.dense_4h_to_h"},
    fused=(Stored(NEOX + "attention.query_key_value.weight", ("q", "k", "v"), blocks="kv_heads"),),
    gated=False, biases=("up", "down"), bias_keys={"attention_bias": "attention"}, kv_heads=None,
    parallel="use_parallel_residual",
    rotary=Rotary(theta_key="rotary_emb_base", partial_key="rotary_pct"),
    defaults={"max_position_embeddings": 2048, "hidden_act": "gelu", "layer_norm_eps": 1e-5,
              "tie_word_embeddings": False, "use_parallel_residual": True, "rotary_pct": 0.25,
              "rotary_emb_base": 10000.0, "attention_bias": True},
)  # fmt: skip

PHI = Family(
    "PhiForCausalLM", final_norm="model.final_layernorm", head_bias=True,
    norm=LAYER_NORM, parallel=True, gated=False, biases=BIASED,
    norms={"before_attention": ROOT + "input_layernorm"},
    rotary=Rotary(partial_key="partial_rotary_factor"),
    linears={"attention": ROOT + "self_attn.{role}_proj", "o": ROOT + "self_attn.dense",
             "up": ROOT + "mlp.fc1", "down": ROOT + "mlp.fc2"},
    head_norms=lambda c: HeadNorms(ROOT + "self_attn.{role}_layernorm")
    if c["qk_layernorm"] else None,
    defaults={"max_position_embeddings": 2048, "hidden_act": "gelu_new", "layer_norm_eps": 1e-5,
              "tie_word_embeddings": False, "partial_rotary_factor": 0.5, "rope_theta": 10000.0},
)  # fmt: skip

OPT_FAMILY = Family(
    "OPTForCausalLM", embed="model.decoder.embed_tokens",
    positions="model.decoder.embed_positions", position_offset=2, embed_width="word_embed_proj_dim",
    project=("model.decoder.project_in", "model.decoder.project_out"), rotary=None, gated=False,
    final_norm=lambda c: "model.decoder.final_layer_norm"
    if c["do_layer_norm_before"] and not c["_remove_final_layer_norm"] else None,
    keys={"hidden_act": "activation_function", "intermediate_size": "ffn_dim"}, kv_heads=None,
    norm=Norm("layer", 1e-5, bias="layer_norm_elementwise_affine",
              weight="layer_norm_elementwise_affine"),
    norms=lambda c: {f"{'before' if c['do_layer_norm_before'] else 'after'}_{block}": OPT + name
                     for block, name in (("attention", "self_attn_layer_norm"),
                                         ("mlp", "final_layer_norm"))},
    norm_sums=lambda c: not c["do_layer_norm_before"],
    linears={"attention": OPT + "self_attn.{role}_proj", "o": OPT + "self_attn.out_proj",
             "up": OPT + "fc1", "down": OPT + "fc2"},
    bias_keys={"enable_bias": BIASED}, ignored_keys=("layerdrop", "init_std"),
    defaults={"max_position_embeddings": 2048, "activation_function": "relu", "enable_bias": True,
              "do_layer_norm_before": True, "tie_word_embeddings": True,
              "layer_norm_elementwise_affine": True},
)  # fmt: skip

FALCON = Family(
    "FalconForCausalLM", embed="transformer.word_embeddings",
    final_norm="transformer.ln_f", norm=EPSILON, norms=falcon_norms, gated=False,
    keys={"hidden_size": ("hidden_size", "n_embed"), "intermediate_size": "ffn_hidden_size",
          "num_hidden_layers": ("num_hidden_layers", "n_layer"), "hidden_act": "activation",
          "num_attention_heads": ("num_attention_heads", "n_head")},
    linears={"o": H + "self_attention.dense", "up": H + "mlp.dense_h_to_4h",
             "down": H + "mlp.dense_4h_to_h"},
    fused=(Stored(H + "self_attention.query_key_value.weight", ("q", "k", "v"),
                  blocks="kv_heads"),),
    bias_keys={"bias": BIASED}, kv_heads=falcon_kv_heads, slopes=falcon_slopes,
    slopes_before_scale=True,
    parallel=lambda c: c["new_decoder_architecture"] or c["parallel_attn"],
    intermediate=own_or_four_times,
    aliases=("RWForCausalLM",),
    ignored_keys=("n_head_kv", "ff_factor", "num_kv_heads", "multi_query", "parallel_attn",
                  "num_ln_in_parallel_attn", "rope_*"),
    defaults={"max_position_embeddings": 2048, "activation": "gelu", "layer_norm_epsilon": 1e-5,
              "tie_word_embeddings": True, "bias": False, "multi_query": True,
              "parallel_attn": True, "rope_theta": 10000.0},
)  # fmt: skip

BLOOM = replace(
    FALCON, name="BloomForCausalLM", aliases=(), bias_keys={}, biases=BIASED,
    keys={"hidden_size": ("hidden_size", "n_embed"), "num_hidden_layers": "n_layer",
          "num_attention_heads": ("n_head", "num_attention_heads"),
          "max_position_embeddings": "seq_length"},
    embed_norm="transformer.word_embeddings_layernorm", kv_heads=None, slopes=alibi_slopes,
    norms={"before_attention": H + "input_layernorm",
           "before_mlp": H + "post_attention_layernorm"},
    slopes_before_scale=False, parallel=False, intermediate=four_times, rotary=None,
    ignored_keys=("slow_but_exact", "attention_softmax_in_fp32", "masked_softmax_fusion",
                  "bias_dropout_fusion", "offset_alibi", "skip_bias_add*", "n_inner"),
    defaults={"seq_length": 2048, "hidden_act": "gelu_new", "layer_norm_epsilon": 1e-5,
              "tie_word_embeddings": True},
)  # fmt: skip

MPT_FAMILY = Family(
    "MptForCausalLM", aliases=("MPTForCausalLM",), embed="transformer.wte",
    final_norm="transformer.norm_f",
    keys={"hidden_size": "d_model", "num_hidden_layers": "n_layers",
          "num_attention_heads": "n_heads", "max_position_embeddings": "max_seq_len"},
    norm=replace(EPSILON, bias=False), gated=False, rotary=None, kv_heads=None,
    norms={"before_attention": MPT + "norm_1", "before_mlp": MPT + "norm_2"},
    linears={"o": MPT + "attn.out_proj", "up": MPT + "ffn.up_proj", "down": MPT + "ffn.down_proj"},
    fused=(Stored(MPT + "attn.Wqkv.weight", ("q", "k", "v")),), intermediate=four_times,
    slopes=mpt_slopes, scale=mpt_number("softmax_scale"), qkv_clip=mpt_number("clip_qkv"),
    ignored_keys=("expansion_ratio", "learned_pos_emb", "no_bias", "embedding_fraction",
                  "norm_type", "init_*", "emb_pdrop", "verbose", "fc_type", "ffn_config",
                  "use_pad_tok_in_ffn"),
    defaults={"max_seq_len": 2048, "hidden_act": "gelu", "layer_norm_epsilon": 1e-5,
              "tie_word_embeddings": True},
)  # fmt: skip
