"""Faults that were found once in the core: each with the call that showed it."""

import signal
import threading

import ml_dtypes
import numpy as np
import pytest
from blocks import geometry, llama, shapes

from singlequant import _C

SIZES = geometry(8, 8, 1, 1, 8, eps=1e-6, rotary={"inv_freq": np.ones(4, np.float32)})


def layer(norms=None, value_scale=1.0):
    rng = np.random.default_rng(0)
    weights = {role: rng.standard_normal((8, 8)).astype(np.float32) for role in shapes(SIZES)}
    weights["v"] *= np.float32(value_scale)
    linears = {role: (w, None) for role, w in weights.items()}
    return _C.DecoderLayer(**llama(SIZES, linears, norms))


def run(decoder, hidden):
    hidden = hidden.copy()
    m = len(hidden)
    decoder.forward(hidden, np.zeros(m, int), np.arange(m), _C.KVCache(1, 1, 1, 8, 4), 0)
    return hidden


def test_later_token_that_is_not_finite_leaves_earlier_ones_alone():
    hidden = np.random.default_rng(2).standard_normal((2, 8)).astype(np.float32)
    hidden[1, 0] = np.inf
    decoder = layer()
    np.testing.assert_array_equal(run(decoder, hidden)[0], run(decoder, hidden[:1])[0])


def test_positions_changed_by_another_thread_are_refused_or_harmless():
    decoder, cache = layer(), _C.KVCache(1, 1, 1, 8, 4)
    position, stop = np.zeros(1, np.int64), threading.Event()

    def flip():
        while not stop.is_set():
            position[0] = 1 << 40
            position[0] = 0

    thread = threading.Thread(target=flip)
    thread.start()
    try:
        outcomes = set()
        for _ in range(300):
            hidden = np.ones((1, 8), np.float32)
            try:
                decoder.forward(hidden, np.zeros(1, int), position, cache, 0)
                outcomes.add(bool(np.isfinite(hidden).all()))
            except ValueError:
                outcomes.add(None)
    finally:
        stop.set()
        thread.join()
    assert False not in outcomes


def test_dict_that_empties_itself_while_it_is_read_is_survived():
    linears = dict.fromkeys(shapes(SIZES), (np.ones((8, 8), np.float32), None))
    arguments = llama(SIZES, linears)
    values = arguments["attention"]

    class Emptying:
        def __index__(self):
            values.clear()
            return 8

    values["head_dim"] = Emptying()
    decoder = _C.DecoderLayer(**arguments)
    assert not values
    assert np.isfinite(run(decoder, np.ones((1, 8), np.float32))).all()


def test_bit_patterns_may_be_unsigned():
    assert _C.unpack(np.array([[0xFFFFFFFF]], np.uint32), 8).tolist() == [[7] * 8]
    codes, scales, zeros = _C.quantize([[10.0, 11.0, 12.0, 13.0]], 8, 0, False)
    np.testing.assert_array_equal(
        _C.dequantize(codes.view(np.uint8), scales, zeros), _C.dequantize(codes, scales, zeros)
    )


def test_big_endian_bfloat16_is_read():
    swapped = np.ones(3, ml_dtypes.bfloat16)
    swapped = swapped.astype(swapped.dtype.newbyteorder(">"))
    np.testing.assert_array_equal(_C.to_float32(swapped), np.ones(3, np.float32))


def test_sweeping_one_column_ends():
    pairs, angles, columns = _C.uniformity_sweep(np.ones((1, 5)), 1 << 60)
    assert len(pairs) == len(angles) == 0
    np.testing.assert_array_equal(columns, np.ones((1, 5)))


def test_absurd_row_length_is_an_error():
    with pytest.raises(ValueError, match="words"):
        _C.unpack(np.zeros((1, 1), np.int32), 2**63 - 1)


@pytest.mark.parametrize("call", [
    lambda n: _C.decode_fp8(np.empty((1, n, 0), np.uint8), np.empty((1, n, 0), np.float32), 1, 1),
    lambda n: _C.decode_mxfp4(np.empty((1, 0, n, 16), np.uint8), np.empty((1, 0, n), np.uint8))])
def test_rows_without_elements_take_no_time(call):
    def late(*_):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(60)
    try:
        assert call(1 << 44).size == 0
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
