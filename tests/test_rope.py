# SPDX-License-Identifier: Apache-2.0
"""Rotary frequencies of every type: transformers' own, and refusals of what it cannot mean."""

from __future__ import annotations

import copy
import importlib.util
from typing import Any

import numpy as np
import pytest

from singlequant._C import FormatError
from singlequant.models.config_json import Fields
from singlequant.models.rope import rotary_spec, yarn_mscale

WITH_TORCH = importlib.util.find_spec("torch") and importlib.util.find_spec("transformers")
needs_torch = pytest.mark.skipif(not WITH_TORCH, reason="needs torch and transformers")

BASE = {"hidden_size": 128, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 32,
        "intermediate_size": 64, "max_position_embeddings": 4096, "rope_theta": 10000.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 512}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
LONG = {"rope_type": "longrope", "short_factor": [1.0 + 0.1 * i for i in range(16)],
        "long_factor": [1.5 + 0.7 * i for i in range(16)]}
# What stands in config.json beside BASE, by name.
CONFIGS: dict[str, dict[str, Any]] = {
    "default": {},
    "type": {"rope_scaling": {"type": "linear", "factor": 3.0}},
    "linear": {"rope_parameters": {"rope_type": "linear", "factor": 3, "rope_theta": 5e5}},
    "dynamic": {"rope_scaling": {"rope_type": "dynamic", "factor": 2.7}},
    "llama3": {"rope_scaling": LLAMA3, "rope_theta": 500000.0},
    "llama3 outer": {"rope_scaling": LLAMA3, "original_max_position_embeddings": 256},
    "yarn": {"rope_scaling": YARN},
    "yarn silent": {"rope_scaling": {"type": "yarn", "factor": 4.0}},
    "yarn factor": {"rope_parameters": {**YARN, "attention_factor": 1.25, "rope_theta": 1e6}},
    "yarn null": {"rope_scaling": {**YARN, "factor": None}},
    "yarn mscale": {"rope_scaling": {**YARN, "factor": 40, "mscale": 1.0, "mscale_all_dim": 0.707,
                                     "beta_fast": 24, "beta_slow": 2}},
    "yarn smooth": {"rope_scaling": {**YARN, "truncate": False}, "rope_theta": 150000},
    "yarn narrow": {"rope_scaling": {**YARN, "beta_fast": 2, "beta_slow": 2, "truncate": False}},
    "longrope": {"rope_scaling": LONG, "original_max_position_embeddings": 1024},
    "longrope inside": {"rope_parameters": {
        **LONG, "original_max_position_embeddings": 512, "factor": 16.0, "rope_theta": 1e4}},
    "longrope factor": {"rope_scaling": {**LONG, "attention_factor": 1.1}},
    "partial": {"partial_rotary_factor": 0.5,
                "rope_parameters": {"rope_type": "linear", "factor": 2.0}},
    "partial inside": {"rope_parameters": {**YARN, "partial_rotary_factor": 0.75}},
    "proportional": {"rope_parameters": {"rope_type": "proportional", "rope_theta": 1e6,
                                         "partial_rotary_factor": 0.25}},
    "proportional factor": {"rope_parameters": {"rope_type": "proportional", "factor": 8.0,
                                                "partial_rotary_factor": 0.3}},
}


def spec_of(values: dict[str, Any], head_dim: int = 32, **arguments: Any) -> Any:
    return rotary_spec(Fields({**BASE, **copy.deepcopy(values)}, "config.json"), head_dim,
                       **arguments)


def require_equal(given: Any, expected: Any, scale: float, expected_scale: float) -> None:
    """Within one unit of float32's last place, and zeros where zeros are expected."""
    given, expected = np.array(given, np.float32), np.array(expected, np.float32)
    assert given.shape == expected.shape
    np.testing.assert_array_max_ulp(given, expected, maxulp=1)
    assert scale == pytest.approx(expected_scale, rel=1e-12)


@needs_torch
@pytest.mark.parametrize("name", CONFIGS)
def test_frequencies_equal_transformers(name):
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = LlamaConfig.from_dict(copy.deepcopy({**BASE, **CONFIGS[name]}))
    kind = config.rope_parameters["rope_type"]
    make = ROPE_INIT_FUNCTIONS.get(kind, LlamaRotaryEmbedding.compute_default_rope_parameters)
    inv_freq, scale = make(config)
    rotary = spec_of(CONFIGS[name])
    require_equal(rotary.inv_freq, inv_freq.numpy(), rotary.scale, scale)
    if kind == "longrope":
        original = config.rope_parameters["original_max_position_embeddings"]
        assert rotary.original == original
        inv_freq, _ = make(config, seq_len=original + 1)
        require_equal(rotary.long_inv_freq, inv_freq.numpy(), 1, 1)


@needs_torch
def test_dynamic_parameters_give_transformers_frequencies_of_longer_texts():
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = LlamaConfig.from_dict(copy.deepcopy({**BASE, **CONFIGS["dynamic"]}))
    rotary = spec_of(CONFIGS["dynamic"])
    for length in (4097, 5000, 20000):
        inv_freq, _ = ROPE_INIT_FUNCTIONS["dynamic"](config, seq_len=length)
        s, dim = rotary.dynamic, 2 * len(rotary.inv_freq)
        theta = rotary.theta * (s * length / rotary.original - (s - 1)) ** (dim / (dim - 2))
        expected = 1 / theta ** (np.arange(0, dim, 2) / dim)
        np.testing.assert_allclose(inv_freq.numpy(), expected, rtol=1e-6)


GEMMA3 = {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "rope_theta": 1e6,
          "rope_local_base_freq": 10000.0, "head_dim": 32, "sliding_window_pattern": 2}
NESTED = {"rope_parameters": {"full_attention": {**YARN, "rope_theta": 5e5},
                              "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                              "truncate": False}, "head_dim": 32}


@needs_torch
@pytest.mark.parametrize("model", ["gemma3", "gemma3 nested", "olmo3", "olmo3 nested"])
@pytest.mark.parametrize("kind", ["full_attention", "sliding_attention"])
def test_kinds_of_layers_have_transformers_parameters(model, kind):
    from transformers import Gemma3TextConfig, Olmo3Config
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding
    from transformers.models.olmo3.modeling_olmo3 import Olmo3RotaryEmbedding

    values = {"gemma3": GEMMA3, "gemma3 nested": NESTED, "olmo3 nested": NESTED,
              "olmo3": {"rope_scaling": YARN}}[model]
    config_class, embedding = ((Gemma3TextConfig, Gemma3RotaryEmbedding) if "gemma" in model else
                               (Olmo3Config, Olmo3RotaryEmbedding))
    # Olmo3Config gives rope_theta to full attention alone; its default is that of the models.
    values = {**values, "rope_theta": values.get("rope_theta", 500000.0)}
    layers = ["full_attention", "sliding_attention"]
    turning = embedding(config_class.from_dict(
        copy.deepcopy({**BASE, "layer_types": layers, **values})))
    sliding = kind == "sliding_attention" and "gemma" in model
    rotary = spec_of(values, kind=kind,
                     theta_key="rope_local_base_freq" if sliding else "rope_theta")
    require_equal(rotary.inv_freq, getattr(turning, f"{kind}_inv_freq").numpy(), rotary.scale,
                  getattr(turning, f"{kind}_attention_scaling"))


# ROPE_INIT_FUNCTIONS of transformers 5.24 with torch 2.13: inv_freq, and the scale of cos and sin.
GOLDEN: dict[str, tuple[list[float], float]] = {
    "dynamic": ([
        1, 0.562341332, 0.316227764, 0.177827939, 0.100000001, 0.0562341288, 0.0316227786,
        0.0177827943, 0.00999999978, 0.00562341325, 0.00316227786, 0.00177827943,
        0.00100000005, 0.000562341302, 0.000316227786, 0.00017782794,
    ], 1.0),
    "llama3": ([
        1, 0.440366626, 0.193922758, 0.0853971019, 0.0273441337, 0.00375802116,
        0.000911583134, 0.000401430763, 0.000176776681, 7.78465546e-05, 3.42810235e-05,
        1.50962178e-05, 6.64786967e-06, 2.92749974e-06, 1.28917316e-06, 5.6770881e-07,
    ], 1.0),
    "yarn mscale": ([
        1, 0.562341332, 0.316227764, 0.177827939, 0.0805000067, 0.0343028195, 0.0131234527,
        0.00391221466, 0.000250000012, 0.000140585325, 7.90569466e-05, 4.44569851e-05,
        2.49999994e-05, 1.40585325e-05, 7.90569447e-06, 4.44569832e-06,
    ], 1.0857263992561355),
    "yarn smooth": ([
        1, 0.47478205, 0.225418001, 0.0929696858, 0.0359492674, 0.0131790964, 0.00441078376,
        0.00135956542, 0.000645497232, 0.000306470494, 0.000145506696, 6.90839661e-05,
        3.27998277e-05, 1.55727703e-05, 7.39367169e-06, 3.51038284e-06,
    ], 1.138629436111989),
    "longrope": ([
        1, 0.511219382, 0.263523132, 0.136790738, 0.0714285746, 0.0374894217, 0.0197642352,
        0.0104604671, 0.00555555569, 0.00295969122, 0.00158113893, 0.000846799754,
        0.000454545458, 0.000244496245, 0.000131761568, 7.11311732e-05,
    ], 1.0954451150103321),
    "partial": ([
        0.5, 0.158113882, 0.0500000007, 0.0158113893, 0.00499999989, 0.00158113893,
        0.000500000024, 0.000158113893,
    ], 1.0),
    "proportional": ([
        1, 0.421696514, 0.177827939, 0.0749894157, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
    ], 1.0),
}  # fmt: skip


@pytest.mark.parametrize("name", GOLDEN)
def test_frequencies_equal_stored_ones_of_transformers(name):
    values, scale = GOLDEN[name]
    rotary = spec_of(CONFIGS[name])
    require_equal(rotary.inv_freq, values, rotary.scale, scale)


def test_longrope_has_its_frequencies_for_long_texts():
    rotary = spec_of(CONFIGS["longrope"])
    divisors = np.array(rotary.inv_freq) / rotary.long_inv_freq
    expected = np.array(LONG["long_factor"]) / LONG["short_factor"]
    np.testing.assert_allclose(divisors, expected, rtol=1e-6)
    assert (rotary.original, rotary.dynamic) == (1024, 0)


@pytest.mark.parametrize("name", ["su", "yarn"])
def test_old_names_of_longrope(name):
    values = {"rope_scaling": {**LONG, "rope_type": None, "type": name},
              "original_max_position_embeddings": 1024}
    assert spec_of(values) == spec_of(CONFIGS["longrope"])


def test_channels_that_turn():
    assert spec_of({}, 64, dim=16, interleaved=True).interleaved
    assert spec_of({}, 64, dim=16).inv_freq == spec_of({}, 16).inv_freq
    assert spec_of({"rotary_pct": 0.25}, 64, partial_key="rotary_pct") == spec_of({}, 16)
    assert spec_of({"rope_theta": None, "base": 7.0}, theta_key="base") == spec_of(
        {"rope_theta": 7.0})


def test_a_plain_scaling_is_about_full_attention():
    assert spec_of(GEMMA3, kind="full_attention").inv_freq[0] == 0.125
    assert spec_of(GEMMA3, kind="sliding_attention", theta_key="rope_local_base_freq") == spec_of(
        {})


def test_what_deepseek_multiplies_its_scale_by():
    values = {"type": "yarn", "factor": 40, "mscale": 1.0, "mscale_all_dim": 0.707}
    for given, expected in (({"rope_scaling": values}, 0.0707 * np.log(40) + 1), ({}, 1.0),
                            ({"rope_scaling": {**values, "mscale_all_dim": 0}}, 1.0)):
        assert yarn_mscale(Fields(given, "config.json")) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rope_scaling": {"type": "ntk"}}, "rope_scaling.rope_type: expected one of .* 'ntk'"),
        ({"rope_scaling": {"type": ["yarn"]}}, r"rope_type: expected one of .* found \['yarn'\]"),
        ({"rope_scaling": {**YARN, "factor": 0}}, "rope_scaling.factor: expected a number"),
        ({"rope_scaling": YARN, "rope_theta": 1.0}, "rope_theta: expected a number other than 1"),
        ({"rope_scaling": {**YARN, "truncate": 1}}, "truncate: expected true or false, found 1"),
        ({"rope_scaling": {"type": "dynamic"}}, "rope_scaling.factor: expected a number"),
        ({"rope_scaling": {**LLAMA3, "high_freq_factor": 1.0}}, "expected more than low_freq"),
        ({"rope_scaling": {**LONG, "long_factor": [1.0]}}, "long_factor: expected 16 .* found 1"),
        ({"rope_scaling": {**LONG, "short_factor": [0] * 16}}, "expected frequencies that are fin"),
        ({"rope_scaling": {**LONG, "short_factor": None}}, "short_factor: expected a list"),
        ({"rope_parameters": {"mrope_section": [8, 8]}}, "mrope_section: expected no such key"),
        ({"rope_scaling": {**YARN, "original_max_position_embeddings": 1.5}}, "an integer from 2"),
        ({"partial_rotary_factor": 1.5}, "partial_rotary_factor: expected a share of at most 1"),
        ({"partial_rotary_factor": 0.1}, "even number of channels from 2 to 32 to turn, found 3"),
        ({"partial_rotary_factor": 0.01}, "even number of channels from 2 to 32 to turn, found 0"),
        (NESTED, "rope_parameters: expected parameters that hold for all layers"),
    ],
)
def test_parameters_that_mean_nothing_are_refused(values, message):
    with pytest.raises(FormatError, match=f"^config.json: .*{message}"):
        spec_of(values)


def test_kinds_without_parameters_of_their_own_are_refused():
    values = {"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}}
    with pytest.raises(FormatError, match="rope_parameters: expected an object of parameters und"):
        spec_of(values, kind="sliding_attention")
