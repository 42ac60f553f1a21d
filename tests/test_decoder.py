"""A LLaMA-like layer against its NumPy twin, dense and packed, and what never changes its bits."""

import sys
from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np
import pytest
from blocks import SITES, geometry, llama, new_cache, shapes, site_widths, tokens

from singlequant import _C, _reference as reference

TOLERANCE = 1e-5  # of the largest value: float32 against float64 over a whole layer
DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16]


@pytest.fixture
def rng():
    return np.random.default_rng(5)


def assert_close(got, expected, tolerance=TOLERANCE):
    np.testing.assert_allclose(got, expected, atol=tolerance * np.abs(expected).max(), rtol=0)


SHAPES = {
    "mha": geometry(48, 40, 6, 6, 8),
    "gqa": geometry(48, 40, 6, 2, 8),
    "one-head": geometry(7, 13, 1, 1, 2),
    "wide-heads": geometry(36, 100, 4, 2, 20),
    "window": geometry(64, 96, 4, 1, 16, 5),
}


def dense_parts(rng, a, dtype=np.float32, biases=True):
    linears = {
        role: (
            (rng.normal(size=(n, k)) / np.sqrt(k)).astype(dtype),
            rng.normal(size=n).astype(np.float32) if biases else None,
        )
        for role, (n, k) in shapes(a).items()
    }
    norms = rng.uniform(0.5, 1.5, size=(2, a["hidden"])).astype(np.float32)
    return llama(a, linears, norms)


def weight_of(parts, role):
    return (parts["attention"] if role in "qkvo" else parts["mlp"])[role][1]


@pytest.mark.usefixtures("table")
@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SHAPES)
def test_layer_equals_twin(rng, name, dtype, biases):
    parts = dense_parts(rng, SHAPES[name], dtype, biases)
    lengths = [9, 1, 33]
    where = tokens(lengths)
    hidden = rng.normal(size=(43, parts["hidden"])).astype(np.float32)
    expected = hidden.astype(np.float64)
    inputs = reference.DecoderLayer(**parts).forward(
        expected, *where, new_cache(reference, parts, 3), 0, record=True
    )
    layer, cache = _C.DecoderLayer(**parts), new_cache(_C, parts, 3)
    got = hidden.copy()
    recorded = layer.forward(got, *where, cache, 0, record=True)
    assert_close(got, expected)
    assert list(recorded) == list(inputs) == ["qkv", "o", "gate_up", "down"]
    for site, one in recorded.items():
        assert_close(one, inputs[site])
    again = hidden.copy()
    assert layer.forward(again, *where, cache, 0) is None
    assert (again == got).all()


def test_layer_continues_from_its_cache(rng):
    """Prompts of unequal length, then one token of each sequence per call."""
    parts = dense_parts(rng, SHAPES["gqa"])
    hidden = rng.normal(size=(3, 12, 48)).astype(np.float32)
    lengths = np.array([3, 9, 1])
    twin_cache = new_cache(reference, parts, 3)
    expected = hidden.reshape(36, 48).astype(np.float64)
    reference.DecoderLayer(**parts).forward(expected, *tokens([12] * 3), twin_cache, 0)
    layer, cache = _C.DecoderLayer(**parts), new_cache(_C, parts, 3)
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
    layer = _C.DecoderLayer(**parts)
    whole = rng.normal(size=(33, 48)).astype(np.float32)
    single = whole.copy()
    layer.forward(whole, *tokens([33]), new_cache(_C, parts, 1), 0)
    cache = new_cache(_C, parts, 1)
    for t in range(33):
        layer.forward(single[t : t + 1], [0], [t], cache, 0)
    assert_close(single, whole)


@pytest.mark.parametrize("m", [5, 700])
def test_dense_layer_does_not_depend_on_threads(rng, m):
    parts = dense_parts(rng, SHAPES["gqa"], ml_dtypes.bfloat16)
    layer = _C.DecoderLayer(**parts)
    hidden = rng.normal(size=(m, 48)).astype(np.float32)
    seen = set()
    for threads in (1, 2, 3):
        _C.set_num_threads(threads)
        got = hidden.copy()
        inputs = layer.forward(got, *tokens([m]), new_cache(_C, parts, 1, m), 0, record=True)
        seen.add((got.tobytes(), *(x.tobytes() for x in inputs.values())))
    assert len(seen) == 1


def test_layer_leaves_its_other_inputs_alone(rng):
    parts = dense_parts(rng, SHAPES["gqa"])
    before = {role: weight_of(parts, role).copy() for role in shapes(SHAPES["gqa"])}
    layer = _C.DecoderLayer(**parts)
    sequence, position = tokens([4])
    kept = sequence.copy(), position.copy()
    layer.forward(np.ones((4, 48), np.float32), sequence, position, new_cache(_C, parts, 1), 0)
    for role, old in before.items():
        assert (weight_of(parts, role) == old).all()
    assert (sequence == kept[0]).all()
    assert (position == kept[1]).all()


def test_dense_weights_are_borrowed_not_copied(rng):
    parts = dense_parts(rng, SHAPES["gqa"], ml_dtypes.bfloat16)
    layer = _C.DecoderLayer(**parts)
    where = tokens([3])
    first, second = np.ones((2, 3, 48), np.float32)
    layer.forward(first, *where, new_cache(_C, parts, 1), 0)
    weight_of(parts, "down")[:] = 0
    layer.forward(second, *where, new_cache(_C, parts, 1), 0)
    assert (first != second).any()


def test_layer_outlives_the_arrays_it_was_made_of(rng):
    layer = _C.DecoderLayer(**dense_parts(rng, SHAPES["gqa"]))
    expected = _C.DecoderLayer(**(parts := dense_parts(np.random.default_rng(5), SHAPES["gqa"])))
    one, other = np.ones((2, 3, 48), np.float32)
    layer.forward(one, *tokens([3]), new_cache(_C, parts), 0)
    expected.forward(other, *tokens([3]), new_cache(_C, parts), 0)
    assert (one == other).all()


def test_no_tokens_is_no_work(rng):
    parts = dense_parts(rng, SHAPES["gqa"])
    empty = np.zeros((0, 48), np.float32)
    none = np.zeros(0, int)
    inputs = _C.DecoderLayer(**parts).forward(
        empty, none, none, new_cache(_C, parts, 1), 0, record=True
    )
    assert [x.shape for x in inputs.values()] == [(0, 48), (0, 48), (0, 48), (0, 40)]


# ---- packed -------------------------------------------------------------------------------------


def orthogonal(rng, n):
    return np.linalg.qr(rng.normal(size=(n, n)))[0].astype(np.float32)


def chain(rng, order, hadamard, steps=9):
    pairs = np.array([rng.choice(order, 2, replace=False) for _ in range(steps)], np.int32)
    return order, hadamard, pairs, rng.uniform(-3, 3, steps)


def site_factors(rng, k, rotation):
    k1, k2 = _C.factor_sizes(k)
    if rotation == "dense":
        return _C.Rotation(k, orthogonal(rng, k1), orthogonal(rng, k2))
    if rotation == "chain":
        return _C.Rotation(k, chain(rng, k1, False), chain(rng, k2, True))
    return _C.Rotation(k, orthogonal(rng, k1)) if rotation == "left" else None


def packed_twin(values, site, bits):
    """A weight of the NumPy layer: what a packed one makes of its site's value."""
    rotation, _, clip = site

    def weight(x):
        x = x.astype(np.float32)
        if rotation is not None:
            x = _C.rotate(x, rotation)
        if bits < 16:
            codes, scales, _ = _C.quantize(x, bits=bits, clip=clip)
            x = _C.dequantize(codes, scales)
        return x.astype(np.float64) @ values.T

    return weight


def packed_parts(rng, a, bits, rotation="dense", group=0, biases=True):
    """A layer with packed linears, and its twin with functions for weights."""
    sites = {site: (site_factors(rng, k, rotation), bits, 0.95)
             for site, k in site_widths(a).items()}
    site_of = {role: site for site, roles in SITES.items() for role in roles}
    linears, twins = {}, {}
    for role, (n, k) in shapes(a).items():
        w = rng.normal(size=(n, k)) / np.sqrt(k)
        bias = rng.normal(size=n).astype(np.float32) if biases else None
        codes, scales, _ = _C.quantize(w, bits=4, group=group)
        linears[role] = (_C.PackedWeight(_C.pack(codes), scales, k, group), bias)
        values = _C.dequantize(codes, scales).astype(np.float64)
        twins[role] = (packed_twin(values, sites[site_of[role]], bits), bias)
    norms = rng.uniform(0.5, 1.5, size=(2, a["hidden"])).astype(np.float32)
    return llama(a, linears, norms, sites), llama(a, twins, norms, sites)


PACKED = {
    "mha": geometry(64, 96, 4, 4, 16),
    "gqa": geometry(96, 160, 6, 2, 16),
    "odd": geometry(48, 40, 6, 2, 8),
    "window": geometry(64, 96, 4, 1, 16, 5),
}


@pytest.mark.usefixtures("table")
@pytest.mark.parametrize("rotation", ["none", "dense", "chain", "left"])
@pytest.mark.parametrize("name", PACKED)
def test_packed_layer_equals_twin_with_16_bit_activations(rng, name, rotation):
    parts, twin_parts = packed_parts(rng, PACKED[name], 16, rotation)
    hidden = rng.normal(size=(43, parts["hidden"])).astype(np.float32)
    where = tokens([9, 1, 33])
    expected = hidden.astype(np.float64)
    inputs = reference.DecoderLayer(**twin_parts).forward(
        expected, *where, new_cache(reference, parts, 3), 0, record=True
    )
    recorded = _C.DecoderLayer(**parts).forward(
        hidden, *where, new_cache(_C, parts, 3), 0, record=True
    )
    assert_close(hidden, expected, 2e-5)
    for site, one in recorded.items():
        assert_close(one, inputs[site], 2e-5)


@pytest.mark.usefixtures("table")
@pytest.mark.parametrize("bits", [4, 8])
def test_packed_layer_equals_twin_with_codes(rng, bits):
    """A code within 1e-5 of a boundary may differ by one: few values may, and by little."""
    parts, twin_parts = packed_parts(rng, PACKED["gqa"], bits, group=32)
    hidden = rng.normal(size=(33, 96)).astype(np.float32)
    expected = hidden.astype(np.float64)
    cache = new_cache(reference, parts, 1)
    reference.DecoderLayer(**twin_parts).forward(expected, *tokens([33]), cache, 0)
    _C.DecoderLayer(**parts).forward(hidden, *tokens([33]), new_cache(_C, parts, 1), 0)
    error = np.abs(hidden - expected).max(axis=1) / np.abs(expected).max()
    assert np.median(error) < 1e-5
    assert error.max() < (0.1 if bits == 4 else 0.01)


@pytest.mark.usefixtures("table")
@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("name", PACKED)
def test_packed_prompt_equals_one_by_one_bit_for_bit(rng, name, bits):
    parts, _ = packed_parts(rng, PACKED[name], bits)
    layer = _C.DecoderLayer(**parts)
    whole = rng.normal(size=(33, parts["hidden"])).astype(np.float32)
    single, pieces = whole.copy(), whole.copy()
    layer.forward(whole, *tokens([33]), new_cache(_C, parts, 1), 0)
    cache = new_cache(_C, parts, 1, 33)
    for t in range(33):
        layer.forward(single[t : t + 1], [0], [t], cache, 0)
    assert (single == whole).all()
    cache = new_cache(_C, parts, 1, 40)
    for start in range(0, 33, 7):
        part = pieces[start : start + 7]
        layer.forward(part, np.zeros(len(part), int), start + np.arange(len(part)), cache, 0)
    assert (pieces == whole).all()


@pytest.mark.usefixtures("table")
@pytest.mark.parametrize("rotation", ["dense", "chain"])
def test_packed_batch_equals_each_alone_bit_for_bit(rng, rotation):
    parts, _ = packed_parts(rng, PACKED["gqa"], 4, rotation)
    layer = _C.DecoderLayer(**parts)
    lengths = [5, 1, 17, 40, 2, 33, 8, 12]
    together = rng.normal(size=(sum(lengths), 96)).astype(np.float32)
    alone = np.split(together.copy(), np.cumsum(lengths)[:-1])
    layer.forward(together, *tokens(lengths), new_cache(_C, parts, 8), 0)
    for part in alone:
        layer.forward(part, *tokens([len(part)]), new_cache(_C, parts, 1), 0)
    assert (np.concatenate(alone) == together).all()


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("m", [3, 600])
def test_packed_layer_does_not_depend_on_threads(rng, bits, m):
    parts, _ = packed_parts(rng, PACKED["gqa"], bits)
    layer = _C.DecoderLayer(**parts)
    hidden = rng.normal(size=(m, 96)).astype(np.float32)
    seen = set()
    for threads in (1, 2, 3):
        _C.set_num_threads(threads)
        got = hidden.copy()
        layer.forward(got, *tokens([m]), new_cache(_C, parts, 1, m), 0)
        seen.add(got.tobytes())
    assert len(seen) == 1


def test_site_may_mix_packed_and_dense_linears(rng):
    """The dense linear of a rotated site reads the input as it is."""
    parts, twin_parts = packed_parts(rng, PACKED["gqa"], 16)
    dense = ("qkv", rng.normal(size=(32, 96)).astype(np.float16) / 10, None)
    parts["attention"]["v"] = twin_parts["attention"]["v"] = dense
    hidden = rng.normal(size=(9, 96)).astype(np.float32)
    expected = hidden.astype(np.float64)
    twin = reference.DecoderLayer(**twin_parts)
    twin.forward(expected, *tokens([9]), new_cache(reference, parts), 0)
    layer = _C.DecoderLayer(**parts)
    assert "6 of 7 packed" in repr(layer)
    layer.forward(hidden, *tokens([9]), new_cache(_C, parts), 0)
    assert_close(hidden, expected, 2e-5)


def test_layer_is_shared_by_threads_while_their_number_changes(rng):
    parts, _ = packed_parts(rng, PACKED["gqa"], 4)
    layer = _C.DecoderLayer(**parts)
    hidden = rng.normal(size=(200, 96)).astype(np.float32)

    def run(_):
        got = hidden.copy()
        layer.forward(got, *tokens([200]), new_cache(_C, parts, 1, 200), 0)
        return got.tobytes()

    expected = run(0)
    with ThreadPoolExecutor(3) as pool:
        results = [pool.submit(run, i) for i in range(30)]
        for i in range(100):
            _C.set_num_threads(1 + i % 5)
        assert {r.result() for r in results} == {expected}


def test_layer_gives_its_references_back(rng):
    parts, twin_parts = packed_parts(rng, PACKED["gqa"], 4, "chain")
    del twin_parts  # it holds the rotations too
    dense = np.zeros((32, 96), np.float32)
    parts["attention"]["v"] = ("qkv", dense, None)
    rotation = parts["sites"]["qkv"][1]
    watched = [weight_of(parts, "q"), dense, parts["attention"]["rotary"]["inv_freq"], rotation]
    before = [sys.getrefcount(x) for x in watched]
    layer = _C.DecoderLayer(**parts)
    held = [sys.getrefcount(x) for x in watched]
    assert all(now > then for now, then in zip(held, before, strict=True))
    cache = new_cache(_C, parts)
    hidden, sequence = np.ones((1, 96), np.float32), np.zeros(1, np.int64)
    decoder = _C.Decoder([layer])
    arguments = [sys.getrefcount(x) for x in (hidden, sequence, cache, layer, decoder)]
    for _ in range(3):
        layer.forward(hidden, sequence, sequence, cache, 0, record=True)
        decoder.forward(hidden, sequence, sequence, cache)
        with pytest.raises(ValueError, match="position"):
            layer.forward(hidden, sequence, sequence + 64, cache, 0, record=True)
        with pytest.raises(ValueError, match="position"):
            decoder.forward(hidden, sequence, sequence + 64, cache)
    assert [sys.getrefcount(x) for x in (hidden, sequence, cache, layer, decoder)] == arguments
    del layer, decoder
    k, turn, _bits, clip = parts["sites"]["down"]
    parts["sites"]["down"] = k, turn, 3, clip
    with pytest.raises(ValueError, match="site down: bits"):
        _C.DecoderLayer(**parts)
    assert [sys.getrefcount(x) for x in watched] == before


def test_packed_layer_refuses_nan(rng):
    parts, _ = packed_parts(rng, PACKED["gqa"], 4)
    hidden = np.full((1, 96), np.nan, np.float32)
    with pytest.raises(ValueError, match=r"NaN|finite"):
        _C.DecoderLayer(**parts).forward(hidden, [0], [0], new_cache(_C, parts, 1), 0)
