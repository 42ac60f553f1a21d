# SPDX-License-Identifier: Apache-2.0
"""Keys and values beyond float16: which cache a folder asks for, and what a clamp says."""

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
from conftest import edit_config, make_checkpoint
from safetensors.numpy import load_file, save_file

import singlequant as sq
from singlequant.runtime.model import Model

TOKENS = np.random.default_rng(1).integers(0, 320, (2, 60))
RECIPE = {"bits": 4, "scheme": "w4a8", "weights": "rtn", "calibration_tokens": 128}


def loud(path: Path, layers=(0, 1), factor=1e6) -> Path:
    """A model whose values are larger by a factor in these layers, and its outputs the same."""
    make_checkpoint(path, dtype="float32")
    tensors = load_file(path / "model.safetensors")
    for i in layers:
        tensors[f"model.layers.{i}.self_attn.v_proj.weight"] *= np.float32(factor)
        tensors[f"model.layers.{i}.self_attn.o_proj.weight"] /= np.float32(factor or 1)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return path


def quantization(out: Path) -> dict:
    return json.loads((out / "config.json").read_text())["quantization_config"]


def silent(model: Model) -> np.ndarray:
    """Logits; a warning is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return model.forward(TOKENS)


# ---- what quantizing makes ----------------------------------------------------------------------


@pytest.mark.parametrize("method", ["hadamard", "none", "balanced"])
@pytest.mark.parametrize("kv_bits", [16, 8, 4])
def test_folder_of_a_model_with_large_values_asks_for_bfloat16(tmp_path, text, kv_bits, method):
    config = sq.QuantConfig(method=method, kv_bits=kv_bits, **RECIPE)
    summary = sq.quantize_folder(loud(tmp_path / "loud"), tmp_path / "out", config, text)
    out = summary.out
    assert summary.kv_dtype == "bfloat16"
    assert quantization(out)["kv_dtype"] == "bfloat16"
    assert not [file for file in out.iterdir() if file.name.startswith("kv")]
    model = sq.load(out)
    assert (model.kv_bits, model.kv_dtype) == (kv_bits, "bfloat16")
    assert model.new_session(1, 8)._cache.bfloat16
    exact, found = silent(sq.load(out, 32)), silent(model)
    mean = np.abs(found - exact).mean() / np.abs(exact).max()
    assert mean < {16: 0.01, 8: 0.01, 4: 0.05}[kv_bits]
    if method != "balanced":  # which makes values and the weights behind them alike
        with pytest.warns(RuntimeWarning, match="range of float16"):
            clamped = sq.load(out, kv_dtype="float16").forward(TOKENS)
        assert np.abs(clamped - exact).mean() > 2 * np.abs(found - exact).mean()


def test_folder_of_another_model_says_nothing_of_it(tmp_path, model, text):
    out = sq.quantize_folder(model, tmp_path / "out", sq.QuantConfig(**RECIPE), text).out
    assert "kv_dtype" not in quantization(out)
    assert "kv_dtype" not in json.loads((out / "recipe.json").read_text())["config"]
    assert sq.load(out).kv_dtype == "float16"


def test_recipe_may_ask_for_bfloat16(tmp_path, model, text):
    config = sq.QuantConfig(kv_dtype="bfloat16", **RECIPE)
    assert sq.QuantConfig.from_json(config.to_json()) == config
    out = sq.quantize_folder(model, tmp_path / "out", config, text).out
    assert sq.load(out).kv_dtype == "bfloat16"
    assert sq.load(out, kv_dtype="float16").kv_dtype == "float16"


def test_resumed_run_knows_of_a_layer_that_was_whole(tmp_path, text):
    model, out = loud(tmp_path / "loud", layers=(0,)), tmp_path / "out"

    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sq.quantize_folder(model, out, sq.QuantConfig(**RECIPE), text, resume=True, progress=stop)
    summary = sq.quantize_folder(model, out, sq.QuantConfig(**RECIPE), text, resume=True)
    assert summary.resumed_layers == 1
    assert quantization(out)["kv_dtype"] == "bfloat16"


def test_save_of_stages_chained_by_hand_knows_it_too(tmp_path):
    checkpoint, config = sq.load_checkpoint(loud(tmp_path / "loud")), sq.QuantConfig(**RECIPE)
    solved = sq.solve_rotations(sq.calibrate(checkpoint, TOKENS), config)
    out = sq.save(sq.quantize(checkpoint, solved, config), tmp_path / "out", checkpoint, config)
    assert sq.load(out).kv_dtype == "bfloat16"


def test_statistics_keep_the_largest_of_a_layer(tmp_path):
    checkpoint = sq.load_checkpoint(loud(tmp_path / "loud", layers=(1,)))
    sq.save_statistics(sq.calibrate(checkpoint, TOKENS), tmp_path / "statistics")
    first, second = sq.load_statistics(tmp_path / "statistics")
    assert 0.1 < first.kv_largest < 1e3
    assert 1e4 < second.kv_largest < 1e8


def test_balance_of_values_is_counted(tmp_path, text):
    """What the folder's own cache holds is not beyond what the layer was said to have."""
    checkpoint = sq.load_checkpoint(loud(tmp_path / "loud", layers=(0,), factor=1e-4))
    config, said = sq.QuantConfig(method="balanced", **RECIPE), []
    solved = sq.solve_rotations(sq.calibrate(checkpoint, TOKENS), config)
    layers = []
    for layer in sq.quantize(checkpoint, solved, config):
        layers.append(layer)
        said.append(layer.kv_largest)
    model = sq.load(sq.save(layers, tmp_path / "out", checkpoint, config), 32)
    session = model.new_session(2, 60)
    session.append(list(TOKENS))
    assert 0 < session._cache.largest < 1.2 * max(said)


# ---- what running says --------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_clamp_is_told_once(tmp_path, bits):
    checkpoint = sq.load_checkpoint(loud(tmp_path / "loud", layers=(1,), factor=1e8))
    model = Model(checkpoint, bits)
    with pytest.warns(RuntimeWarning, match=r"^loud: layer 1: \d+ keys and values are beyond the "
                                            r"range of float16 .*32 KV bits .*kv_dtype='bfloat16'"):
        model.forward(TOKENS)
    silent(model)
    model.new_session(1, 8)
    silent(Model(checkpoint))
    silent(Model(checkpoint, bits, kv_dtype="bfloat16"))
    session = Model(checkpoint, bits).new_session(1, 8)
    with pytest.warns(RuntimeWarning, match=r"^loud: \d+ keys and values are beyond the range"):
        session.append([TOKENS[0, :3]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        session.append([TOKENS[0, 3:5]])


@pytest.mark.parametrize("value", ["float32", "bf16", 16, True])
def test_other_types_are_refused(tmp_path, model, text, value):
    with pytest.raises(ValueError, match="kv_dtype: expected one of float16, bfloat16, found"):
        sq.QuantConfig(kv_dtype=value)
    with pytest.raises(ValueError, match="kv_dtype: expected one of float16, bfloat16, found"):
        sq.load(model, kv_dtype=value)
    out = sq.quantize_folder(model, tmp_path / "out", sq.QuantConfig(**RECIPE), text).out
    edit_config(out, quantization_config={**quantization(out), "kv_dtype": value})
    with pytest.raises(sq.FormatError, match="quantization_config: kv_dtype: expected one of"):
        sq.load(out)


# ---- the other end of the range -----------------------------------------------------------------


def faint(path: Path, factor: float) -> Path:
    """A model whose keys are smaller by a factor and its queries larger, and its outputs the same.
    """
    make_checkpoint(path, dtype="float32")
    tensors = load_file(path / "model.safetensors")
    for i in range(2):
        tensors[f"model.layers.{i}.self_attn.k_proj.weight"] *= np.float32(factor)
        tensors[f"model.layers.{i}.self_attn.q_proj.weight"] /= np.float32(factor)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return path


@pytest.mark.parametrize("make", [
    lambda path: faint(path, 1e-12), lambda path: loud(path, factor=1e-20)], ids=["keys", "values"])
@pytest.mark.parametrize("kv_bits", [16, 8, 4])
def test_folder_of_a_model_with_tiny_numbers_asks_for_bfloat16(tmp_path, text, kv_bits, make):
    config = sq.QuantConfig(method="hadamard", kv_bits=kv_bits, **RECIPE)
    out = sq.quantize_folder(make(tmp_path / "tiny"), tmp_path / "out", config, text).out
    assert quantization(out)["kv_dtype"] == "bfloat16"
    exact, found = sq.load(out, 32).forward(TOKENS), silent(sq.load(out))
    lost = sq.load(out, kv_dtype="float16").forward(TOKENS)
    mean = np.abs(found - exact).mean() / np.abs(exact).max()
    assert mean < {16: 0.01, 8: 0.01, 4: 0.05}[kv_bits]
    assert np.abs(lost - exact).mean() > 2 * np.abs(found - exact).mean()


@pytest.mark.parametrize(("make", "what"), [
    (lambda path: faint(path, 1e-12), "keys"), (lambda path: loud(path, (1,), 1e-20), "values"),
    (lambda path: faint(path, 1e-5), "keys")], ids=["keys", "values", "steps"])
@pytest.mark.parametrize("bits", [16, 8, 4])
def test_unquantized_model_tells_of_tiny_numbers_once(tmp_path, bits, make, what):
    checkpoint = sq.load_checkpoint(make(tmp_path / "tiny"))
    layer = 1 if what == "values" else 0
    expected = (rf"^tiny: layer {layer}: {what} are too small for float16 .*--kv-bits 32.*"
                r"kv_dtype='bfloat16'")
    model = Model(checkpoint, bits)
    with pytest.warns(RuntimeWarning, match=expected) as told:
        model.forward(TOKENS)
    assert len(told) == 1
    silent(model)
    for kind in ({"kv_bits": 32}, {"kv_bits": bits, "kv_dtype": "bfloat16"}):
        silent(Model(checkpoint, **kind))
    session = Model(checkpoint, bits).new_session(2, 40)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        session.append([TOKENS[0, :3]], [1])  # too few to tell
    with pytest.warns(RuntimeWarning, match=expected):
        session.append([TOKENS[1, :2], TOKENS[0, 3:20]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        session.append([TOKENS[1, 2:30], TOKENS[0, 20:22]])


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_unquantized_model_without_tiny_numbers_is_silent(tmp_path, bits):
    """Nor does one whose values are all zeros lose any."""
    silent(Model(sq.load_checkpoint(make_checkpoint(tmp_path / "usual")), bits))
    dead = Model(sq.load_checkpoint(loud(tmp_path / "dead", factor=0)), bits)
    silent(dead)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dead.new_session(1, 60).append([TOKENS[0]])


def test_values_that_are_all_zeros_ask_for_nothing(tmp_path, text):
    out = sq.quantize_folder(loud(tmp_path / "dead", factor=0), tmp_path / "out",
                             sq.QuantConfig(**RECIPE), text).out
    assert "kv_dtype" not in quantization(out)


def test_statistics_keep_the_least_of_a_layer(tmp_path):
    checkpoint = sq.load_checkpoint(faint(tmp_path / "faint", 1e-12))
    sq.save_statistics(sq.calibrate(checkpoint, TOKENS), tmp_path / "statistics")
    for layer in sq.load_statistics(tmp_path / "statistics"):
        assert 1e-16 < layer.kv_least < 1e-9
        assert layer.kv_largest > 0.01
