# SPDX-License-Identifier: Apache-2.0
"""Activations of two widths: the leading inputs of a packed linear at 8 bits, the others at 4."""

import numpy as np
import pytest
from blocks import SITES, geometry, llama, shapes
from conftest import pack_codes

import singlequant as sq
from singlequant import _C, _reference as reference

TABLES = _C.kernels()["runnable"]
M = [1, 2, 3, 4, 5, 7, 33]
N = [1, 7, 17, 33]
# (k, group, high): tails of every length, one block of 32, all but one input, groups across both.
WIDTHS = [
    (33, 0, 32), (40, 0, 32), (64, 0, 32), (65, 0, 64), (97, 0, 32), (129, 0, 128), (545, 0, 288),
    (1100, 0, 1088), (64, 32, 32), (160, 32, 96), (512, 64, 64), (512, 128, 384), (1088, 544, 544),
]  # fmt: skip


def problem(m, n, k, group=0, high=0):
    """Tokens with the energy in their high inputs, as principal directions have it."""
    rng = np.random.default_rng([m, n, k])
    words = reference.pack(rng.integers(-8, 8, (n, k)))
    scales = rng.uniform(0.5, 2, (n, k // group if group else 1)).astype(np.float32)
    x = rng.standard_normal((m, k)).astype(np.float32)
    x[:, :high] *= 20
    return x, words, scales


@pytest.mark.parametrize("clip", [1.0, 0.8])
@pytest.mark.parametrize(("k", "group", "high"), WIDTHS)
def test_mixed_linear_equals_twin_bit_for_bit(table, k, group, high, clip):
    for n in N:
        x, words, scales = problem(max(M), n, k, group, high)
        expected = reference.packed_linear(x, words, scales, group, 4, clip, high)
        weight = _C.PackedWeight(words, scales, k, group, high)
        for m in M:
            np.testing.assert_array_equal(_C.linear(x[:m], weight, 4, clip), expected[:m])


@pytest.mark.parametrize(("k", "group", "high"), WIDTHS)
def test_mixed_linear_is_the_same_on_every_table(k, group, high):
    x, words, scales = problem(9, 35, k, group, high)
    found = []
    for name in TABLES:
        _C.use_kernels(name)
        found.append(_C.linear(x, _C.PackedWeight(words, scales, k, group, high), 4, 0.8).tobytes())
    assert len(set(found)) == 1


@pytest.mark.parametrize(("k", "high"), [(96, 32), (545, 288)])
def test_mixed_linear_is_the_sum_of_two_linears(table, k, high):
    """By definition, without the twin: 8 bits unclipped on the left, 4 bits clipped behind."""
    x, words, scales = problem(6, 35, k, 0, high)
    codes = reference.unpack(words, k)
    left = _C.linear(x[:, :high], _C.PackedWeight(_C.pack(codes[:, :high]), scales, high), 8)
    right = _C.PackedWeight(_C.pack(codes[:, high:]), scales, k - high)
    expected = left + _C.linear(x[:, high:], right, 4, 0.8)
    mixed = _C.PackedWeight(words, scales, k, int8_inputs=high)
    np.testing.assert_array_equal(_C.linear(x, mixed, 4, 0.8), expected)


def test_huge_high_inputs_do_not_coarsen_the_others(table):
    """Without the split one step of 1e4 / 7 rounds every other input away; with it they keep 4
    bits. The high columns have code 0, so that the error seen is the others'."""
    x, words, scales = problem(20, 40, 256)
    codes = reference.unpack(words, 256)
    codes[:, :32] = 0
    x[:, 3] = 1e4
    exact = x.astype(np.float64) @ (codes * scales.astype(float)).T
    error = {}
    for high in (0, 32):
        weight = _C.PackedWeight(_C.pack(codes), scales, 256, int8_inputs=high)
        error[high] = np.linalg.norm(_C.linear(x, weight) - exact) / np.linalg.norm(exact)
    assert error[0] == 1
    assert error[32] < 0.2


# 16-bit sums of the 8-bit part are widened every 32 inputs, of the 4-bit part every 544.
@pytest.mark.parametrize(("k", "high"), [(64, 32), (608, 64), (640, 96), (1664, 1088)])
@pytest.mark.parametrize("weight_code", [-8, 7])
def test_mixed_worst_case_sums_are_exact(table, k, high, weight_code):
    for sign in (-1, 1):
        x = np.full((4, k), sign, np.float32)
        weight = _C.PackedWeight(pack_codes(np.full((17, k), weight_code)), np.ones(17), k,
                                 int8_inputs=high)
        low = -8 if sign < 0 else 7  # clipped at half the maximum: every code saturates
        rest = np.float32(0.5) / np.float32(7) * np.float32((k - high) * weight_code * low)
        left = np.float32(1) / np.float32(127) * np.float32(high * weight_code * sign * 127)
        np.testing.assert_array_equal(
            _C.linear(x, weight, 4, 0.5), np.full((4, 17), rest + left)
        )


@pytest.mark.parametrize(("n", "k", "group", "high"), [(33, 97, 0, 32), (70, 1088, 0, 544),
                                                       (64, 512, 64, 128)])
def test_mixed_tokens_do_not_depend_on_the_batch(table, n, k, group, high):
    x, words, scales = problem(75, n, k, group, high)
    weight = _C.PackedWeight(words, scales, k, group, high)
    whole = _C.linear(x, weight)
    for m in (1, 2, 3, 4, 5, 6, 7, 9, 74):
        np.testing.assert_array_equal(_C.linear(x[-m:], weight), whole[-m:])


def test_mixed_linear_does_not_depend_on_threads(table):
    x, words, scales = problem(9, 1100, 512, 0, 64)
    weight, results = _C.PackedWeight(words, scales, 512, int8_inputs=64), set()
    for threads in (1, 2, 3):
        _C.set_num_threads(threads)
        results.add(_C.linear(x, weight).tobytes())
    assert len(results) == 1


def test_mixed_weight_made_under_one_table_serves_under_another():
    x, words, scales = problem(5, 20, 128, 0, 32)
    expected = reference.packed_linear(x, words, scales, high=32)
    for made in TABLES:
        _C.use_kernels(made)
        weight = _C.PackedWeight(words, scales, 128, int8_inputs=32)
        assert (weight.int8_inputs, weight.kernels) == (32, made)
        for used in TABLES:
            _C.use_kernels(used)
            np.testing.assert_array_equal(_C.linear(x, weight), expected)


def test_mixed_zero_parts_are_zero(table):
    x, words, scales = problem(3, 9, 70, 0, 32)
    x[0, :32] = 0
    x[1, 32:] = 0
    x[2] = 0
    found = _C.linear(x, _C.PackedWeight(words, scales, 70, int8_inputs=32))
    np.testing.assert_array_equal(found, reference.packed_linear(x, words, scales, high=32))
    assert not found[2].any()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_mixed_linear_rejects_nonfinite_in_either_part(table, bad):
    x, words, scales = problem(4, 9, 70, 0, 32)
    weight = _C.PackedWeight(words, scales, 70, int8_inputs=32)
    for position in (0, 31, 32, 69):
        broken = x.copy()
        broken[2, position] = bad
        with pytest.raises(ValueError, match="x: NaN or Inf found"):
            _C.linear(broken, weight)


@pytest.mark.parametrize(("k", "group", "high", "step"), [
    (96, 0, 16, 32), (96, 0, 33, 32), (96, 0, -32, 32), (96, 0, 96, 32), (96, 0, 128, 32),
    (32, 0, 32, 32), (31, 0, 32, 32), (128, 64, 32, 64), (128, 64, 96, 64), (128, 64, 128, 64),
    (96, 0, 2**62, 32),
])  # fmt: skip
def test_high_that_is_no_whole_block_below_k_is_refused(k, group, high, step):
    _, words, scales = problem(1, 4, k, group)
    with pytest.raises(
        ValueError, match=f"^int8_inputs: expected a multiple of {step} below k = {k}, got {high}$"
    ):
        _C.PackedWeight(words, scales, k, group, high)


@pytest.mark.parametrize("bits", [8, 16])
def test_other_bits_with_high_inputs_are_refused(bits):
    x, words, scales = problem(2, 4, 96)
    weight = _C.PackedWeight(words, scales, 96, int8_inputs=32)
    with pytest.raises(ValueError, match=f"bits: expected 4, as the weight has .*, got {bits}"):
        _C.linear(x, weight, bits)


# ---- a layer ------------------------------------------------------------------------------------

HIDDEN, INTERMEDIATE = 64, 96
GEOMETRY = geometry(HIDDEN, INTERMEDIATE, 2, 2, 32, rotary={"inv_freq": np.ones(16, np.float32)})


def layer(highs, bits=4):
    """A layer of packed linears, q k v o gate up down, each with its own number of high inputs."""
    rng = np.random.default_rng(0)
    linears = {
        role: (_C.PackedWeight(pack_codes(rng.integers(-8, 8, (n, k))),
                               rng.uniform(0.01, 0.02, n).astype(np.float32), k,
                               int8_inputs=high), None)
        for (role, (n, k)), high in zip(shapes(GEOMETRY).items(), highs, strict=True)
    }  # fmt: skip
    sites = dict.fromkeys(SITES, (None, bits, 0.9))
    return _C.DecoderLayer(**llama(GEOMETRY, linears, sites=sites))


def forward(a_layer):
    hidden = np.random.default_rng(1).standard_normal((3, HIDDEN)).astype(np.float32)
    before = hidden.copy()
    a_layer.forward(hidden, [0, 0, 0], [0, 1, 2], _C.KVCache(1, 1, 2, 32, 4), 0)
    return hidden - before


def test_layer_takes_another_number_at_each_site(table):
    plain, mixed = forward(layer([0] * 7)), forward(layer([32, 32, 32, 0, 32, 32, 64]))
    assert np.isfinite(mixed).all()
    assert (plain != mixed).any()


@pytest.mark.parametrize("highs", [
    [32, 0, 0, 0, 0, 0, 0], [32, 32, 0, 0, 0, 0, 0], [0, 0, 32, 0, 0, 0, 0], [0, 0, 0, 0, 32, 0, 0],
])  # fmt: skip
def test_linears_of_a_site_that_disagree_are_refused(highs):
    with pytest.raises(ValueError, match=r"^site \w+: expected \d+ inputs of 8 bits as in"):
        layer(highs)


@pytest.mark.parametrize("bits", [8, 16])
def test_layer_of_other_bits_refuses_high_inputs(bits):
    message = f"^site o: bits: expected 4, as attention.o has inputs of 8 bits, got {bits}"
    with pytest.raises(ValueError, match=message):
        layer([0, 0, 0, 32, 0, 0, 0], bits=bits)


# ---- a folder -----------------------------------------------------------------------------------


@pytest.fixture(params=[0, 32])
def folder(request, make_checkpoint, tmp_path, text):
    model = make_checkpoint(tmp_path / "m", hidden=128, intermediate=256, heads=4, kv_heads=2)
    config = sq.QuantConfig("w4a4", "balanced", bits=4, calibration_tokens=256,
                            group_size=request.param)
    sq.quantize_folder(model, tmp_path / "out", config, text)
    return tmp_path / "out"


def test_balanced_folder_has_high_inputs_everywhere(folder):
    layers = [sq.load_checkpoint(folder).layer(i) for i in range(2)]
    for weights in layers:
        assert weights.int8_inputs == {"qkv": 32, "o": 32, "gate_up": 32, "down": 64}


def test_prefill_equals_decode_bit_for_bit_with_high_inputs(table, folder):
    model = sq.load(folder)
    batch = np.random.default_rng(0).integers(0, 320, (3, 12))
    together = model.new_session(3, 12).append(list(batch)).reshape(3, 12, -1)
    for tokens, whole in zip(batch, together, strict=True):
        session = model.new_session(1, 12)
        steps = np.concatenate([session.append([tokens[i : i + 1]]) for i in range(12)])
        np.testing.assert_array_equal(steps, whole)
        session = model.new_session(1, 12)
        pieces = np.concatenate([session.append([part]) for part in np.split(tokens, [1, 4, 5])])
        np.testing.assert_array_equal(pieces, whole)
