# SPDX-License-Identifier: Apache-2.0
"""More bits for the linears that count most: the budget, whole folders, what is refused."""

import dataclasses
import json

import numpy as np
import pytest
from conftest import copy_golden

import singlequant as sq
from singlequant import _C
from singlequant.checkpoint.folder import load_checkpoint
from singlequant.config import QuantConfig
from singlequant.export.writer import estimate_size
from singlequant.sweep.bits import (
    ERROR,
    Noise,
    Share,
    assign_bits,
    predict_noise,
    settle_bits,
    spend,
)
from singlequant.sweep.layer import gptq_factor, quantize_linear


def config(**options):
    given = {"weights": "rtn", "calibration_tokens": 64, "method": "hadamard"}
    return QuantConfig(**given | options)


# ---- the budget ---------------------------------------------------------------------------------


def noise(shares, bits):
    return sum(share.tempered * ERROR[bits.get(name, 4)] for name, share in shares.items())


def mean_bits(shares, bits):
    total = sum(share.weights for share in shares.values())
    return sum(share.weights * bits.get(name, 4) for name, share in shares.items()) / total


def test_nothing_is_spent_at_four_bits_and_all_at_eight():
    shares = {"a": Share(1.0, 100), "b": Share(2.0, 50)}
    assert spend(shares, 4.0) == {}
    assert spend(shares, 8.0) == {"a": 8, "b": 8}


def test_bits_go_where_they_save_most_per_weight():
    assert spend({"a": Share(1.0, 100), "b": Share(3.0, 100)}, 4.5) == {"b": 5}
    assert spend({"a": Share(1.0, 100), "b": Share(8.0, 100)}, 5.0) == {"a": 5, "b": 5}
    assert spend({"a": Share(1.0, 10), "b": Share(3.0, 100)}, 4.1) == {"a": 5}  # 11 bits to spend
    assert spend({"b": Share(1.0, 100), "a": Share(1.0, 100)}, 4.5) == {"a": 5}  # by name


def test_a_step_that_does_not_fit_is_passed_over():
    shares = {"large": Share(1000.0, 1000), "small": Share(1e-6, 10)}
    assert spend(shares, 4.05) == {"small": 8}  # 50 bits to spend; 1000 would not fit


@pytest.mark.parametrize("budget", [4.25, 4.5, 5.0, 6.3])
def test_budget_is_kept_and_nearly_used(budget):
    rng = np.random.default_rng(0)
    shares = {f"l{i}": Share(float(rng.lognormal(0, 2)), int(rng.integers(50, 150)))
              for i in range(60)}
    bits = spend(shares, budget)
    assert set(bits.values()) <= {5, 6, 8}
    assert budget - 0.1 < mean_bits(shares, bits) <= budget
    for _ in range(50):  # no better than the same counts dealt out at random
        names = rng.permutation(list(shares))
        dealt = dict(zip(names, bits.values(), strict=False))
        if mean_bits(shares, dealt) >= mean_bits(shares, bits):
            assert noise(shares, bits) <= noise(shares, dealt)


# ---- embedding and head -------------------------------------------------------------------------


@pytest.fixture
def shares(source):
    linears = [(linear.at(i), linear.n * linear.k) for i in range(source.spec.layers)
               for linear in source.spec.layer(i).linears.values()]
    return {name: Share(1.0, weights) for name, weights in linears}


def test_tables_get_6_bits_where_the_linears_make_more_of_the_difference(source, shares):
    tables, linears = 320 * 64, sum(share.weights for share in shares.values())
    noise = Noise(shares, logits=1.0, tables=1e-3)
    assert noise.divergence({next(iter(shares)): 8}) < noise.divergence({}) == pytest.approx(
        ERROR[4] * len(shares))
    settled, bits = settle_bits(source, config(bits=4.5), noise)
    assert settled.table_bits(source.spec) == {"model.embed_tokens": 6}
    assert settled.bits == pytest.approx(4.5 + 2 * tables / linears, abs=1e-4)
    assert bits == spend(shares, settled.bits)
    assert settle_bits(source, settled, Noise(shares, 1.0, 1e9)) == (settled, bits)  # no more open
    kept, bits = settle_bits(source, config(bits=4.5), Noise(shares, logits=1e-6, tables=1e-3))
    assert kept == config(bits=4.5, head_bits=8, embedding_bits=8)
    assert bits == spend(shares, 4.5)


@pytest.mark.parametrize("given", [
    {"head_bits": 8}, {"embedding_bits": 4}, {"head_bits": 16, "embedding_bits": 16}])
def test_bits_that_were_asked_stay(source, shares, given):
    asked = config(bits=4.5, **given)
    assert settle_bits(source, asked, Noise(shares, 1.0, 0.0)) == (asked, spend(shares, 4.5))


def test_a_table_left_alone_frees_nothing(source, shares):
    asked = config(bits=4.5, ignore=("*embed_tokens",))
    settled, bits = settle_bits(source, asked, Noise(shares, 1.0, 0.0))
    assert (settled.bits, settled.table_bits(source.spec)) == (4.5, {})
    assert bits == spend(shares, 4.5)


def test_cost_of_6_bits_is_foreseen(tmp_path):
    checkpoint = load_checkpoint(sq.bundled_model())
    original = sq.load(sq.bundled_model())
    windows = sq.calibration_windows(checkpoint, config(calibration_tokens=2048))
    kl = []
    for bits in (6, 8):
        out, given = tmp_path / f"{bits}", config(scheme="w4a16", bits=8, head_bits=bits)
        sq.quantize_folder(sq.bundled_model(), out, given)
        found = sq.perplexity(sq.load(out), windows.reshape(-1)[:1024], 512, reference=original)
        kl.append(found.kl_mean)
    foreseen = predict_noise(checkpoint, windows).tables
    assert 0.5 < foreseen / (kl[0] - kl[1]) < 3


# ---- models -------------------------------------------------------------------------------------


def test_bits_of_the_bundled_model():
    checkpoint = load_checkpoint(sq.bundled_model())
    windows = sq.calibration_windows(checkpoint, config())
    given = config(bits=5.0, ignore=("model.layers.0.*",))
    settled, bits = assign_bits(checkpoint, given, windows)
    assert (settled, bits) == assign_bits(checkpoint, given, windows)
    assert set(bits.values()) <= {5, 6, 8}
    assert not [name for name in bits if name.startswith("model.layers.0.")]
    sizes = {name: linear.n * linear.k for i in range(1, checkpoint.spec.layers)
             for linear in checkpoint.spec.layer(i).linears.values() for name in [linear.at(i)]}
    assert set(bits) <= set(sizes)
    mean = sum(n * bits.get(name, 4) for name, n in sizes.items()) / sum(sizes.values())
    assert 4.8 < mean <= 5.0
    four = config(bits=4)
    assert assign_bits(checkpoint, four, windows) == (four, {})


@pytest.mark.parametrize("name", ["granitemoeshared-shared", "gemma2-tied", "phi-phi-2"])
def test_other_layers_are_quantized_within_their_budget(tmp_path, text, name):
    """Experts, norms behind the branches, attention and MLP side by side."""
    folder = copy_golden(name, tmp_path)
    given = config(bits=4.6, head_bits=8)
    sq.quantize_folder(folder, tmp_path / "out", given, text)
    packed, weights, bits = load_checkpoint(tmp_path / "out"), 0, 0
    for i in range(packed.spec.layers):
        for linear in packed.layer(i).linears.values():
            size = int(np.prod(linear.weight.shape))
            weights, bits = weights + size, bits + size * linear.weight.bits
    assert 4.3 < bits / weights <= 4.6
    size = sum(file.stat().st_size for file in (tmp_path / "out").iterdir())
    assert estimate_size(load_checkpoint(folder), given) == pytest.approx(size, rel=0.05)
    hidden = sq.load(tmp_path / "out").hidden_states(np.arange(8)[None])
    assert np.isfinite(hidden).all()


def test_more_bits_bring_the_model_closer_to_the_original(tmp_path):
    original = sq.load(sq.bundled_model())
    tokens = original.encode(sq.bundled_text("heldout"))[:1024]
    kl = []
    for bits in (4.0, 5.0, 8.0):
        out, given = tmp_path / f"{bits:g}", config(scheme="w4a16", bits=bits, group_size=32)
        sq.quantize_folder(sq.bundled_model(), out, dataclasses.replace(given, head_bits=16))
        kl.append(sq.perplexity(sq.load(out), tokens, 256, reference=original).kl_mean)
    assert kl[1] < kl[0] / 1.3
    assert kl[2] < kl[0] / 50


def test_recipe_holds_the_bits_and_a_resumed_run_shares_them(model, tmp_path, text):
    def stop(done, total):
        if done == 1:
            raise KeyboardInterrupt

    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        sq.quantize_folder(model, out, config(bits=4.5), text, progress=stop)
    with pytest.raises(ValueError, match=r"out\.partial"):
        sq.quantize_folder(model, out, config(bits=5.5), text, resume=True)
    sq.quantize_folder(model, out, config(bits=4.5), text, resume=True)
    recipe = json.loads((out / "recipe.json").read_text())
    spec = load_checkpoint(out).spec
    linears = sum(linear.n * linear.k for i in range(spec.layers)
                  for linear in spec.layer(i).linears.values())
    freed = (8 - recipe["config"]["head_bits"]) * spec.vocab * spec.width / linears
    assert recipe["config"]["head_bits"] in (6, 8)
    assert recipe["config"]["bits"] == pytest.approx(4.5 + freed, abs=1e-4)
    again = QuantConfig.from_json(recipe["config"])
    assert not again.leaves_tables_open
    sq.quantize_folder(model, tmp_path / "again", again, text)
    assert load_checkpoint(tmp_path / "again").fingerprint == load_checkpoint(out).fingerprint
    stored = {linear.name: linear.weight.bits for i in range(2)
              for linear in load_checkpoint(out).layer(i).linears.values()}
    assert recipe["bits"] == {name: bits for name, bits in stored.items() if bits > 4}


@pytest.mark.parametrize("bits", [3.9, 8.1, "5", True, None, float("nan")])
def test_budgets_that_are_none_are_refused(bits):
    with pytest.raises(ValueError, match="bits: expected a number from 4 to 8"):
        QuantConfig(bits=bits)


# ---- one linear ---------------------------------------------------------------------------------


@pytest.mark.parametrize("rounding", ["rtn", "mse", "gptq"])
@pytest.mark.parametrize("group", [0, 32])
def test_linears_of_all_bits(rounding, group):
    checkpoint = load_checkpoint(sq.bundled_model())
    windows = sq.calibration_windows(checkpoint, config())
    statistics = next(iter(sq.calibrate(checkpoint, windows)))
    weight = checkpoint.layer(0).linears["q"].weight
    given, errors = config(weights=rounding, group_size=group), []
    factor = gptq_factor(statistics.sites["qkv"], None, given) if rounding == "gptq" else None
    for bits in (4, 5, 6, 8):
        packed = quantize_linear(weight, None, given, "q", factor, bits=bits)
        assert packed.bits == bits
        assert repr(packed).count(f"{bits} bits") == 1
        if group:
            assert not (packed.scales.view(np.uint32) & 0xFFFF).any()
        values = _C.dequantize(_C.unpack(packed.words, packed.shape[1], bits), packed.scales)
        errors.append(np.linalg.norm(values - _C.to_float32(weight)))
    assert (np.array(errors[:-1]) / errors[1:] > [1.6, 1.6, 3]).all()
    with pytest.raises(ValueError, match="q: bits: expected 4, 5, 6 or 8, got 7"):
        quantize_linear(weight, None, given, "q", factor, bits=7)
