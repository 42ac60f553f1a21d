"""Calibration: windows, recorded statistics, thread counts, saved statistics."""

import json

import numpy as np
import pytest
from blocks import SITES
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import singlequant as sq
from singlequant.sweep import stream
from singlequant.sweep.calibrate import FACTS
from singlequant.sweep.texts import choose_windows


@pytest.fixture
def checkpoint(make_checkpoint, tmp_path):
    return sq.load_checkpoint(make_checkpoint(tmp_path / "model"))


@pytest.fixture
def windows():
    return np.random.default_rng(0).integers(0, 320, (3, 16))


def assert_same(a, b):
    for name in SITES:
        for field in ("k1", "k2", "count", "min", "max", "sum2", "sample", "weights", "weight_max",
                      "weight_sum2", "shared", "reads", "foldable", "borrowed"):
            np.testing.assert_array_equal(
                getattr(a.sites[name], field), getattr(b.sites[name], field), err_msg=field
            )


def test_choose_windows_takes_the_first_ones():
    windows = choose_windows(range(100), count=32, window=16)
    np.testing.assert_array_equal(windows, np.arange(32).reshape(2, 16))


def test_choose_windows_draws_by_seed():
    draw = [choose_windows(range(1000), 64, 16, seed=s) for s in (0, 1, 1, 2)]
    np.testing.assert_array_equal(draw[1], draw[2])
    assert not np.array_equal(draw[0], draw[1])
    assert not np.array_equal(draw[1], draw[3])
    assert len(np.unique(draw[1][:, 0])) == 4


def test_choose_windows_of_a_short_text_are_those_it_has():
    assert choose_windows(range(40), count=2048, window=16).shape == (2, 16)


def test_choose_windows_shorter_than_a_window_are_refused():
    with pytest.raises(ValueError, match="at least one window of 512 tokens, got 40"):
        choose_windows(range(40), count=2048)


def test_choose_windows_of_no_token_are_refused():
    with pytest.raises(ValueError, match="window: expected at least 1 token, got 0"):
        choose_windows(range(40), count=32, window=0)


def test_calibrate_yields_moments_of_what_enters_each_site(checkpoint, windows):
    layers = list(sq.calibrate(checkpoint, windows))
    assert [layer.index for layer in layers] == [0, 1]
    hidden = checkpoint.embedding[windows.reshape(-1)].astype(np.float64)
    norm = checkpoint.layer(0).norms["before_attention"].weight.astype(np.float64)
    x = hidden / np.sqrt((hidden**2).mean(1, keepdims=True) + 1e-5) * norm
    site = layers[0].sites["qkv"]
    assert site.count == windows.size
    np.testing.assert_allclose(site.sum2, (x**2).sum(0), rtol=1e-4)
    np.testing.assert_allclose(site.max, x.max(0), rtol=1e-5)
    assert repr(site) == "SiteStatistics(8x8, 48 tokens, 48 kept, 128 weight rows)"


def test_calibrate_takes_moments_of_the_weights_and_shares_the_value_heads(checkpoint, windows):
    for layer in sq.calibrate(checkpoint, windows):
        linears = checkpoint.layer(layer.index).linears
        for name, spec in checkpoint.spec.layer(0).sites.items():
            w = np.concatenate([linears[role].weight for role in spec.roles]).astype(np.float64)
            site = layer.sites[name]
            np.testing.assert_array_equal(site.weight_max, np.abs(w).max(0))
            np.testing.assert_allclose(site.weight_sum2, (w**2).sum(0), rtol=1e-12)
            assert site.shared == ((2, 2, 16) if name == "o" else (1, 1, w.shape[1]))


def test_calibrate_gives_the_same_bytes_at_any_thread_count(checkpoint, windows):
    sq.set_num_threads(1)
    one = list(sq.calibrate(checkpoint, windows))
    sq.set_num_threads(3)
    three = list(sq.calibrate(checkpoint, windows))
    for a, b in zip(one, three, strict=True):
        assert_same(a, b)


def test_calibrate_in_8_bits_is_near_the_model_itself(checkpoint, windows):
    exact = list(sq.calibrate(checkpoint, windows))
    layers = list(sq.calibrate(checkpoint, windows, bits=8))
    np.testing.assert_array_equal(layers[0].sites["qkv"].inputs, exact[0].sites["qkv"].inputs)
    for a, b in zip(layers, exact, strict=True):
        for name, site in a.sites.items():
            x, y = site.inputs.astype(np.float64), b.sites[name].inputs.astype(np.float64)
            error = np.linalg.norm(x - y) / np.linalg.norm(y)
            assert error < 0.03
            assert error > 0 or (a.index, name) == (0, "qkv")


@pytest.mark.parametrize(("module", "limit"), [(stream, "BYTES_MAX"),
                                               (stream._C, "PACKED_K_MAX_W8")])
def test_calibrate_in_8_bits_reads_a_layer_that_is_too_large_as_it_is(
    checkpoint, windows, module, limit, monkeypatch
):
    exact = list(sq.calibrate(checkpoint, windows))
    monkeypatch.setattr(module, limit, 64)
    for a, b in zip(sq.calibrate(checkpoint, windows, bits=8), exact, strict=True):
        assert_same(a, b)


def test_calibrate_refuses_other_bits_of_the_stream(checkpoint, windows):
    with pytest.raises(ValueError, match="bits: expected one of 8, 32, got 16"):
        sq.calibrate(checkpoint, windows, bits=16)


def test_calibrate_keeps_an_evenly_spaced_sample(checkpoint, windows):
    everything = next(sq.calibrate(checkpoint, windows))
    some = next(sq.calibrate(checkpoint, windows, sample_tokens=10))
    np.testing.assert_array_equal(
        some.sites["down"].sample, everything.sites["down"].sample[::5]
    )


def test_calibrate_reports_progress_and_can_be_cancelled(checkpoint, windows):
    seen = []

    def stop(done, total):
        seen.append((done, total))
        raise InterruptedError

    with pytest.raises(InterruptedError):
        list(sq.calibrate(checkpoint, windows, progress=stop))
    assert seen == [(1, 2)]


@pytest.mark.parametrize("skip", [{0}, {1}, {0, 1}, set()])
def test_calibrate_passes_through_skipped_layers(checkpoint, windows, skip):
    seen = []
    whole = list(sq.calibrate(checkpoint, windows))
    some = list(sq.calibrate(checkpoint, windows, skip=skip,
                             progress=lambda *done: seen.append(done)))
    assert [layer.index for layer in some] == sorted({0, 1} - skip)
    for layer in some:
        assert_same(layer, whole[layer.index])
    assert seen == [(1, 2), (2, 2)]


def test_calibrate_refuses_a_packed_checkpoint_at_once(model, tmp_path, text, windows):
    sq.quantize_folder(model, tmp_path / "out", sq.QuantConfig(calibration_tokens=64), text)
    with pytest.raises(ValueError, match=r"checkpoint: expected an unquantized model, .*/out\)"):
        sq.calibrate(sq.load_checkpoint(tmp_path / "out"), windows)


@pytest.mark.parametrize("name", ["input_layernorm.weight", "self_attn.q_proj.weight",
                                  "self_attn.v_proj.bias", "mlp.up_proj.weight",
                                  "mlp.down_proj.weight"])
@pytest.mark.parametrize("bits", [8, 32])
def test_calibrate_names_the_tensor_that_is_not_finite(
    make_checkpoint, tmp_path, windows, name, bits
):
    path = make_checkpoint(tmp_path / "bad", bias=True)
    name = f"model.layers.0.{name}"
    tensors = load_file(path / "model.safetensors")
    tensors[name].reshape(-1)[3] = np.nan
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(ValueError, match=rf"^{name}, rows 0 to"):
        list(sq.calibrate(sq.load_checkpoint(path), windows, bits=bits))


def test_calibrate_refuses_tokens_outside_the_vocabulary(checkpoint):
    with pytest.raises(ValueError, match="320"):
        next(sq.calibrate(checkpoint, np.array([[1, 2, 320]])))


def test_statistics_survive_saving(checkpoint, windows, tmp_path):
    sq.save_statistics(sq.calibrate(checkpoint, windows), tmp_path / "statistics")
    again = list(sq.load_statistics(tmp_path / "statistics"))
    for a, b in zip(sq.calibrate(checkpoint, windows), again, strict=True):
        assert_same(a, b)
    a = next(sq.solve_rotations(sq.calibrate(checkpoint, windows)))
    b = next(sq.solve_rotations(again))
    for name in SITES:
        np.testing.assert_array_equal(a.sites[name].left.angles, b.sites[name].left.angles)


def test_statistics_folder_without_its_header_is_refused(tmp_path):
    with pytest.raises(sq.FormatError, match=r"statistics\.json"):
        list(sq.load_statistics(tmp_path))


@pytest.fixture
def saved(checkpoint, windows, tmp_path):
    sq.save_statistics(sq.calibrate(checkpoint, windows), tmp_path / "saved")
    return tmp_path / "saved"


@pytest.mark.parametrize(("header", "message"), [
    ("[]", "expected a JSON object, found list"),
    ("{", "expected a JSON object"),
    ({"format_version": 1, "layers": 2}, "format_version: expected 5, found 1"),
    ({"format_version": 6, "layers": 2}, "format_version: expected 5, found 6"),
    ({"format_version": 5.0, "layers": 2}, "format_version: expected 5, found 5.0"),
    ({"format_version": 5}, "layers: expected an integer from 0, found None"),
    ({"format_version": 5, "layers": -1}, "layers: expected an integer from 0, found -1"),
    ({"format_version": 5, "layers": "2"}, "layers: expected an integer from 0, found '2'"),
    ({"format_version": 5, "layers": True}, "layers: expected an integer from 0, found True"),
])
def test_statistics_header_that_lies_is_refused(saved, header, message):
    text = header if isinstance(header, str) else json.dumps(header)
    (saved / "statistics.json").write_text(text)
    with pytest.raises(sq.FormatError, match=rf"statistics\.json: {message}"):
        list(sq.load_statistics(saved))


@pytest.mark.parametrize(("entry", "value", "message"), [
    ("qkv.count", "many", "qkv.count: expected an integer from 0, found 'many'"),
    ("qkv.count", -3, "qkv.count: expected an integer from 0, found -3"),
    ("qkv.k1", True, "qkv.k1: expected an integer from 1, found True"),
    ("qkv.k2", 0, "qkv.k2: expected an integer from 1, found 0"),
    ("o.reads", "norm", "o: expected reads among residual, latent, attention, mlp.* found 'norm'"),
    ("o.foldable", 1, "o: expected .* true or false, found 'attention' and .1, "),
    ("qkv.count", None, "expected qkv.count, found no such entry"),
    ("o.min", None, "expected o.min, found no such entry"),
    ("o.min", np.zeros(3), r"o.min: expected float64 \(64,\), found float64 \(3,\)"),
    ("o.sample", np.zeros((2, 64)), r"o.sample: expected float32 \(2, 64\), found float64"),
    ("o.max", np.array(1.0), r"o.max: expected float64 \(64,\), found float64 \(\)"),
    ("o.weight_max", None, "expected o.weight_max, found no such entry"),
    ("o.weight_max", np.zeros(63), r"o.weight_max: expected float64 \(64,\), found float64"),
    ("o.weight_sum2", np.zeros(64, np.float32), r"o.weight_sum2: expected .* found float32"),
    ("o.gram", None, "expected o.gram, found no such entry"),
    ("o.gram", np.zeros((8, 8, 8)), r"o.weight_gram: expected float64 \(8, 8, 8\)"),
    ("o.weight_gram", np.zeros((4, 16, 8)), r"o.weight_gram: expected float64 \(4, 16, 16\)"),
    ("o.shared", None, "expected o.shared, found no such entry"),
    ("o.shared", [2, 2], r"o.shared: expected 3 factors of 64, found \[2, 2\]"),
    ("o.shared", [2, 2, 15], r"o.shared: expected 3 factors of 64, found \[2, 2, 15\]"),
    ("o.shared", [-2, -2, 16], "o.shared: expected 3 factors of 64"),
    ("o.shared", [2.0, 2, 16], "o.shared: expected 3 factors of 64"),
    ("o.shared", [True, 4, 16], "o.shared: expected 3 factors of 64"),
    ("o.shared", 64, "o.shared: expected 3 factors of 64, found 64"),
])
def test_statistics_of_a_layer_that_lie_are_refused(saved, entry, value, message):
    path = saved / "layer-00001.safetensors"
    tensors = load_file(path)
    with safe_open(path, "np") as file:
        sites = json.loads(file.metadata()["sites"])
    site, name = entry.split(".")
    target, key = (sites[site], name) if name in FACTS else (tensors, entry)
    target[key] = value
    if value is None:
        del target[key]
    save_file(tensors, path, {"sites": json.dumps(sites)})
    with pytest.raises(sq.FormatError, match=rf"layer-00001\.safetensors: {message}"):
        list(sq.load_statistics(saved))


@pytest.mark.parametrize(("text", "message"), [
    ("[]", r"sites: expected facts of each site, found \[\]"),
    ('{"qkv": 3}', "sites: expected facts of each site"),
    ('{"v": {}}', "expected v.min, found no such entry"),
    ("{", "Expecting property name"),
    ("[" * 100_000, "recursion"),
    (None, "expected sites, found no such entry"),
])
def test_facts_of_a_layer_that_are_none_are_refused(saved, text, message):
    path = saved / "layer-00001.safetensors"
    save_file(load_file(path), path, {} if text is None else {"sites": text})
    with pytest.raises(sq.FormatError, match=rf"layer-00001\.safetensors: .*{message}"):
        list(sq.load_statistics(saved))


def test_statistics_never_overwrite(saved, checkpoint, windows):
    before = {file.name: file.read_bytes() for file in saved.iterdir()}
    with pytest.raises(FileExistsError, match="saved already exists"):
        sq.save_statistics(sq.calibrate(checkpoint, windows[:1]), saved)
    assert before == {file.name: file.read_bytes() for file in saved.iterdir()}


def test_statistics_that_end_early_leave_nothing(checkpoint, windows, tmp_path):
    def stop(done, total):
        raise KeyboardInterrupt

    before = set(tmp_path.iterdir())
    with pytest.raises(KeyboardInterrupt):
        sq.save_statistics(sq.calibrate(checkpoint, windows, progress=stop), tmp_path / "new")
    assert set(tmp_path.iterdir()) == before
