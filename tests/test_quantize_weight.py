"""Weights in one pass, pages of files brought into memory, linears and layers."""

import ctypes
import mmap
import os
import time

import ml_dtypes
import numpy as np
import pytest
from test_kernels import Guarded

from singlequant import _C, QuantConfig, _reference as reference, load_checkpoint
from singlequant.export.writer import ModelWriter
from singlequant.methods.solve import solve_layer
from singlequant.rotations import BlockRotation, Factor, SiteRotation
from singlequant.rows import ROWS_PER_BLOCK
from singlequant.sweep.calibrate import calibrate
from singlequant.sweep.layer import GptqFactor, quantize_layer, quantize_linear, transform_rows
from singlequant.sweep.run import quantize_folder
from singlequant.sweep.stream import read_ahead
from singlequant.sweep.texts import calibration_windows

DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16]


def rotation_of(kind, k, seed=0):
    """None, factors, a chain beside a factor, or blocks, for k inputs."""
    rng = np.random.default_rng([seed, k])
    k1, k2 = _C.factor_sizes(k)

    def matrix(n):
        return np.linalg.qr(rng.standard_normal((n, n)))[0].astype(np.float32)

    if kind == "none":
        return None
    if kind == "dense":
        return _C.Rotation(k, matrix(k1), matrix(k2))
    if kind == "chain":
        order = np.arange(k, dtype=np.int32)
        pairs = np.stack([order[:-1], order[1:]], 1).reshape(-1, 2)
        return _C.Rotation(k, (k, True, pairs, rng.uniform(-3, 3, len(pairs))))
    b = next(b for b in (16, 9, 5, 1) if k % b == 0)
    blocks = np.stack([matrix(b) for _ in range(k // b)])
    return _C.Rotation.blocks(blocks, rng.permutation(k), blocks[::-1])


def steps(weight, group, search, rotation, columns, rows):
    """What quantize_weight does, by one array function after the other."""
    x = _C.to_float32(weight, reject=True)
    x = x if columns is None else x * columns
    x = x if rows is None else x * rows[:, None]
    if rotation is not None:
        x = _C.rotate(x, rotation)
    codes, scales, _ = _C.quantize(x, 4, group, True, 1.0, search)
    return x, _C.pack(codes), scales


SHORT = [(1, 1, 0), (1, 96, 32), (3, 45, 0), (5, 45, 9), (70, 64, 0), (9, 131, 0)]
CASES = [(kind, *case) for kind in ("none", "dense", "chain", "blocks") for case in SHORT]
CASES += [("dense", 33, 2048, 64), ("none", 2, 40000, 0), ("dense", 2, 40000, 0)]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: np.dtype(d).name)
@pytest.mark.parametrize(("kind", "n", "k", "group"), CASES)
def test_quantize_weight_equals_its_steps(table, dtype, kind, n, k, group):
    rng = np.random.default_rng([n, k])
    weight = rng.standard_t(4, (n, k)).astype(dtype)
    columns = rng.uniform(0.5, 2, k).astype(np.float32)
    rows = rng.uniform(0.5, 2, n).astype(np.float32)
    rotation = rotation_of(kind, k)
    for search, scales_of in ((False, (None, None)), (True, (columns, rows))):
        x, words, scales = steps(weight, group, search, rotation, *scales_of)
        found = _C.quantize_weight(weight, group, search, rotation, *scales_of)
        np.testing.assert_array_equal(found[0], words)
        np.testing.assert_array_equal(found[1], scales)
        turned = _C.transform_weight(weight, rotation, *scales_of)
        np.testing.assert_array_equal(turned, x)


@pytest.mark.parametrize("kind", ["none", "dense", "blocks"])
def test_quantize_weight_is_close_to_its_twin(kind):
    weight = np.random.default_rng(0).standard_normal((11, 80)).astype(np.float16)
    columns, rotation = np.linspace(0.5, 2, 80, dtype=np.float32), rotation_of(kind, 80)
    words, scales = _C.quantize_weight(weight, 40, True, rotation, columns)
    twin_words, twin_scales = reference.quantize_weight(weight, 40, True, rotation, columns)
    np.testing.assert_allclose(scales, twin_scales, rtol=0.03)  # a tie may fall to a neighbour
    codes, twin_codes = _C.unpack(words, 80), reference.unpack(twin_words, 80)
    assert np.mean(codes != twin_codes) < 0.01
    turned = _C.transform_weight(weight, rotation, columns)
    twin = reference.transform_weight(weight, rotation, columns)
    np.testing.assert_allclose(turned, twin, atol=2e-6 * np.abs(twin).max() * 9)


@pytest.mark.parametrize("n", [1, 2, 37, 300])
def test_quantize_weight_does_not_depend_on_threads(n):
    weight = np.random.default_rng(n).standard_normal((n, 516)).astype(np.float16)
    rotation, results = rotation_of("dense", 516), []
    for threads in (1, 2, 3, 7):
        _C.set_num_threads(threads)
        results.append(_C.quantize_weight(weight, 0, True, rotation))
    for found in results[1:]:
        np.testing.assert_array_equal(found[0], results[0][0])
        np.testing.assert_array_equal(found[1], results[0][1])


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: np.dtype(d).name)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_quantize_weight_names_the_first_bad_row(table, dtype, bad):
    weight = np.ones((900, 130), dtype)
    weight[[333, 612, 899], [129, 0, 64]] = bad
    for threads in (1, 4):
        _C.set_num_threads(threads)
        for call in (_C.quantize_weight, _C.transform_weight):
            with pytest.raises(ValueError, match="^weight, row 333: NaN or Inf found$"):
                call(weight)


def test_quantize_weight_names_a_row_that_overflows():
    weight = np.full((4, 64), 1e38, np.float32)
    weight[:2] = 1
    columns, rotation = np.full(64, 2, np.float32), rotation_of("dense", 64)
    for call in (_C.quantize_weight, _C.transform_weight):
        with pytest.raises(ValueError, match="^weight, row 2: NaN or Inf found$"):
            call(weight, rotation=rotation, columns=columns * 1e3)


def test_quantize_weight_error_texts():
    weight = np.ones((3, 6), np.float32)
    with pytest.raises(TypeError, match="weight: expected float32, float16 or bfloat16, got"):
        _C.quantize_weight(weight.astype(np.float64))
    with pytest.raises(ValueError, match="weight: expected 2 dimensions, got 1"):
        _C.quantize_weight(weight[0])
    with pytest.raises(ValueError, match="weight: expected k >= 1, got 0"):
        _C.transform_weight(weight[:, :0])
    with pytest.raises(ValueError, match="group: expected 0 or a divisor of k = 6, got 4"):
        _C.quantize_weight(weight, 4)
    with pytest.raises(ValueError, match=r"columns: expected shape\[0\] = 6, got 5"):
        _C.quantize_weight(weight, columns=np.ones(5))
    with pytest.raises(ValueError, match=r"rows: expected shape\[0\] = 3, got 6"):
        _C.transform_weight(weight, rows=np.ones(6))
    with pytest.raises(ValueError, match="rotation: expected one of k = 6 inputs, got 8"):
        _C.quantize_weight(weight, rotation=_C.Rotation(8))
    for other in (np.eye(3), (np.eye(3), np.eye(2))):
        with pytest.raises(TypeError, match="rotation: expected a Rotation or None, got"):
            _C.quantize_weight(weight, rotation=other)
    with pytest.raises(TypeError, match="array: expected a contiguous array"):
        _C.will_need(weight[:, ::2])


def test_quantize_weight_takes_strides_empty_weights_and_leaves_its_input_alone():
    weight = np.random.default_rng(3).standard_normal((8, 40)).astype(np.float16)
    weight.flags.writeable = False
    copy = weight.copy()
    words, scales = _C.quantize_weight(weight[::2, ::2], 0, True, rotation_of("dense", 20))
    expected = _C.quantize_weight(copy[::2, ::2].copy(), 0, True, rotation_of("dense", 20))
    np.testing.assert_array_equal(words, expected[0])
    np.testing.assert_array_equal(weight, copy)
    assert _C.quantize_weight(weight[:0])[0].shape == (0, 5)
    assert scales.shape == (4, 1)


def resident(mapped):
    """Page by page, whether a mapping is in memory, as mincore tells."""
    found = np.zeros(-(-mapped.nbytes // mmap.PAGESIZE), np.uint8)
    status = ctypes.CDLL(None).mincore(ctypes.c_void_p(mapped.ctypes.data),
                                       ctypes.c_size_t(mapped.nbytes),
                                       ctypes.c_void_p(found.ctypes.data))
    assert status == 0
    return found & 1 == 1


def test_will_need_brings_a_files_pages_into_memory(tmp_path):
    path = tmp_path / "weights"
    np.arange(1_000_000, dtype=np.float32).tofile(path)
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    mapped = np.memmap(path, np.float32, "r")
    if resident(mapped).any():
        pytest.skip("needs a file system that drops a file's pages")
    assert _C.will_need(mapped[3:500_001]) is None
    end, last = time.monotonic() + 10, 500_000 * 4 // mmap.PAGESIZE
    while not resident(mapped)[: last + 1].all() and time.monotonic() < end:
        time.sleep(0.01)  # the system reads on its own
    assert resident(mapped)[: last + 1].all()
    np.testing.assert_array_equal(mapped, np.arange(1_000_000, dtype=np.float32))


def test_will_need_ignores_other_memory():
    assert _C.will_need(np.ones(5)) is None
    assert _C.will_need(np.ones(0)) is None


@pytest.mark.parametrize("at_end", [True, False], ids=["end", "start"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: np.dtype(d).name)
def test_quantize_weight_stays_inside_its_arrays(table, dtype, at_end):
    pages = Guarded()
    for n, k in ((1, 1), (2, 7), (3, 17), (5, 36), (4, 129)):
        weight = np.random.default_rng(k).standard_normal((n, k)).astype(dtype)
        columns, rows = np.full(k, 1.5, np.float32), np.full(n, 0.5, np.float32)
        rotation = rotation_of("dense", k)
        expected = _C.quantize_weight(weight, 0, True, rotation, columns, rows)
        place = [pages.place(a, at_end) for a in (weight, columns, rows)]
        found = _C.quantize_weight(place[0], 0, True, rotation, *place[1:])
        np.testing.assert_array_equal(found[0], expected[0])


# ---- linears and layers -------------------------------------------------------------------------


def identity_factor(k):
    return GptqFactor(np.eye(k, dtype=np.float32), np.arange(k, dtype=np.int32)[::-1].copy())


def rotations_of(k):
    rng = np.random.default_rng(k)
    k1, k2 = _C.factor_sizes(k)
    pairs = np.array([[0, 1]], np.int32)
    left, right = (Factor(n, True, pairs if n > 1 else pairs[:0], [0.3] if n > 1 else [])
                   for n in (k1, k2))
    balance = rng.uniform(0.5, 2, k).astype(np.float32)
    eye = np.stack([np.eye(1, dtype=np.float32)] * k)
    blocks = BlockRotation(eye, rng.permutation(k).astype(np.int32), -eye, balance)
    return [None, SiteRotation(left, right), SiteRotation(left, right, balance=balance), blocks,
            SiteRotation(Factor.identity(k1), Factor.identity(k2), balance=balance)]


@pytest.mark.parametrize("weights", ["rtn", "mse", "gptq"])
@pytest.mark.parametrize("index", range(5))
def test_quantize_linear_rounds_the_transformed_rows(weights, index):
    """Also over more rows than GPTQ takes at once; without correlations it rounds to nearest."""
    n, k = ROWS_PER_BLOCK + 3, 24
    rng = np.random.default_rng(index)
    weight = rng.standard_normal((n, k)).astype(np.float16)
    scale = rng.uniform(0.5, 2, n).astype(np.float32)
    rotation = rotations_of(k)[index]
    gptq = identity_factor(k) if weights == "gptq" else None
    packed = quantize_linear(weight, rotation, QuantConfig(weights=weights), "w", gptq, scale)
    rows = transform_rows(_C.to_float32(weight), rotation, scale)
    codes, scales, _ = _C.quantize(rows, search=weights != "rtn")
    np.testing.assert_array_equal(packed.words, _C.pack(codes))
    np.testing.assert_array_equal(packed.scales, scales)


@pytest.mark.parametrize("weights", ["rtn", "mse", "gptq"])
def test_quantize_linear_names_the_tensor_and_rows_that_are_not_finite(weights):
    weight, config = np.ones((ROWS_PER_BLOCK + 40, 32), np.float16), QuantConfig(weights=weights)
    weight[ROWS_PER_BLOCK + 8, 31] = np.nan
    gptq = identity_factor(32) if weights == "gptq" else None
    last = len(weight) - 1
    with pytest.raises(ValueError, match=f"^a.weight, rows {ROWS_PER_BLOCK} to {last}: x: NaN"):
        quantize_linear(weight, None, config, "a.weight", gptq)
    huge = SiteRotation(Factor.identity(4), Factor.identity(8),
                        balance=np.full(32, 3e38, np.float32))
    with pytest.raises(ValueError, match="^a.weight: weight, row 0: NaN or Inf found"):
        quantize_linear(np.full((3, 32), 9, np.float16), huge, config, "a.weight", gptq)


@pytest.mark.parametrize("weights", ["mse", "gptq"])
def test_a_layer_that_is_not_finite_gives_no_folder(model, tmp_path, text, weights):
    config = QuantConfig(weights=weights, calibration_tokens=64)
    checkpoint = load_checkpoint(model)
    windows = calibration_windows(checkpoint, config, text)
    layers = [solve_layer(s, config) for s in calibrate(checkpoint, windows)]
    info = checkpoint.tensors["model.layers.1.mlp.down_proj.weight"]
    before = info.path.stat()
    with info.path.open("r+b") as file:  # what was finite when it was calibrated is so no longer
        file.seek(info.begin + info.nbytes - 2)
        file.write(b"\xff\x7f")
    os.utime(info.path, ns=(before.st_atime_ns, before.st_mtime_ns))  # or the change is refused

    def write(resumable: bool) -> None:
        with ModelWriter(tmp_path / "out", checkpoint, config, resumable=resumable) as writer:
            for layer in layers:
                writer.write_layer(quantize_layer(checkpoint, layer, config))

    def left() -> list[str]:
        return [path.name for path in tmp_path.iterdir() if path.name.startswith("out")]

    message = "^model.layers.1.mlp.down_proj, rows 0 to .*NaN or Inf"
    with pytest.raises(ValueError, match=message):
        write(resumable=False)
    assert left() == []
    # the source may be mended, and a run with resume go on
    with pytest.raises(ValueError, match=f"{message}.*1 finished layer is in .*out.partial"):
        write(resumable=True)
    assert left() == ["out.partial"]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_a_sweep_gives_the_same_bytes_on_any_number_of_threads(
    make_checkpoint, tmp_path, text, dtype
):
    folder = make_checkpoint(tmp_path / "model", dtype=dtype)
    config, found = QuantConfig(weights="mse", calibration_tokens=64), []
    for threads in (1, 3):
        _C.set_num_threads(threads)
        quantize_folder(folder, tmp_path / f"out{threads}", config, text)
        shards = sorted((tmp_path / f"out{threads}").glob("*.safetensors"))
        found.append([shard.read_bytes() for shard in shards])
    assert found[0] == found[1]


def test_read_ahead_asks_for_one_layer_and_stops_behind_the_last(model, monkeypatch):
    checkpoint, asked = load_checkpoint(model), []
    monkeypatch.setattr(_C, "will_need", lambda array: asked.append(array.shape))
    thread = read_ahead(checkpoint, 1)
    thread.join()
    assert sorted(asked) == sorted(v.weight.shape for v in checkpoint.layer(1).linears.values())
    assert read_ahead(checkpoint, checkpoint.spec.layers) is None
