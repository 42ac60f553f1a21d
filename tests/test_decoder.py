"""The decoder layer, dense linears, conversions and RMSNorm against their NumPy twins."""

import sys
from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np
import pytest

from singlequant import _C, _reference as reference

TOLERANCE = 1e-5  # of the largest value: float32 against float64 over a whole layer
DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16]


@pytest.fixture
def rng():
    return np.random.default_rng(5)


def assert_close(got, expected, tolerance=TOLERANCE):
    np.testing.assert_allclose(got, expected, atol=tolerance * np.abs(expected).max(), rtol=0)


# ---- linears, conversions, norm -----------------------------------------------------------------


@pytest.mark.usefixtures("table")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("m", "n", "k"), [(1, 1, 1), (1, 300, 129), (3, 17, 40), (300, 40, 33), (257, 513, 20)]
)
def test_linear_dense_equals_numpy(rng, dtype, m, n, k):
    x, w = rng.normal(size=(m, k)).astype(np.float32), rng.normal(size=(n, k)).astype(dtype)
    y = _C.linear_dense(x, w)
    assert y.dtype == np.float32
    assert y.shape == (m, n)
    assert_close(y, reference.linear_dense(x, w))


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_dense_does_not_depend_on_threads(rng, dtype):
    x, w = rng.normal(size=(300, 96)).astype(np.float32), rng.normal(size=(500, 96)).astype(dtype)
    seen = set()
    for threads in (1, 2, 3, 8):
        _C.set_num_threads(threads)
        seen.add(_C.linear_dense(x, w).tobytes())
    assert len(seen) == 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_dense_takes_any_layout(rng, dtype):
    w = rng.normal(size=(12, 20)).astype(dtype)
    x = rng.normal(size=(2, 3, 20)).astype(np.float32)
    expected = _C.linear_dense(x.reshape(6, 20), w).reshape(2, 3, 12)
    assert (_C.linear_dense(x, w) == expected).all()
    assert (_C.linear_dense(x, np.asfortranarray(w)) == expected).all()
    read_only = w.copy()
    read_only.flags.writeable = False
    assert (_C.linear_dense(x, read_only) == expected).all()
    raw = np.empty(w.nbytes + 1, np.uint8)  # not aligned
    odd = raw[1:].view(dtype).reshape(w.shape)
    odd[:] = w
    assert not odd.flags.aligned
    assert (_C.linear_dense(x, odd) == expected).all()
    assert (_C.linear_dense(x[0, 0], w) == expected[0, 0]).all()
    assert _C.linear_dense(x[:0], w).shape == (0, 3, 12)
    assert _C.linear_dense(x, w[:0]).shape == (2, 3, 0)


def test_linear_dense_takes_swapped_bytes(rng):
    x, w = rng.normal(size=(3, 8)).astype(np.float32), rng.normal(size=(5, 8)).astype(np.float16)
    assert (_C.linear_dense(x.astype(">f4"), w.astype(">f2")) == _C.linear_dense(x, w)).all()


def test_linear_dense_errors_name_the_argument():
    with pytest.raises(TypeError, match="weight: expected float32, float16 or bfloat16, got"):
        _C.linear_dense(np.zeros((2, 3)), np.zeros((4, 3)))
    with pytest.raises(TypeError, match="weight: expected float32, float16 or bfloat16, got"):
        _C.linear_dense(np.zeros((2, 3)), np.zeros((4, 3), ml_dtypes.float8_e4m3fn))
    with pytest.raises(ValueError, match=r"x: expected shape\[1\] = 3, got 4"):
        _C.linear_dense(np.zeros((2, 4)), np.zeros((4, 3), np.float32))
    with pytest.raises(ValueError, match="weight: expected 2 dimensions, got 1"):
        _C.linear_dense(np.zeros((2, 4)), np.zeros(4, np.float32))
    with pytest.raises(ValueError, match="x: expected at least 1 dimension"):
        _C.linear_dense(np.float32(1), np.zeros((4, 3), np.float32))


@pytest.mark.usefixtures("table")
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_to_float32_is_exact_for_all_bit_patterns(dtype):
    every = np.arange(65536, dtype=np.uint16).view(dtype)
    with np.errstate(invalid="ignore"):
        expected = every.astype(np.float32)
    got = _C.to_float32(every)
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(got[finite].view(np.uint32), expected[finite].view(np.uint32))
    np.testing.assert_array_equal(got[~finite], expected[~finite])


@pytest.mark.usefixtures("table")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", [0, 40000, 99999])
def test_to_float32_rejects_nonfinite_only_when_asked(dtype, bad, where):
    x = np.ones(100000, dtype)
    assert (_C.to_float32(x, reject=True) == 1).all()
    x[where] = bad
    np.testing.assert_array_equal(_C.to_float32(x)[where], np.float32(bad))
    with pytest.raises(ValueError, match="x: "):
        _C.to_float32(x, reject=True)


def test_to_float32_copies(rng):
    x = rng.normal(size=(3, 4, 5)).astype(np.float32)
    y = _C.to_float32(x)
    assert y.shape == x.shape
    assert not np.shares_memory(x, y)
    assert _C.to_float32(np.float16(2)).shape == ()


@pytest.mark.parametrize("dtype", DTYPES)
def test_gather_rows_equals_numpy(rng, dtype):
    table = rng.normal(size=(50, 33)).astype(dtype)
    index = rng.integers(0, 50, 2000)
    np.testing.assert_array_equal(_C.gather_rows(table, index), reference.gather_rows(table, index))
    assert _C.gather_rows(table, np.zeros(0, int)).shape == (0, 33)


@pytest.mark.parametrize("bad", [-1, 50, 2**40])
def test_gather_rows_names_the_index(bad):
    with pytest.raises(ValueError, match=rf"index\[2\]: expected 0 to 49, got {bad}"):
        _C.gather_rows(np.zeros((50, 3), np.float32), [0, 49, bad])
    with pytest.raises(TypeError, match="index"):
        _C.gather_rows(np.zeros((50, 3), np.float32), [0.5])


@pytest.mark.usefixtures("table")
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 5, 64), (100, 129)])
def test_rms_norm_equals_twin(rng, shape):
    x = rng.normal(size=shape).astype(np.float32) * 10
    weight = rng.normal(size=shape[-1]).astype(np.float32)
    assert_close(_C.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5), 1e-6)


def test_rms_norm_errors():
    with pytest.raises(ValueError, match=r"x: expected shape\[1\] = 4, got 3"):
        _C.rms_norm(np.ones((2, 3)), np.ones(4), 1e-6)
    with pytest.raises(ValueError, match="rms_norm"):
        _C.rms_norm(np.ones((2, 3)), np.ones(3), -1)


# ---- the layer ----------------------------------------------------------------------------------


def architecture(hidden, intermediate, heads, kv_heads, head_dim, window=0):
    return {
        "hidden": hidden, "intermediate": intermediate, "heads": heads, "kv_heads": kv_heads,
        "head_dim": head_dim, "rms_eps": 1e-5, "sliding_window": window,
        "inv_freq": (10000.0 ** (-np.arange(head_dim // 2) * 2 / head_dim)).astype(np.float32),
        "rope_scale": 1.0,
    }  # fmt: skip


def shapes(a):
    q, kv = a["heads"] * a["head_dim"], a["kv_heads"] * a["head_dim"]
    h, i = a["hidden"], a["intermediate"]
    return [(q, h), (kv, h), (kv, h), (h, q), (i, h), (i, h), (h, i)]


SHAPES = {
    "mha": architecture(48, 40, 6, 6, 8),
    "gqa": architecture(48, 40, 6, 2, 8),
    "one-head": architecture(7, 13, 1, 1, 2),
    "wide-heads": architecture(36, 100, 4, 2, 20),
    "window": architecture(64, 96, 4, 1, 16, 5),
}


def dense_parts(rng, a, dtype=np.float32, biases=True):
    linears = [
        (
            (rng.normal(size=(n, k)) / np.sqrt(k)).astype(dtype),
            rng.normal(size=n).astype(np.float32) if biases else None,
        )
        for n, k in shapes(a)
    ]
    norms = rng.uniform(0.5, 1.5, size=(2, a["hidden"])).astype(np.float32)
    return a, (norms[0], norms[1]), linears, [None] * 4


def tokens(lengths):
    sequence = np.repeat(np.arange(len(lengths)), lengths)
    return sequence, np.concatenate([np.arange(n) for n in lengths])


def new_cache(a, sequences, capacity=64, kind=_C):
    return kind.KVCache(1, sequences, a["kv_heads"], a["head_dim"], capacity)


@pytest.mark.usefixtures("table")
@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SHAPES)
def test_layer_equals_twin(rng, name, dtype, biases):
    parts = dense_parts(rng, SHAPES[name], dtype, biases)
    lengths = [9, 1, 33]
    where = tokens(lengths)
    hidden = rng.normal(size=(43, parts[0]["hidden"])).astype(np.float32)
    expected = hidden.astype(np.float64)
    inputs = reference.DecoderLayer(*parts).forward(
        expected, *where, new_cache(parts[0], 3, kind=reference), 0, record=True
    )
    layer, cache = _C.DecoderLayer(*parts), new_cache(parts[0], 3)
    got = hidden.copy()
    recorded = layer.forward(got, *where, cache, 0, record=True)
    assert_close(got, expected)
    assert len(recorded) == 4
    for one, other in zip(recorded, inputs, strict=True):
        assert_close(one, other)
    again = hidden.copy()
    assert layer.forward(again, *where, cache, 0) is None
    assert (again == got).all()


def test_layer_continues_from_its_cache(rng):
    """Prompts of unequal length, then one token of each sequence per call."""
    parts = dense_parts(rng, SHAPES["gqa"])
    hidden = rng.normal(size=(3, 12, 48)).astype(np.float32)
    lengths = np.array([3, 9, 1])
    twin_cache = new_cache(parts[0], 3, kind=reference)
    expected = hidden.reshape(36, 48).astype(np.float64)
    reference.DecoderLayer(*parts).forward(expected, *tokens([12] * 3), twin_cache, 0)
    layer, cache = _C.DecoderLayer(*parts), new_cache(parts[0], 3)
    expected = expected.reshape(3, 12, 48)
    prompt = np.concatenate([hidden[s, :n] for s, n in enumerate(lengths)])
    layer.forward(prompt, *tokens(lengths), cache, 0)
    assert_close(prompt, np.concatenate([expected[s, :n] for s, n in enumerate(lengths)]))
    for step in range(3):
        position = lengths + step
        one = hidden[np.arange(3), position].copy()
        layer.forward(one, np.arange(3), position, cache, 0)
        assert_close(one, expected[np.arange(3), position])


def test_prompt_equals_one_by_one_with_dense_linears(rng):
    parts = dense_parts(rng, SHAPES["gqa"])
    layer = _C.DecoderLayer(*parts)
    whole = rng.normal(size=(33, 48)).astype(np.float32)
    single = whole.copy()
    layer.forward(whole, *tokens([33]), new_cache(parts[0], 1), 0)
    cache = new_cache(parts[0], 1)
    for t in range(33):
        layer.forward(single[t : t + 1], [0], [t], cache, 0)
    assert_close(single, whole)


@pytest.mark.parametrize("m", [5, 700])
def test_dense_layer_does_not_depend_on_threads(rng, m):
    parts = dense_parts(rng, SHAPES["gqa"], ml_dtypes.bfloat16)
    layer = _C.DecoderLayer(*parts)
    hidden = rng.normal(size=(m, 48)).astype(np.float32)
    seen = set()
    for threads in (1, 2, 3):
        _C.set_num_threads(threads)
        got = hidden.copy()
        inputs = layer.forward(got, *tokens([m]), new_cache(parts[0], 1, m), 0, record=True)
        seen.add((got.tobytes(), *(x.tobytes() for x in inputs)))
    assert len(seen) == 1


def test_layer_leaves_its_other_inputs_alone(rng):
    parts = dense_parts(rng, SHAPES["gqa"])
    before = [w.copy() for w, _ in parts[2]]
    layer = _C.DecoderLayer(*parts)
    sequence, position = tokens([4])
    kept = sequence.copy(), position.copy()
    layer.forward(np.ones((4, 48), np.float32), sequence, position, new_cache(parts[0], 1), 0)
    for (w, _), old in zip(parts[2], before, strict=True):
        assert (w == old).all()
    assert (sequence == kept[0]).all()
    assert (position == kept[1]).all()


def test_dense_weights_are_borrowed_not_copied(rng):
    parts = dense_parts(rng, SHAPES["gqa"], ml_dtypes.bfloat16)
    layer = _C.DecoderLayer(*parts)
    where = tokens([3])
    first, second = np.ones((2, 3, 48), np.float32)
    layer.forward(first, *where, new_cache(parts[0], 1), 0)
    parts[2][6][0][:] = 0
    layer.forward(second, *where, new_cache(parts[0], 1), 0)
    assert (first != second).any()


def test_layer_outlives_the_arrays_it_was_made_of(rng):
    layer = _C.DecoderLayer(*dense_parts(rng, SHAPES["gqa"]))
    a = SHAPES["gqa"]
    expected = _C.DecoderLayer(*(parts := dense_parts(np.random.default_rng(5), a)))
    one, other = np.ones((2, 3, 48), np.float32)
    layer.forward(one, *tokens([3]), new_cache(a, 1), 0)
    expected.forward(other, *tokens([3]), new_cache(a, 1), 0)
    assert (one == other).all()
    del parts


def test_no_tokens_is_no_work(rng):
    parts = dense_parts(rng, SHAPES["gqa"])
    empty = np.zeros((0, 48), np.float32)
    none = np.zeros(0, int)
    inputs = _C.DecoderLayer(*parts).forward(
        empty, none, none, new_cache(parts[0], 1), 0, record=True
    )
    assert [x.shape for x in inputs] == [(0, 48), (0, 48), (0, 48), (0, 40)]


# ---- packed -------------------------------------------------------------------------------------


def orthogonal(rng, n):
    return np.linalg.qr(rng.normal(size=(n, n)))[0].astype(np.float32)


def chain(rng, order, hadamard, steps=9):
    pairs = np.array([rng.choice(order, 2, replace=False) for _ in range(steps)], np.int32)
    return order, hadamard, pairs, rng.uniform(-3, 3, steps)


def packed_parts(rng, a, bits, rotation="dense", group=0, biases=True):
    """A layer with packed linears, and the linears of its twin as functions of their input."""
    _, norms, dense, _ = dense_parts(rng, a, biases=biases)
    inputs = [0, 0, 0, 1, 2, 2, 3]
    sizes = [shapes(a)[i][1] for i in (0, 3, 4, 6)]
    sites = []
    for k in sizes:
        k1, k2 = _C.factor_sizes(k)
        turn = None
        if rotation == "dense":
            turn = _C.Rotation(k, orthogonal(rng, k1), orthogonal(rng, k2))
        elif rotation == "chain":
            turn = _C.Rotation(k, chain(rng, k1, False), chain(rng, k2, True))
        elif rotation == "left":
            turn = _C.Rotation(k, orthogonal(rng, k1))
        sites.append((turn, bits, 0.95))
    linears, twins = [], []
    for (w, b), site in zip(dense, inputs, strict=True):
        turn, _, clip = sites[site]
        codes, scales, _ = _C.quantize(w, bits=4, group=group)
        linears.append((_C.PackedWeight(_C.pack(codes), scales, w.shape[1], group), b))
        values = _C.dequantize(codes, scales).astype(np.float64)

        def twin(x, values=values, b=b, turn=turn, clip=clip):
            x = x.astype(np.float32)
            if turn is not None:
                x = _C.rotate(x, turn)
            if bits < 16:
                codes, scales, _ = _C.quantize(x, bits=bits, clip=clip)
                x = _C.dequantize(codes, scales)
            return x.astype(np.float64) @ values.T + (0 if b is None else b)

        twins.append(twin)
    return (a, norms, linears, sites), (a, norms, twins, None)


PACKED = {
    "mha": architecture(64, 96, 4, 4, 16),
    "gqa": architecture(96, 160, 6, 2, 16),
    "odd": architecture(48, 40, 6, 2, 8),
    "window": architecture(64, 96, 4, 1, 16, 5),
}


@pytest.mark.usefixtures("table")
@pytest.mark.parametrize("rotation", ["none", "dense", "chain", "left"])
@pytest.mark.parametrize("name", PACKED)
def test_packed_layer_equals_twin_with_16_bit_activations(rng, name, rotation):
    parts, twin_parts = packed_parts(rng, PACKED[name], 16, rotation)
    hidden = rng.normal(size=(43, parts[0]["hidden"])).astype(np.float32)
    where = tokens([9, 1, 33])
    expected = hidden.astype(np.float64)
    inputs = reference.DecoderLayer(*twin_parts).forward(
        expected, *where, new_cache(parts[0], 3, kind=reference), 0, record=True
    )
    recorded = _C.DecoderLayer(*parts).forward(
        hidden, *where, new_cache(parts[0], 3), 0, record=True
    )
    assert_close(hidden, expected, 2e-5)
    for one, other in zip(recorded, inputs, strict=True):
        assert_close(one, other, 2e-5)


@pytest.mark.usefixtures("table")
@pytest.mark.parametrize("bits", [4, 8])
def test_packed_layer_equals_twin_with_codes(rng, bits):
    """A code within 1e-5 of a boundary may differ by one: few values may, and by little."""
    parts, twin_parts = packed_parts(rng, PACKED["gqa"], bits, group=32)
    hidden = rng.normal(size=(33, 96)).astype(np.float32)
    expected = hidden.astype(np.float64)
    cache = new_cache(parts[0], 1, kind=reference)
    reference.DecoderLayer(*twin_parts).forward(expected, *tokens([33]), cache, 0)
    _C.DecoderLayer(*parts).forward(hidden, *tokens([33]), new_cache(parts[0], 1), 0)
    error = np.abs(hidden - expected).max(axis=1) / np.abs(expected).max()
    assert np.median(error) < 1e-5
    assert error.max() < (0.1 if bits == 4 else 0.01)


@pytest.mark.usefixtures("table")
@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("name", PACKED)
def test_packed_prompt_equals_one_by_one_bit_for_bit(rng, name, bits):
    parts, _ = packed_parts(rng, PACKED[name], bits)
    layer = _C.DecoderLayer(*parts)
    whole = rng.normal(size=(33, parts[0]["hidden"])).astype(np.float32)
    single, pieces = whole.copy(), whole.copy()
    layer.forward(whole, *tokens([33]), new_cache(parts[0], 1), 0)
    cache = new_cache(parts[0], 1, 33)
    for t in range(33):
        layer.forward(single[t : t + 1], [0], [t], cache, 0)
    assert (single == whole).all()
    cache = new_cache(parts[0], 1, 40)
    for start in range(0, 33, 7):
        part = pieces[start : start + 7]
        layer.forward(part, np.zeros(len(part), int), start + np.arange(len(part)), cache, 0)
    assert (pieces == whole).all()


@pytest.mark.usefixtures("table")
@pytest.mark.parametrize("rotation", ["dense", "chain"])
def test_packed_batch_equals_each_alone_bit_for_bit(rng, rotation):
    parts, _ = packed_parts(rng, PACKED["gqa"], 4, rotation)
    layer = _C.DecoderLayer(*parts)
    lengths = [5, 1, 17, 40, 2, 33, 8, 12]
    together = rng.normal(size=(sum(lengths), 96)).astype(np.float32)
    alone = np.split(together.copy(), np.cumsum(lengths)[:-1])
    layer.forward(together, *tokens(lengths), new_cache(parts[0], 8), 0)
    for part in alone:
        layer.forward(part, *tokens([len(part)]), new_cache(parts[0], 1), 0)
    assert (np.concatenate(alone) == together).all()


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("m", [3, 600])
def test_packed_layer_does_not_depend_on_threads(rng, bits, m):
    parts, _ = packed_parts(rng, PACKED["gqa"], bits)
    layer = _C.DecoderLayer(*parts)
    hidden = rng.normal(size=(m, 96)).astype(np.float32)
    seen = set()
    for threads in (1, 2, 3):
        _C.set_num_threads(threads)
        got = hidden.copy()
        layer.forward(got, *tokens([m]), new_cache(parts[0], 1, m), 0)
        seen.add(got.tobytes())
    assert len(seen) == 1


def test_site_may_mix_packed_and_dense_linears(rng):
    """The dense linear of a rotated site reads the input as it is."""
    parts, twin_parts = packed_parts(rng, PACKED["gqa"], 16)
    a, norms, linears, sites = parts
    weight, bias = rng.normal(size=(32, 96)).astype(np.float16) / 10, None
    linears = [*linears[:2], (weight, bias), *linears[3:]]
    twins = [*twin_parts[2][:2], (weight, bias), *twin_parts[2][3:]]
    hidden = rng.normal(size=(9, 96)).astype(np.float32)
    expected = hidden.astype(np.float64)
    twin = reference.DecoderLayer(a, norms, twins, None)
    twin.forward(expected, *tokens([9]), new_cache(a, 1, kind=reference), 0)
    sites = [dict(zip(("rotation", "bits", "clip"), s, strict=True)) for s in sites]
    layer = _C.DecoderLayer(a, norms, linears, sites)
    assert "6 of 7 packed" in repr(layer)
    layer.forward(hidden, *tokens([9]), new_cache(a, 1), 0)
    assert_close(hidden, expected, 2e-5)


def test_layer_is_shared_by_threads_while_their_number_changes(rng):
    parts, _ = packed_parts(rng, PACKED["gqa"], 4)
    layer = _C.DecoderLayer(*parts)
    hidden = rng.normal(size=(200, 96)).astype(np.float32)

    def run(_):
        got = hidden.copy()
        layer.forward(got, *tokens([200]), new_cache(parts[0], 1, 200), 0)
        return got.tobytes()

    expected = run(0)
    with ThreadPoolExecutor(3) as pool:
        results = [pool.submit(run, i) for i in range(30)]
        for i in range(100):
            _C.set_num_threads(1 + i % 5)
        assert {r.result() for r in results} == {expected}


def test_layer_gives_its_references_back(rng):
    parts = packed_parts(rng, PACKED["gqa"], 4, "chain")[0]
    dense = (np.zeros((32, 96), np.float32), None)
    parts[2][2] = dense
    watched = [parts[2][0][0], dense[0], parts[0]["inv_freq"], parts[3][0][0]]
    before = [sys.getrefcount(x) for x in watched]
    layer = _C.DecoderLayer(*parts)
    held = [sys.getrefcount(x) for x in watched]
    assert all(now > then for now, then in zip(held, before, strict=True))
    cache = new_cache(parts[0], 1)
    hidden, sequence = np.ones((1, 96), np.float32), np.zeros(1, np.int64)
    arguments = [sys.getrefcount(x) for x in (hidden, sequence, cache, layer)]
    for _ in range(3):
        layer.forward(hidden, sequence, sequence, cache, 0, record=True)
        with pytest.raises(ValueError, match="position"):
            layer.forward(hidden, sequence, sequence + 64, cache, 0, record=True)
    assert [sys.getrefcount(x) for x in (hidden, sequence, cache, layer)] == arguments
    del layer
    with pytest.raises(ValueError, match="site down: bits"):
        _C.DecoderLayer(*parts[:3], [*parts[3][:3], (parts[3][3][0], 3, 1.0)])
    assert [sys.getrefcount(x) for x in watched] == before


# ---- what is refused ----------------------------------------------------------------------------


def broken(rng, **changes):
    parts = dict(
        zip(
            ("architecture", "norms", "linears", "sites"),
            dense_parts(rng, SHAPES["gqa"]),
            strict=True,
        )
    )
    parts["architecture"] = {**parts["architecture"], **changes.pop("architecture", {})}
    for index, linear in changes.pop("linears", {}).items():
        parts["linears"][index] = linear
    for index, site in changes.pop("sites", {}).items():
        parts["sites"][index] = site
    return {**parts, **changes}


TURN = _C.Rotation(48, np.eye(6), np.eye(8))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": {"heads": 5}}, "multiple of kv_heads, got 5 and 2"),
        ({"architecture": {"head_dim": 7}}, "even head_dim, got 7"),
        ({"architecture": {"hidden": 0}}, "hidden: expected 1 to 16777216, got 0"),
        ({"architecture": {"hidden": 2**24 + 1}}, "hidden: expected 1 to 16777216, got 16777217"),
        ({"architecture": {"heads": 2**17}}, "heads: expected 1 to 65536, got 131072"),
        ({"architecture": {"head_dim": 2**24}}, r"heads \* head_dim of at most 16777216, got"),
        ({"architecture": {"sliding_window": -1}}, "sliding_window: expected 0 to 2147483647, got"),
        ({"architecture": {"rms_eps": -1.0}}, "rms_eps: expected at least 0"),
        ({"architecture": {"rope_scale": np.nan}}, "rope_scale: expected at least 0"),
        ({"architecture": {"inv_freq": np.ones(5)}}, r"inv_freq: expected shape\[0\] = 4, got 5"),
        ({"architecture": {"colour": 1}}, "expected 9 keys, got 10"),
        ({"norms": (np.ones(48), np.ones(47))}, r"norms\[1\]: expected shape\[0\] = 48, got 47"),
        (
            {"linears": {3: (np.zeros((48, 40), np.float32), None)}},
            r"o weight: expected \(n, k\) = \(48, 48\), got \(48, 40\)",
        ),
        (
            {"linears": {1: (np.zeros((16, 48), np.float32), np.zeros(15))}},
            r"k: expected shape\[0\] = 16, got 15",
        ),
        ({"sites": {0: (TURN, 5, 1.0)}}, "site qkv: bits: expected 4, 8 or 16, got 5"),
        ({"sites": {1: (TURN, 4, 0.0)}}, "site o: clip: expected more than 0"),
        ({"sites": {3: (TURN, 4, 1.0)}}, "site down: expected one of k = 40 inputs, got 48"),
        ({"sites": {2: {"rotation": None}}}, "site gate_up: 'bits' is missing"),
    ],
)
def test_layer_says_what_does_not_fit(rng, changes, message):
    with pytest.raises(ValueError, match=message):
        _C.DecoderLayer(**broken(rng, **changes))


def test_layer_wants_all_its_parts(rng):
    parts = broken(rng)
    for key in parts["architecture"]:
        short = {k: v for k, v in parts["architecture"].items() if k != key}
        with pytest.raises(ValueError, match=f"'{key}' is missing"):
            _C.DecoderLayer(**{**parts, "architecture": short})
    with pytest.raises(ValueError, match="linears: expected 7 .* got 6"):
        _C.DecoderLayer(**{**parts, "linears": parts["linears"][:6]})
    with pytest.raises(ValueError, match="sites: expected 4 .* got 5"):
        _C.DecoderLayer(**{**parts, "sites": [None] * 5})
    with pytest.raises(TypeError, match="gate: expected float32, float16 or bfloat16"):
        _C.DecoderLayer(**broken(rng, linears={4: (np.zeros((40, 48)), None)}))
    with pytest.raises(
        TypeError, match=r"up: expected \(weight, bias or None\), got numpy.ndarray"
    ):
        _C.DecoderLayer(**broken(rng, linears={5: np.zeros((40, 48))}))
    with pytest.raises(TypeError, match="architecture: expected a dict"):
        _C.DecoderLayer(**{**parts, "architecture": None})


def test_forward_refuses_what_it_cannot_update_in_place(rng):
    a = SHAPES["gqa"]
    layer, cache = _C.DecoderLayer(*dense_parts(rng, a)), new_cache(a, 1)
    read_only = np.ones((1, 48), np.float32)
    read_only.flags.writeable = False
    for bad, error, message in [
        (np.ones((1, 48)), TypeError, "hidden: expected a float32 array"),
        ([[1.0] * 48], TypeError, "hidden: expected a float32 array"),
        (np.ones((2, 96), np.float32)[:, ::2], ValueError, "hidden: expected a C-contiguous"),
        (read_only, ValueError, "hidden: expected a C-contiguous, writable"),
        (np.ones((1, 48), ">f4"), ValueError, "hidden: expected a C-contiguous, writable, native"),
        (np.ones((1, 47), np.float32), ValueError, r"hidden: expected shape\[1\] = 48, got 47"),
        (np.ones(48, np.float32), ValueError, "hidden: expected 2 dimensions, got 1"),
    ]:
        with pytest.raises(error, match=message):
            layer.forward(bad, [0] * len(bad), [0] * len(bad), cache, 0)


def test_packed_layer_refuses_nan(rng):
    parts, _ = packed_parts(rng, PACKED["gqa"], 4)
    hidden = np.full((1, 96), np.nan, np.float32)
    with pytest.raises(ValueError, match=r"NaN|finite"):
        _C.DecoderLayer(*parts).forward(hidden, [0], [0], new_cache(parts[0], 1), 0)
