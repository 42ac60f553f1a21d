"""DuQuant against its definition: random steps, greedy blocks, zigzag, file and runtime."""

import threading
import time

import format_reader
import numpy as np
import pytest
from conftest import random_layer
from packed_folders import edit_tensors

import singlequant as sq
from singlequant import _C, _reference
from singlequant._C import FormatError
from singlequant.checkpoint.folder import load_checkpoint
from singlequant.config import QuantConfig
from singlequant.export.writer import ModelWriter, estimate_size
from singlequant.methods.axes import Site
from singlequant.methods.duquant import block_size, build
from singlequant.rotations import BlockRotation
from singlequant.rows import rotate_rows
from singlequant.runtime.layers import layer_blocks
from singlequant.sweep.calibrate import site_statistics
from singlequant.weights import QuantizedLayer

PREFIX = "model.layers.0.rotations.qkv"


def outlier_inputs(rows: int, k: int, seed: int = 0) -> np.ndarray:
    """Gaussian tokens, one channel in 16 of them large, with one massive value."""
    x = np.random.default_rng(seed).standard_normal((rows, k)).astype(np.float32)
    x[:, :: min(16, k)] *= 12
    x[rows // 2, k // 3] = 300
    return x


def orthogonality(blocks: np.ndarray) -> float:
    m = blocks.astype(np.float64)
    return float(np.abs(m @ m.swapaxes(-1, -2) - np.eye(m.shape[-1])).max())


def block_peaks(x: np.ndarray, b: int) -> np.ndarray:
    return np.abs(x).reshape(len(x), -1, b).max(axis=(0, 2))


def random_blocks(k: int, b: int, seed: int = 0) -> BlockRotation:
    return BlockRotation(
        _C.duquant_steps(b, k // b, seed), np.random.default_rng(seed).permutation(k),
        _C.duquant_steps(b, k // b, seed + 1))


# ---- random orthogonal matrices -----------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3, 17, 64])
def test_random_orthogonal_is_its_twin_and_orthogonal(n):
    for seed in (0, 7, 2**64 - 1):
        q = _C.random_orthogonal(n, seed)
        np.testing.assert_allclose(q, _reference.random_orthogonal(n, seed), atol=1e-12)
        assert orthogonality(q) < 1e-13


def test_random_orthogonal_has_the_moments_of_haars_measure():
    q = np.array([_C.random_orthogonal(4, seed) for seed in range(4000)])
    # E q_ij = 0, E q_ij^2 = 1/n, E q_ij^4 = 3 / (n (n + 2)), E q_00 q_11 = 0; 4 standard errors
    np.testing.assert_allclose(q.mean(0), 0, atol=4 * 0.5 / 4000**0.5)
    np.testing.assert_allclose((q**2).mean(0), 0.25, atol=4 * 0.25 / 4000**0.5)
    np.testing.assert_allclose((q**4).mean(0), 0.125, atol=4 * 0.2 / 4000**0.5)
    assert abs((q[:, 0, 0] * q[:, 1, 1]).mean()) < 4 * 0.25 / 4000**0.5
    assert abs(np.linalg.det(q).mean()) < 4 / 4000**0.5  # as many reflections as rotations


@pytest.mark.parametrize("b", [1, 2, 5, 32])
def test_steps_are_their_twin_with_a_flat_first_column(b):
    steps = _C.duquant_steps(b, 3, 5)
    np.testing.assert_allclose(steps, _reference.duquant_steps(b, 3, 5), atol=1e-6)
    assert orthogonality(steps) < 1e-6
    np.testing.assert_allclose(steps[:, :, 0], b**-0.5, rtol=1e-6)
    _C.set_num_threads(3)
    np.testing.assert_array_equal(_C.duquant_steps(b, 3, 5), steps)
    if b > 1:
        assert not np.array_equal(_C.duquant_steps(b, 3, 6), steps)


# ---- greedy blocks ------------------------------------------------------------------------------


@pytest.mark.usefixtures("table")
@pytest.mark.parametrize(("rows", "k", "b", "count"), [
    (1, 8, 8, 5), (9, 24, 8, 6), (33, 64, 32, 12), (20, 21, 7, 9), (5, 3, 1, 2), (0, 8, 4, 3),
    (6, 8, 8, 0),
])
def test_blocks_are_their_twin(rows, k, b, count):
    x, steps = np.float32(outlier_inputs(max(rows, 1), k)[:rows]), _C.duquant_steps(b, count, 1)
    blocks, peaks = _C.duquant_blocks(x, steps)
    twin_blocks, twin_peaks = _reference.duquant_blocks(x, steps)
    # float32 products against float64 ones: a few units in the last place per step
    np.testing.assert_allclose(peaks, twin_peaks, rtol=1e-5)
    np.testing.assert_allclose(blocks, twin_blocks, atol=1e-5)


@pytest.mark.parametrize(("k", "b"), [(256, 128), (96, 32)])
def test_peak_of_every_block_falls_and_what_is_kept_reaches_the_lowest(k, b):
    x = outlier_inputs(200, k)
    blocks, peaks = _C.duquant_blocks(x, _C.duquant_steps(b, 64, 0))
    assert orthogonality(blocks) < 1e-6
    np.testing.assert_array_equal(peaks[:, 0], block_peaks(x, b))
    rotated = _reference.rotate(x, _reference.Rotation.blocks(
        blocks, np.arange(k), np.tile(np.eye(b), (k // b, 1, 1))))
    reached = block_peaks(rotated, b)
    np.testing.assert_allclose(reached, peaks.min(axis=1), rtol=1e-4)
    assert (reached < 0.5 * peaks[:, 0]).all()
    # prefixes of the search: the kept peak never rises with the number of steps allowed
    kept = [_C.duquant_blocks(x, _C.duquant_steps(b, n, 0))[1].min(axis=1) for n in (0, 1, 4, 64)]
    assert all((later <= earlier).all() for earlier, later in zip(kept, kept[1:], strict=False))
    assert (kept[-1] < kept[1]).all()  # the greedy search finds more than its first step


def test_block_that_no_step_improves_stays_the_identity():
    flat = np.ones((1, 16), np.float32)  # any other rotation of it has a larger peak
    blocks, peaks = _C.duquant_blocks(flat, _C.duquant_steps(16, 20, 3))
    np.testing.assert_array_equal(blocks[0], np.eye(16))
    assert (peaks[0, 1:] > peaks[0, 0]).all()


def test_blocks_do_not_depend_on_threads():
    x, steps = outlier_inputs(50, 128), _C.duquant_steps(32, 20, 0)
    _C.set_num_threads(1)
    one = _C.duquant_blocks(x, steps)
    _C.set_num_threads(3)
    for a, b in zip(one, _C.duquant_blocks(x, steps), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(("sample", "steps", "message"), [
    (np.ones((3, 10)), np.ones((2, 4, 4)), r"order that divides k = 10, at most 4096, got 4"),
    (np.ones((3, 4097)), np.empty((0, 4097, 4097)), "k = 4097, at most 4096, got 4097"),
    (np.ones((3, 8)), np.ones((2, 4, 8)), r"steps: expected shape\[2\] = 4, got 8"),
    (np.full((3, 8), np.nan), np.ones((2, 4, 4)), "NaN or Inf"),
    (np.ones((3, 8)), np.full((2, 4, 4), np.inf), "NaN or Inf"),
    (np.ones(8), np.ones((2, 4, 4)), "sample: expected 2 dimensions"),
    (np.ones((3, 0)), np.ones((2, 4, 4)), "divides k = 0"),
])
def test_blocks_name_what_is_wrong(sample, steps, message):
    with pytest.raises(ValueError, match=message):
        _C.duquant_blocks(sample, steps)


def test_random_matrices_refuse_sizes_out_of_range():
    for n in (0, -1, 4097):
        with pytest.raises(ValueError, match="n: expected 1 to 4096"):
            _C.random_orthogonal(n, 0)
        with pytest.raises(ValueError, match="b of 1 to 4096"):
            _C.duquant_steps(n, 1, 0)


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_random_matrices_refuse_seeds_out_of_range(seed):
    for call in (_C.random_orthogonal, lambda n, seed: _C.duquant_steps(n, 1, seed)):
        with pytest.raises(ValueError, match=rf"^seed: expected an integer from 0 .*, got {seed}$"):
            call(4, seed)
        with pytest.raises(TypeError, match="float"):
            call(4, 0.5)


def test_random_orthogonal_takes_the_largest_random_word():
    # The stream whose first word is all ones: a uniform number next to 1, a normal next to 0
    seed = 3558559446808474027
    assert _reference.random_word(seed, 0) == 2**64 - 1
    for n in (1, 3):
        q = _C.random_orthogonal(n, seed)
        np.testing.assert_allclose(q @ q.T, np.eye(n), atol=1e-14)
        np.testing.assert_allclose(q, _reference.random_orthogonal(n, seed), atol=1e-14)


def test_steps_whose_products_overflow_are_not_kept():
    x = np.full((4, 16), 3e38, np.float32)
    x[np.indices(x.shape).sum(axis=0) % 3 == 0] *= -1
    blocks, peaks = _C.duquant_blocks(x, _C.duquant_steps(16, 6, 1))
    assert peaks[0, 0] == np.float32(3e38)
    assert not np.isfinite(peaks[0, 1:]).all()
    turned = np.abs(x.astype(float) @ blocks[0].astype(float)).max()
    assert turned <= peaks[0, 0] * (1 + 1e-5)
    finite = peaks[0][np.isfinite(peaks[0])]
    assert finite.min() > 3e37  # NaN and Inf were once taken for 0 here


def test_threads_may_change_while_a_solver_runs():
    # Scratch is of the call that uses it: any number of threads may be set while one runs.
    x, steps = outlier_inputs(512, 512), _C.duquant_steps(32, 1, 0)
    _C.set_num_threads(1)
    expected = _C.duquant_blocks(x, steps)
    calls, stop, wrong = 0, threading.Event(), []

    def solve():
        nonlocal calls
        while not stop.is_set() and not wrong:
            found = _C.duquant_blocks(x, steps)
            calls += 1
            if not all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True)):
                wrong.append(calls)

    solver = threading.Thread(target=solve)
    solver.start()
    try:
        begin = time.monotonic()
        while (took := time.monotonic() - begin) < 2 or (calls <= 10 and took < 60):
            _C.set_num_threads(8)
            _C.set_num_threads(1)
    finally:
        stop.set()
        solver.join()
    assert calls > 10
    assert not wrong


# ---- zigzag -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("k", "b"), [(1, 1), (12, 4), (12, 12), (12, 1), (30, 5), (512, 128)])
def test_zigzag_deals_channels_back_and_forth(k, b):
    maxima = np.abs(np.random.default_rng(k).standard_t(2, k))
    maxima[: k // 3] = 1.0  # ties: the lower index first
    permutation = _C.zigzag(maxima, b)
    np.testing.assert_array_equal(permutation, _reference.zigzag(maxima, b))
    ranked = sorted(range(k), key=lambda i: (-maxima[i], i))
    blocks = [[] for _ in range(k // b)]
    there = [*range(k // b), *reversed(range(k // b))]
    for rank, channel in enumerate(ranked):
        blocks[there[rank % len(there)]].append(channel)
    np.testing.assert_array_equal(permutation.reshape(-1, b), blocks)


def test_zigzag_balances_the_blocks():
    maxima = np.sort(np.abs(np.random.default_rng(0).standard_t(2, 512)))[::-1]
    means = maxima[_C.zigzag(maxima, 64)].reshape(-1, 64).mean(1)
    # two deals there and back give each block almost equal sums: within the first deal's range
    assert means.max() - means.min() <= (maxima[0] - maxima[7]) / 64
    assert means.var() < 0.01 * maxima.reshape(-1, 64).mean(1).var()


def test_zigzag_names_what_is_wrong():
    with pytest.raises(ValueError, match="b: expected a divisor of k = 10, got 4"):
        _C.zigzag(np.ones(10), 4)
    with pytest.raises(ValueError, match="maxima: .*NaN or Inf"):
        _C.zigzag([1.0, np.nan], 1)


# ---- application --------------------------------------------------------------------------------


@pytest.mark.usefixtures("table")
@pytest.mark.parametrize(("m", "k", "b"), [(1, 8, 8), (3, 24, 8), (70, 96, 32), (5, 21, 7),
                                           (2, 3, 1), (0, 8, 4), (9, 1408, 128)])
def test_rotate_blocks_is_its_twin_and_undone_by_its_transpose(m, k, b):
    rotation, x = random_blocks(k, b), outlier_inputs(max(m, 1), k)[:m]
    y = _C.rotate(x, rotation.core)
    limit = 1e-6 * np.abs(x).max(initial=1.0) * b**0.5
    np.testing.assert_allclose(y, _reference.rotate(x, rotation.core), atol=limit)
    back = BlockRotation(rotation.second.swapaxes(1, 2), np.arange(k), np.tile(np.eye(b),
                         (k // b, 1, 1)))
    z = np.empty_like(y)
    z[:, rotation.permutation] = rotate_rows(y, back)
    undone = _C.rotate(z, _C.Rotation.blocks(rotation.first.swapaxes(1, 2), np.arange(k),
                                             back.second))
    np.testing.assert_allclose(undone, x, atol=4 * limit)


@pytest.mark.usefixtures("table")
def test_rotate_blocks_of_a_row_depends_on_that_row_alone():
    rotation, x = random_blocks(768, 128), outlier_inputs(131, 768)
    whole = _C.rotate(x, rotation.core)
    for threads in (1, 3):
        _C.set_num_threads(threads)
        np.testing.assert_array_equal(_C.rotate(x, rotation.core), whole)
        for m in (1, 2, 5, 64):
            np.testing.assert_array_equal(_C.rotate(x[:m], rotation.core), whole[:m])
    np.testing.assert_array_equal(_C.rotate(x[77], rotation.core), whole[77])


EYES = np.tile(np.eye(4, dtype=np.float32), (2, 1, 1))


@pytest.mark.parametrize(("parts", "message"), [
    ((EYES[:, :3], np.arange(8), EYES), "first: expected square blocks"),
    ((EYES, np.arange(8), EYES[:1]), r"second: expected blocks \(2, 4, 4\) as first"),
    ((EYES, np.arange(7), EYES), r"permutation: expected shape\[0\] = 8, got 7"),
    ((EYES, np.array([0, 1, 2, 3, 4, 5, 6, 6]), EYES), "permutation: expected each of 0 to 7 once"),
    ((EYES, np.arange(1, 9), EYES), "permutation: expected each of 0 to 7 once"),
    ((EYES, np.arange(-1, 7), EYES), "permutation: expected each of 0 to 7 once"),
])
def test_block_rotation_that_is_none_is_refused(parts, message):
    with pytest.raises(ValueError, match=message):
        _C.Rotation.blocks(*parts)
    with pytest.raises(ValueError, match=message.split(":")[0]):
        BlockRotation(*parts)


def test_rotate_blocks_refuses_rows_of_another_length():
    with pytest.raises(ValueError, match=r"x: expected shape\[1\] = 8, got 9"):
        _C.rotate(np.ones((2, 9)), _C.Rotation.blocks(EYES, np.arange(8), EYES))


# ---- the solver ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("k", "b"), [
    (4096, 128), (11008, 128), (1408, 128), (192, 64), (96, 32), (48, 16), (8, 8), (24, 24),
    (172, 86), (7, 7), (375, 125), (509, 1), (1018, 2), (1, 1),
])
def test_block_size_is_a_power_of_two_where_one_is_useful(k, b):
    assert block_size(k) == b


@pytest.mark.parametrize("k", [1, 7, 64, 172, 384, 509])
def test_solution_is_orthogonal_and_keeps_the_product(k):
    x, w = outlier_inputs(96, k), outlier_inputs(5, k, seed=1)
    rotation = build(Site(site_statistics(x, [w])))
    assert max(orthogonality(rotation.first), orthogonality(rotation.second)) < 1e-6
    assert rotation.k == k
    assert rotation.sizes == (k // block_size(k), block_size(k))
    assert rotation.is_identity == (block_size(k) == 1)
    y = rotate_rows(x, rotation).astype(np.float64) @ rotate_rows(w, rotation).astype(np.float64).T
    exact = x.astype(np.float64) @ w.astype(np.float64).T
    assert np.abs(y - exact).max() <= 1e-5 * np.abs(exact).max()


def test_solution_spreads_a_massive_channel_over_all_blocks():
    x = outlier_inputs(256, 256)
    x[:, 3] *= 40
    rotation = build(Site(site_statistics(x, [x[:2]])))
    before, after = block_peaks(x, 128), block_peaks(rotate_rows(x, rotation), 128)
    assert after.max() < 0.2 * before.max()
    assert after.max() < 1.5 * after.min()  # what one rotation by itself cannot do:
    first = BlockRotation(rotation.first, np.arange(256), np.tile(np.eye(128), (2, 1, 1)))
    alone = block_peaks(rotate_rows(x, first), 128)
    assert alone.max() > 2 * alone.min()


def test_seed_decides():
    site = site_statistics(outlier_inputs(40, 64), [outlier_inputs(4, 64)])
    one, same, other = (build(Site(site, seed)) for seed in (3, 3, 4))
    for a, b in zip(one.core.parts, same.core.parts, strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.array_equal(one.first, other.first)


# ---- file and runtime ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bundled(tmp_path_factory):
    """The bundled model under DuQuant and under plain rounding."""
    folder = tmp_path_factory.mktemp("bundled")
    for method in ("duquant", "none"):
        config = QuantConfig("w4a4", method, "rtn", 4, clip=1.0, calibration_tokens=512)
        sq.quantize_folder(sq.bundled_model(), folder / method, config)
    return folder


def test_bundled_model_round_trips_and_beats_plain_rounding(bundled):
    original = sq.load(sq.bundled_model())
    tokens = original.encode(sq.bundled_text("heldout"))[:2048]
    kl = {method: sq.perplexity(sq.load(bundled / method), tokens, 256, reference=original).kl_mean
          for method in ("duquant", "none")}
    assert kl["duquant"] < 0.25 * kl["none"]
    stored = load_checkpoint(bundled / "duquant")
    for i in range(stored.spec.layers):
        first, permutation, second = stored.layer(i).rotations["down"].parts
        assert first.shape == second.shape == (7, 64, 64)
        assert sorted(permutation.tolist()) == list(range(448))
    estimate = estimate_size(load_checkpoint(sq.bundled_model()), stored.quant_config)
    size = sum(file.stat().st_size for file in (bundled / "duquant").iterdir())
    assert abs(estimate - size) < 0.05 * size


@pytest.mark.parametrize("threads", [1, 3])
def test_decode_gives_the_bits_of_prefill(bundled, threads):
    _C.set_num_threads(threads)
    model = sq.load(bundled / "duquant")
    tokens = model.encode(sq.bundled_text("heldout"))[:48]
    whole = model.hidden_states(tokens[None])
    session = model.new_session(1, len(tokens))
    pieces = np.split(tokens, range(20, len(tokens)))
    found = np.concatenate([session.append([piece]) for piece in pieces])
    np.testing.assert_array_equal(found, whole.reshape(found.shape))


@pytest.fixture
def written(make_checkpoint, tmp_path):
    """(folder, rotations of layer 0, source): a folder whose sites have block rotations."""
    source = load_checkpoint(make_checkpoint(tmp_path / "m"))
    config = QuantConfig("w4a4", "duquant", bits=4)
    rotations = {site: random_blocks(k, b) for site, k, b in
                 (("qkv", 64, 16), ("o", 64, 64), ("gate_up", 64, 8), ("down", 96, 32))}
    with ModelWriter(tmp_path / "out", source, config) as writer:
        for i in range(source.spec.layers):
            layer, _ = random_layer(source, config, i)
            writer.write_layer(QuantizedLayer(i, layer.packed, layer.dense, rotations))
        writer.finish()
    return tmp_path / "out", rotations, source


def test_written_blocks_come_back_and_the_plain_reader_turns_alike(written):
    folder, rotations, source = written
    stored = load_checkpoint(folder).layer(0).rotations
    _, tensors = format_reader.read_model(folder)
    for site, rotation in rotations.items():
        for a, b in zip(stored[site].parts, rotation.core.parts, strict=True):
            np.testing.assert_array_equal(a, b)
        x = outlier_inputs(4, source.spec.layer(0).sites[site].k)
        found = format_reader.rotate(tensors, 0, site, x.astype(np.float64))
        np.testing.assert_allclose(found, rotate_rows(x, rotation), atol=1e-3)


def test_decoder_turns_blocks_as_it_turns_the_equal_kronecker_factors(make_checkpoint, tmp_path):
    """One block of all inputs, x first P second, is a left factor: the product's transpose."""
    source = load_checkpoint(make_checkpoint(tmp_path / "m"))
    weights, rng = source.layer(0), np.random.default_rng(0)
    linears = {}
    for site, found in source.spec.layer(0).sites.items():
        for role in found.roles:
            n, k = weights.linears[role].weight.shape
            codes, scales, _ = _C.quantize(rng.standard_normal((n, k)) * k**-0.5)
            linears[role] = site, _C.PackedWeight(_C.pack(codes), scales, k), None
    blocks, factors = {}, {}
    for site, k in zip(source.spec.layer(0).sites, (64, 64, 64, 96), strict=True):
        rotation = random_blocks(k, k, seed=k)
        blocks[site] = k, rotation.core, 16, 1.0
        product = rotation.first[0][:, rotation.permutation] @ rotation.second[0]
        factors[site] = k, _C.Rotation(k, product.T), 16, 1.0
    start = rng.standard_normal((7, 64)).astype(np.float32)
    outputs = []
    for sites in (blocks, factors):
        decoder = _C.DecoderLayer(
            **layer_blocks(source.spec.layer(0), weights.norms, linears, sites)
        )
        cache = _C.KVCache(1, 1, source.spec.attention.kv_heads, source.spec.attention.head_dim, 8)
        hidden = start.copy()
        decoder.forward(hidden, np.zeros(7, int), np.arange(7), cache, 0)
        outputs.append(hidden)
    np.testing.assert_allclose(*outputs, atol=1e-4)


ORDER = np.arange(64, dtype=np.int32)
BLOCKS = np.tile(np.eye(16, dtype=np.float32), (4, 1, 1))


@pytest.mark.parametrize(("part", "value", "message"), [
    ("permutation", np.where(ORDER == 5, 6, ORDER), "permutation: expected each of 0 to 63 once"),
    ("permutation", ORDER + 1, "expected each of 0 to 63 once"),
    ("permutation", ORDER - 1, "expected each of 0 to 63 once"),
    ("permutation", ORDER[:63], r"expected shape \[64\], found \[63\]"),
    ("permutation", ORDER.astype(np.int64), "expected dtype I32, found I64"),
    ("permutation", None, "permutation: missing tensor"),
    ("first", 1.01 * BLOCKS, "first: expected an orthogonal matrix"),
    ("second", np.where(BLOCKS == 1, np.float32(np.nan), 0), "second: expected an orthogonal"),
    ("second", np.concatenate([BLOCKS[:3], 0 * BLOCKS[:1]]), "second: expected an orthogonal"),
    ("second", None, "second: missing tensor"),
    ("second", BLOCKS[:3], r"second: expected shape \[4, 16, 16\], found \[3, 16, 16\]"),
    ("second", np.tile(np.eye(8, dtype=np.float32), (8, 1, 1)), r"expected shape \[4, 16, 16\]"),
    ("first", np.tile(np.eye(24, dtype=np.float32), (4, 1, 1)), "first: expected shape"),
    ("first", np.ones((4, 16, 0), np.float32), "first: expected shape"),
    ("first", np.array(1, np.float32), "first: expected shape"),
    ("first", BLOCKS.astype(np.float64), "expected dtype F32, found F64"),
    ("first", None, "unexpected tensor"),
    ("left", np.eye(8, dtype=np.float32), "rotations.qkv.left: unexpected tensor"),
])
def test_blocks_that_lie_are_refused(written, part, value, message):
    folder, _, _ = written
    edit_tensors(folder, **{f"{PREFIX}.{part}": value})
    with pytest.raises(FormatError, match=message):
        load_checkpoint(folder).layer(0)


def test_decoder_layer_names_the_site_of_blocks_that_do_not_fit(written):
    folder, rotations, _ = written
    checkpoint = load_checkpoint(folder)
    weights = checkpoint.layer(0)
    linears, sites = {}, {}
    for site, found in checkpoint.spec.layer(0).sites.items():
        for role in found.roles:
            n, k = weights.linears[role].weight.shape
            linears[role] = site, np.zeros((n, k), np.float32), None
            sites[site] = k, None, 16, 1.0

    def build(rotation):
        changed = sites | {"qkv": (sites["qkv"][0], rotation, 4, 1.0)}
        return _C.DecoderLayer(
            **layer_blocks(checkpoint.spec.layer(0), weights.norms, linears, changed)
        )

    build(rotations["qkv"].core)
    with pytest.raises(ValueError, match="site qkv: expected one of k = 64 inputs, got 96"):
        build(rotations["down"].core)
    with pytest.raises(TypeError, match="site qkv: expected a Rotation or None, got tuple"):
        build(rotations["qkv"].core.parts)
