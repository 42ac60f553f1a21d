"""The block of experts against the modules of transformers, with random weights."""

from importlib import import_module

import numpy as np
import pytest
from blocks import PLAIN, new_cache, tokens

torch = pytest.importorskip("torch", reason="needs the torch extra")
transformers = pytest.importorskip("transformers", "5.0", reason="needs the torch extra")

from singlequant import _C  # noqa: E402

HIDDEN, INNER, TOKENS = 48, 24, 600
TOLERANCE = 1e-5  # of the largest value
DEEPSEEK = {"n_group": 4, "topk_group": 2, "n_routed_experts": 16, "n_shared_experts": 2,
            "num_experts_per_tok": 5, "moe_intermediate_size": INNER, "routed_scaling_factor": 2.5}
QWEN = {"num_experts": 12, "num_experts_per_tok": 3, "moe_intermediate_size": INNER}
LOCAL = {"num_local_experts": 6, "num_experts_per_tok": 3}
SIGMOID = {"scoring": "sigmoid", "normalize": True, "scale": 2.5, "groups": 4, "chosen_groups": 2,
           "group_score": "top2"}  # fmt: skip
# Class of the block, its config, how the layer's dict says the same.
BLOCKS = {
    "mixtral": ("mixtral.MixtralSparseMoeBlock", "Mixtral", LOCAL, {"normalize": True}),
    "qwen2-moe": ("qwen2_moe.Qwen2MoeSparseMoeBlock", "Qwen2Moe",
                  QWEN | {"shared_expert_intermediate_size": 40}, {}),
    "qwen3-moe": ("qwen3_moe.Qwen3MoeSparseMoeBlock", "Qwen3Moe",
                  QWEN | {"norm_topk_prob": True}, {"normalize": True}),
    "olmoe": ("olmoe.OlmoeSparseMoeBlock", "Olmoe",
              {"num_experts": 12, "num_experts_per_tok": 3}, {}),
    "granitemoe": ("granitemoe.GraniteMoeMoE", "GraniteMoe", LOCAL, {"scoring": "chosen"}),
    "deepseek-v2": ("deepseek_v2.DeepseekV2Moe", "DeepseekV2",
                    DEEPSEEK | {"topk_method": "greedy"}, {"scale": 2.5}),
    "deepseek-v2-groups": ("deepseek_v2.DeepseekV2Moe", "DeepseekV2",
                           DEEPSEEK | {"topk_method": "group_limited_greedy"},
                           {"scale": 2.5, "groups": 4, "chosen_groups": 2}),
    "deepseek-v3": ("deepseek_v3.DeepseekV3MoE", "DeepseekV3", DEEPSEEK, SIGMOID),
    "gpt-oss": ("gpt_oss.GptOssMLP", "GptOss", LOCAL,
                {"scoring": "chosen", "activation": "swiglu_clamped", "limit": 7.0}),
}  # fmt: skip


def linear(site, weight, bias=None):
    return site, np.ascontiguousarray(weight), bias


def expert_linears(state, i, oss):
    """(gate, up, down) of expert i."""
    fused, down = state["experts.gate_up_proj"][i], state["experts.down_proj"][i]
    sites = f"gate_up.{i}", f"down.{i}"
    if not oss:
        return tuple(linear(sites[0], w) for w in np.split(fused, 2)) + (linear(sites[1], down),)
    bias = state["experts.gate_up_proj_bias"][i]
    pair = [linear(sites[0], fused.T[at::2], bias[at::2].copy()) for at in (0, 1)]
    return (*pair, linear(sites[1], down.T, state["experts.down_proj_bias"][i]))


def layer_of(block, said, chosen):
    """A layer whose attention adds nothing and that has no norms."""
    state = {name: t.detach().numpy() for name, t in block.state_dict().items()}
    router = next(state[n] for n in ("gate.weight", "router.weight") if n in state)
    oss = "router.bias" in state
    count = len(router)
    sites = {"qkv": HIDDEN, "o": HIDDEN}
    for i in range(count):
        sites |= {f"gate_up.{i}": HIDDEN, f"down.{i}": INNER}
    experts = {"count": count, "chosen": chosen, "scoring": "softmax", "activation": "silu",
               "router": router, "router_bias": state.get("router.bias"),
               "correction": state.get("gate.e_score_correction_bias"), **said,
               "each": [expert_linears(state, i, oss) for i in range(count)]}  # fmt: skip
    name = next((n for n in ("shared_expert", "shared_experts") if hasattr(block, n)), None)
    if name:
        weights = {r: state[f"{name}.{r}_proj.weight"] for r in ("gate", "up", "down")}
        sites |= {"shared": HIDDEN, "shared_down": weights["down"].shape[1]}
        experts["shared"] = {"activation": "silu", "gate": linear("shared", weights["gate"]),
                             "up": linear("shared", weights["up"]),
                             "down": linear("shared_down", weights["down"])}
        experts["shared_gate"] = state.get("shared_expert_gate.weight")
    zeros = np.zeros((HIDDEN, HIDDEN), np.float32)
    return {
        "hidden": HIDDEN, "sites": {site: (k, *PLAIN) for site, k in sites.items()},
        "attention": {"heads": 6, "kv_heads": 6, "head_dim": 8, "window": 0, "scale": 1.0,
                      "rotary": None, **{role: linear("qkv", zeros) for role in "qkv"},
                      "o": linear("o", zeros)},
        "mlp": None, "norms": {}, "experts": experts,
    }  # fmt: skip


@pytest.mark.parametrize("name", BLOCKS)
def test_block_equals_transformers(name):
    kind, family, options, said = BLOCKS[name]
    torch.manual_seed(3)
    config = getattr(transformers, f"{family}Config")(
        hidden_size=HIDDEN, intermediate_size=INNER, num_attention_heads=6, **options
    )
    folder, kind = kind.split(".")
    module = import_module(f"transformers.models.{folder}.modeling_{folder}")
    block = getattr(module, kind)(config).float().eval()
    with torch.no_grad():
        for key, tensor in block.state_dict().items():
            tensor.normal_(0.0, 0.1 if "correction" in key else 0.3)
        # Some values of gpt-oss' gates are to be clamped.
        x = torch.randn(1, TOKENS, HIDDEN) * (3 if name == "gpt-oss" else 1)
        expected = block(x)
    expected = (expected[0] if isinstance(expected, tuple) else expected).numpy()[0]
    parts = layer_of(block, said, options["num_experts_per_tok"])
    hidden = x.numpy()[0].copy()
    cache = new_cache(_C, parts, 1, TOKENS)
    _C.DecoderLayer(**parts).forward(hidden, *tokens([TOKENS]), cache, 0)
    got = hidden - x.numpy()[0]
    assert np.abs(got - expected).max() < TOLERANCE * np.abs(expected).max()
