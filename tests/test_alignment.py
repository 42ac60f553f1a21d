"""Alignment: the matrices of the core against their twins, and what the weights make of them."""

from dataclasses import replace

import numpy as np
import pytest
from conftest import make_checkpoint
from format_reader import read_model, rotate

import singlequant as sq
from singlequant import _C, _reference as reference
from singlequant.config import QuantConfig
from singlequant.export.writer import ModelWriter
from singlequant.methods.align import align_blocks, align_values
from singlequant.methods.solve import balanced_statistics, solve_site
from singlequant.rotations import Alignment, Factor, SiteRotation
from singlequant.sweep.calibrate import site_statistics
from singlequant.sweep.layer import (
    producer_blocks,
    quantize_layer,
    transform_inputs,
    transform_rows,
)


def mixed(rows, k, seed=0):
    """Correlated channels of very different sizes."""
    rng = np.random.default_rng(seed)
    mix = rng.standard_normal((k, k)) * np.exp(rng.standard_normal(k))
    return (rng.standard_normal((rows, k)) @ mix).astype(np.float32)


def statistics(k=48, **facts):
    return site_statistics(mixed(400, k), [mixed(60, k, 1)], **facts)


@pytest.mark.parametrize(("m", "k", "b"), [(300, 24, 8), (1, 6, 6), (513, 10, 1), (0, 4, 2)])
def test_block_gram_equals_its_twin(m, k, b):
    x = np.random.default_rng(0).standard_normal((m, k)).astype(np.float32)
    whole = _C.block_gram(x, b)
    np.testing.assert_allclose(whole, reference.block_gram(x, b), rtol=1e-5, atol=1e-4)
    np.testing.assert_array_equal(_C.block_gram(x[256:], b, _C.block_gram(x[:256], b)), whole)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("b", "rows"), [(1, 5), (7, 100), (16, 4)])
def test_align_blocks_equals_its_twin_up_to_signs(b, rows, symmetric):
    grams = [_C.block_gram(mixed(rows, 3 * b, seed), b) for seed in (0, 1)]
    for found, twin in zip(_C.align_blocks(*grams, 0.01, symmetric),
                           reference.align_blocks(*grams, 0.01, symmetric), strict=True):
        if not symmetric:  # an eigenvector may point both ways
            found, twin = np.abs(found), np.abs(twin)
        scale = np.abs(twin).max(axis=(1, 2), keepdims=True)
        np.testing.assert_allclose(found / scale, twin / scale, atol=1e-6)


def test_aligned_gram_matrices_are_equal_and_diagonal():
    grams = [_C.block_gram(mixed(500, 32, seed), 16) for seed in (0, 1)]

    def damped(gram):
        typical = np.sort(np.diagonal(gram, axis1=1, axis2=2), axis=1)[:, 8]
        return gram + 0.01 * typical[:, None, None] * np.eye(16)

    for symmetric in (False, True):
        m, inverse_t = _C.align_blocks(*grams, 1e-9, symmetric)
        x_gram, w_gram = map(damped, grams)
        x, w = m.transpose(0, 2, 1) @ x_gram @ m, inverse_t.transpose(0, 2, 1) @ w_gram @ inverse_t
        largest = np.abs(x).max()
        np.testing.assert_allclose(x / largest, w / largest, atol=1e-6)
        off = x * (1 - np.eye(16))
        assert (np.abs(off).max() < 1e-6 * largest) != symmetric
        assert np.array_equal(m, m.transpose(0, 2, 1)) or not symmetric
        # the least product of the two sums of squares that any M has: a random one is worse
        other = np.random.default_rng(2).standard_normal((16, 16)) + 4 * np.eye(16)
        worse = np.trace(other.T @ x_gram[0] @ other) * np.trace(
            np.linalg.inv(other) @ w_gram[0] @ np.linalg.inv(other).T)
        assert np.trace(x[0]) * np.trace(w[0]) < worse


def test_damping_shrinks_to_the_balance():
    x_gram, w_gram = (_C.block_gram(mixed(500, 8, seed), 8) for seed in (0, 1))
    m, _ = _C.align_blocks(x_gram, w_gram, 1e6, True)
    balance = (np.diag(w_gram[0]) / np.diag(x_gram[0])) ** 0.25
    np.testing.assert_allclose(m[0] / balance[0], np.diag(balance) / balance[0], atol=1e-5)


def test_silent_channels_are_not_magnified():
    x, w = mixed(40, 8), mixed(9, 8, 1)
    x[:, 2], w[:, 5] = 0, 0
    for symmetric in (False, True):
        m, inverse_t = _C.align_blocks(_C.block_gram(x, 4), _C.block_gram(w, 4), 0.01, symmetric)
        np.testing.assert_allclose(m @ inverse_t.transpose(0, 2, 1), [np.eye(4)] * 2, atol=1e-6)
        lengths = np.linalg.norm(m[0], axis=1)  # of what a unit of each channel becomes
        assert lengths[2] < 10 * np.median(lengths)


@pytest.mark.parametrize(("arguments", "message"), [
    ((np.ones((1, 2, 3)), np.ones((1, 2, 3)), 0.1), r"x_gram: expected shape\[2\] = 2, got 3"),
    ((np.ones((1, 2, 2)), np.ones((2, 2, 2)), 0.1), r"w_gram: expected shape\[0\] = 1, got 2"),
    ((np.ones((1, 2, 2)), np.ones((1, 2, 2)), 0.0), "damping: expected more than 0"),
    ((np.full((1, 2, 2), np.nan), np.ones((1, 2, 2)), 0.1), "x_gram, w_gram: .*NaN"),
    ((-np.eye(2)[None], np.eye(2)[None], 0.1), "expected positive semidefinite matrices"),
])
def test_align_blocks_names_what_it_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        _C.align_blocks(*arguments)


@pytest.mark.parametrize(("k", "blocks", "message"), [
    (8, np.zeros((2, 4, 4)), "align: expected invertible matrices .* got inf"),
    (8, np.full((2, 4, 4), np.nan), "align: expected invertible matrices .* got nan"),
    (8, np.diag([1, 1, 1, 1e-7])[None].repeat(2, 0), r"align: .* got 1e\+07"),
    (8, np.eye(4)[None], "align: expected blocks of k = 8 channels, got 1 x 4"),
    (8, np.ones((2, 4, 3)), "align: expected square blocks"),
])
def test_rotation_refuses_blocks_that_cannot_be_undone(k, blocks, message):
    with pytest.raises(ValueError, match=message):
        _C.Rotation(k, align=blocks)


def test_an_aligned_row_is_the_same_bits_on_every_path():
    """Few tokens are shared out over threads, many are not."""
    rng = np.random.default_rng(0)
    k1, k2 = 96, 64
    blocks = np.eye(k2) + 0.1 * rng.standard_normal((k1, k2, k2))
    rotation = _C.Rotation(k1 * k2, _C.random_orthogonal(k1, 1), align=blocks)
    x = rng.standard_normal((9, k1 * k2)).astype(np.float32)
    words = rng.integers(-(2**31), 2**31, (8, k1 * k2 // 8)).astype(np.int32)
    weight = _C.PackedWeight(words, np.ones((8, 1), np.float32), k1 * k2)
    before = _C.get_num_threads()
    try:
        _C.set_num_threads(1)
        turned, whole = _C.rotate(x, rotation), _C.linear(x, weight, 8, 1.0, rotation)
        np.testing.assert_array_equal(whole, _C.linear(turned, weight, 8, 1.0))
        for threads in (1, 3):
            _C.set_num_threads(threads)
            for m in (1, 2, 9):
                np.testing.assert_array_equal(_C.rotate(x[:m], rotation), turned[:m])
                np.testing.assert_array_equal(_C.linear(x[:m], weight, 8, 1.0, rotation),
                                              whole[:m])
    finally:
        _C.set_num_threads(before)


def test_site_rotation_of_an_alignment_leaves_the_product():
    k, x, w = 48, mixed(400, 48), mixed(60, 48, 1)
    align = align_blocks(statistics(k), 0.03, False)
    b = align.matrices.shape[1]
    for right in (Factor.identity(b), Factor(b, True, np.zeros((0, 2), np.int32), np.zeros(0))):
        rotation = SiteRotation(Factor.identity(k // b), right, align=align)
        assert rotation.merged[1] is None
        assert rotation.core.kind == "aligned"
        y = transform_inputs(x, rotation).astype(float) @ transform_rows(w, rotation).T
        exact = x.astype(float) @ w.T
        np.testing.assert_allclose(y, exact, atol=1e-5 * np.abs(exact).max())
    with pytest.raises(ValueError, match="align: expected blocks of 24 inputs, found 48"):
        SiteRotation(Factor.identity(4), Factor.identity(6), align=align)


def test_blocks_beyond_16_bits_are_stored_in_32():
    wide = Alignment(np.eye(4)[None] * 1e6, np.eye(4)[None] * 1e-6)
    assert (wide.stored().dtype, replace(wide, matrices=np.eye(4)[None]).stored().dtype) == (
        np.float32, np.float16)
    with pytest.raises(ValueError, match="inverse_t: expected finite square blocks"):
        Alignment(np.eye(4)[None], np.full((1, 4, 4), np.inf))


def test_value_heads_share_a_block_and_take_the_balance_in():
    s = statistics(48, shared=(3, 2, 8), reads="attention")
    align = align_values(s, 0.1, True)
    heads = align.matrices.reshape(3, 2, 8, 8)
    assert align.folded
    np.testing.assert_array_equal(heads[:, 0], heads[:, 1])
    assert align_values(replace(s, foldable=False), 0.1, True) is None
    rotation = solve_site(s, "aligned")
    assert rotation.balance is None
    assert rotation.core.kind == "kronecker"
    y = transform_inputs(s.sample, rotation) @ transform_rows(s.weights, rotation).T.astype(float)
    exact = s.sample @ s.weights.T.astype(float)
    np.testing.assert_allclose(y, exact, atol=1e-5 * np.abs(exact).max())


def test_balanced_statistics_have_the_gram_matrices_of_balanced_inputs():
    s = statistics()
    balance = np.exp(np.random.default_rng(3).standard_normal(48)).astype(np.float32)
    found = balanced_statistics(s, balance)
    x, w = mixed(400, 48) / balance, mixed(60, 48, 1) * balance
    np.testing.assert_allclose(found.gram, _C.block_gram(x, s.block), rtol=1e-4, atol=1e-2)
    np.testing.assert_allclose(found.weight_gram, _C.block_gram(w, s.block), rtol=1e-4, atol=1e-2)


@pytest.fixture(scope="module")
def solved(tmp_path_factory):
    path = make_checkpoint(tmp_path_factory.mktemp("aligned") / "m", layers=2)
    checkpoint = sq.load_checkpoint(path)
    config = QuantConfig(method="aligned", scheme="w4a8")
    windows = np.random.default_rng(0).integers(0, checkpoint.spec.vocab, (6, 32))
    layers = sq.calibrate(checkpoint, windows)
    return checkpoint, config, list(sq.solve_rotations(layers, config))


def test_folding_into_v_leaves_what_o_gives(solved):
    checkpoint, config, (rotations, _) = solved
    spec, linears = checkpoint.spec.layer(0), checkpoint.layer(0).linears
    v, o = (_C.to_float32(linears[role].weight) for role in ("v", "o"))
    turn = rotations.sites["o"]
    blocks = producer_blocks(spec, rotations)["v"]
    folded = _C.rotate(np.ascontiguousarray(v.T), blocks).T
    kv_heads, d = spec.attention.kv_heads, spec.attention.value_channels
    queries = spec.attention.heads // kv_heads
    x = np.random.default_rng(1).standard_normal((5, v.shape[1])).astype(np.float32)

    def heads(rows):  # each query reads its value head
        return np.repeat((x @ rows.T).reshape(5, kv_heads, 1, d), queries, axis=2).reshape(5, -1)

    got = _C.rotate(heads(folded).astype(np.float32), turn.core) @ transform_rows(o, turn).T
    expected = heads(v) @ o.T
    np.testing.assert_allclose(got, expected, atol=1e-4 * np.abs(expected).max())
    ignoring = replace(config, ignore=("*v_proj",))
    dense = quantize_layer(checkpoint, rotations, ignoring).dense
    np.testing.assert_allclose(dense[f"{linears['v'].name}.weight"],
                               folded * rotations.sites["qkv"].balance, rtol=1e-6)


def test_aligned_folder_is_what_was_solved(solved, tmp_path):
    checkpoint, config, rotations = solved
    with ModelWriter(tmp_path / "out", checkpoint, config) as writer:
        for layer in rotations:
            writer.write_layer(quantize_layer(checkpoint, layer, config))
        writer.finish()
    opened, (_, tensors) = sq.load_checkpoint(tmp_path / "out"), read_model(tmp_path / "out")
    for layer in rotations:
        found = opened.layer(layer.layer).rotations
        assert (found["o"].kind, found["down"].kind) == ("kronecker", "aligned")
        for name, rotation in layer.sites.items():
            x = np.random.default_rng(0).standard_normal((4, rotation.k)).astype(np.float32)
            expected = _C.rotate(x, rotation.core)
            np.testing.assert_array_equal(_C.rotate(x, found[name]), expected)
            plain = rotate(tensors, layer.layer, name, x)
            np.testing.assert_allclose(plain, expected, atol=1e-5 * np.abs(expected).max())
    tokens, model = np.arange(12)[None] % checkpoint.spec.vocab, sq.load(tmp_path / "out")
    whole = model.forward(tokens)
    np.testing.assert_array_equal(model.forward(tokens[:, :5]), whole[:, :5])
