# SPDX-License-Identifier: Apache-2.0
"""The balance for blocks of weights, and `rotated-hf`, which puts it into the weights."""

import family_models as zoo
import numpy as np
import pytest
from conftest import SENTENCES, copy_golden
from safetensors.numpy import load_file, save_file
from test_export import GOLDEN, TOLERANCE, failing, logits, quantized, tensors

import singlequant as sq
from singlequant import _C, _reference as reference
from singlequant.checkpoint.folder import load_checkpoint
from singlequant.cli.main import main
from singlequant.methods.balance import BLOCK, block_balance
from singlequant.sweep.calibrate import site_statistics

# ---- peaks --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "k", "block"), [(1, 1, 1), (0, 8, 4), (7, 96, 32), (33, 64, 64),
                                               (50, 66, 11)])
def test_peaks_equal_the_twins(n, k, block):
    rng = np.random.default_rng([n, k])
    w = rng.standard_normal((n, k)).astype(np.float32)
    w[: n // 2] = np.round(w[: n // 2])  # equal magnitudes: the first has the peak
    scale = np.exp(rng.standard_normal(k)).round(1).astype(np.float32)
    found = _C.block_peaks(w, scale, block)
    np.testing.assert_allclose(found, reference.block_peaks(w, scale, block), rtol=1e-12)
    assert found.dtype == np.float64


def test_peaks_do_not_depend_on_threads():
    w = np.random.default_rng(0).standard_normal((50, 960)).astype(np.float32)
    found = []
    for threads in (1, 2, 3):
        _C.set_num_threads(threads)
        found.append(_C.block_peaks(w, np.ones(960, np.float32), 32).tobytes())
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_peaks_reject_nonfinite(bad):
    for weight, scale in ((np.full((2, 4), bad), np.ones(4)), (np.ones((2, 4)), np.full(4, bad))):
        with pytest.raises(ValueError, match="weight or scale: NaN or Inf found"):
            _C.block_peaks(weight, scale, 2)


@pytest.mark.parametrize(("scale", "block", "message"), [
    (np.ones(3), 2, r"scale: expected .* 4, got .*3"),
    (np.ones(4), 3, "block: expected a divisor of k = 4, got 3"),
    (np.ones(4), 0, "block: expected a divisor of k = 4, got 0")])
def test_peaks_refuse_other_shapes(scale, block, message):
    with pytest.raises(ValueError, match=message):
        _C.block_peaks(np.ones((2, 4)), scale, block)


# ---- the balance --------------------------------------------------------------------------------


def q4_0(weights):
    """Rounded as llama.cpp's Q4_0: the value of largest magnitude in 32 becomes code -8."""
    blocks = weights.astype(np.float64).reshape(-1, BLOCK)
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=1)[:, None], axis=1)
    step = np.where(largest == 0, 1, largest / -8)
    return (np.clip(np.floor(blocks / step + 0.5), -8, 7) * step).reshape(weights.shape)


def output_error(weights, inputs, balance):
    """Sum of squares of what rounding the balanced weights does to the outputs."""
    return float(np.square((q4_0(weights * balance) / balance - weights) @ inputs.T).sum())


def uneven(seed, k=96, m=300, n=200):
    """Inputs and weights whose channels differ by much, independently of each other."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((m, k)) * np.exp(rng.normal(0, 1.5, k))
    return x.astype(np.float32), (rng.standard_normal((n, k)) * np.exp(
        rng.normal(0, 0.5, k))).astype(np.float32)


@pytest.mark.parametrize("seed", range(3))
def test_balance_lowers_the_error_of_blocks(seed):
    x, w = uneven(seed)
    balance = block_balance(site_statistics(x, [w[:50], w[50:]]))
    assert output_error(w, x, balance) < 0.5 * output_error(w, x, np.ones(96))
    means = np.log(balance).reshape(-1, BLOCK).mean(axis=1)
    np.testing.assert_allclose(means, 0, atol=1e-9)


def test_each_input_ends_with_the_same_share_in_both_sums():
    x, w = uneven(0, n=500)
    balance = block_balance(site_statistics(x, [w])).astype(np.float32)
    peaks = reference.block_peaks(w, balance, BLOCK).reshape(-1, BLOCK)
    noise = (np.mean(x.astype(float) ** 2, axis=0) / balance**2).reshape(-1, BLOCK)
    apart = peaks / peaks.sum(axis=1, keepdims=True) - noise / noise.sum(axis=1, keepdims=True)
    assert np.abs(apart).max() < 0.05


def test_dead_inputs_and_rows_of_zeros_leave_a_finite_balance():
    x, w = uneven(0)
    x[:, :40], w[:, 32:64] = 0, 0
    balance = block_balance(site_statistics(x, [w]))
    assert np.isfinite(balance).all()
    assert (balance > 0).all()


def test_queries_of_a_value_head_share_their_factors():
    x, w = uneven(0, k=128)
    balance = block_balance(site_statistics(x, [w], shared=(2, 2, 32), reads="attention"))
    heads = balance.reshape(2, 2, 32)
    np.testing.assert_array_equal(heads[:, 0], heads[:, 1])
    assert output_error(w, x, balance) < 0.8 * output_error(w, x, np.ones(128))


def test_inputs_that_are_no_whole_blocks_have_no_balance():
    x, w = uneven(0, k=80)
    assert block_balance(site_statistics(x, [w])) is None


# ---- the export ---------------------------------------------------------------------------------


@pytest.fixture
def golden(request, tmp_path):
    """A family's folder with a tokenizer."""
    return copy_golden(request.param, tmp_path)


@pytest.mark.parametrize("golden", GOLDEN, indirect=True)
def test_balanced_family_computes_the_same(golden, tmp_path):
    text, tokens = tmp_path / "text", np.load(golden / "tokens.npy")[None]
    text.write_text(SENTENCES)
    out = sq.export(golden, "rotated-hf", tmp_path / "out", dtype="float32", calibration=text)
    np.testing.assert_allclose(logits(out, tokens), logits(golden, tokens), atol=TOLERANCE, rtol=0)
    found, own = load_checkpoint(out), load_checkpoint(golden)
    assert [shape for _, shape in found.spec.tensors()] == [s for _, s in own.spec.tensors()]
    np.testing.assert_array_equal(found.embedding, _C.to_float32(own.embedding))


def test_norms_and_rows_take_what_the_columns_lose(model, tmp_path):
    out = sq.export(model, "rotated-hf", tmp_path / "out", dtype="float32")
    found, own = load_checkpoint(out), load_checkpoint(model)
    assert tensors(out).keys() == {name for name, _ in own.spec.tensors()}
    for i in range(own.spec.layers):
        ours, theirs = found.layer(i), own.layer(i)
        norm = (_C.to_float32(theirs.norms["before_mlp"].weight)
                / ours.norms["before_mlp"].weight)
        assert norm.max() > 1.01
        for role in ("gate", "up"):
            expected = _C.to_float32(theirs.linears[role].weight) * norm
            rows = np.linalg.norm(ours.linears[role].weight, axis=1)
            ratio = rows / np.linalg.norm(expected, axis=1)
            if role == "gate":
                np.testing.assert_allclose(ratio, 1, rtol=1e-5)
            else:
                assert ratio.max() > 1.01


def test_packed_folder_is_balanced(model, tmp_path):
    packed = quantized(model, tmp_path / "packed")
    out = sq.export(packed, "rotated-hf", tmp_path / "out", dtype="float32")
    tokens = zoo.random_tokens(40)[None]
    np.testing.assert_allclose(logits(out, tokens), logits(packed, tokens), atol=TOLERANCE, rtol=0)


def test_text_and_seed_choose_the_balance(model, tmp_path):
    text = tmp_path / "text"
    text.write_text(SENTENCES)
    given = {"a": {}, "b": {}, "c": {"seed": 1}, "d": {"calibration": text}}
    found = {name: load_checkpoint(sq.export(model, "rotated-hf", tmp_path / name, **options))
             .fingerprint for name, options in given.items()}
    assert found["a"] == found["b"]
    assert len(set(found.values())) == 3


def rounded(folder):
    """The folder with all its linears rounded in place, as llama.cpp's Q4_0 has them."""
    for path in folder.glob("*.safetensors"):
        stored = load_file(path)
        save_file({name: q4_0(array).astype(np.float32) if "_proj" in name else array
                   for name, array in stored.items()}, path)
    return folder


def test_blocks_of_the_bundled_model_are_closer_to_it(tmp_path):
    model = sq.bundled_model()
    tokens = load_checkpoint(model).encode(sq.bundled_text("heldout"))[: 8 * 256]
    kl = {}
    for to in ("hf", "rotated-hf"):
        folder = rounded(sq.export(model, to, tmp_path / to, dtype="float32"))
        kl[to] = sq.perplexity(sq.load(folder), tokens, 256, sq.load(model)).kl_mean
    assert kl["rotated-hf"] < 0.9 * kl["hf"]


@pytest.mark.parametrize(("options", "message"), [
    (["--to", "hf", "--fuse", "balance"], "--fuse: needs --to rotated-hf, found hf"),
    (["--to", "gguf", "--calibration", "T"], "--calibration: needs --to rotated-hf"),
    (["--to", "rotated-hf", "--fuse", "rotation", "--calibration", "T"],
     "--calibration: needs --to rotated-hf with --fuse balance"),
    (["--to", "rotated-hf", "--calibration", "no-such-file"], "no-such-file")])
def test_options_of_the_command_are_refused_by_name(options, message, model, tmp_path, capsys):
    assert message in failing(capsys, "export", model, "--output", tmp_path / "out", *options)
    assert not list(tmp_path.glob("out*"))


def test_command_fuses_a_rotation_when_it_is_asked(model, tmp_path, capsys):
    for fuse in ("balance", "rotation"):
        assert main(["export", str(model), "--to", "rotated-hf", "--fuse", fuse, "--output",
                     str(tmp_path / fuse)]) == 0
    capsys.readouterr()
    assert load_checkpoint(tmp_path / "balance").spec.tied
    assert not load_checkpoint(tmp_path / "rotation").spec.tied
    with pytest.raises(ValueError, match="fuse: expected one of balance, rotation, found 'all'"):
        sq.export(model, "rotated-hf", tmp_path / "other", fuse="all")


