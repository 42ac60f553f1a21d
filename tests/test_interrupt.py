# SPDX-License-Identifier: Apache-2.0
"""A signal's handler runs within a second of any long call, and what it raises ends the call."""

from __future__ import annotations

import os
import signal
import threading
import time
from functools import partial

import ml_dtypes
import numpy as np
import pytest
from blocks import geometry, llama, new_cache, shapes, tokens

import singlequant as sq
from singlequant import _C

LONGEST = 1.0  # s from the signal to the exception
WANTED = 2.0  # s that a call would take: machines differ, so the work is sized by a small one
DELAY = 0.3  # s from the begin of the call to the signal
TRIES = 4  # another process may take the CPUs, or leave them, in between

RNG = np.random.default_rng(0)


def f32(*shape):
    return RNG.standard_normal(shape, np.float32)


def spd(n):
    x = RNG.standard_normal((n + 8, n))
    return x.T @ x


def words(n, k):
    return RNG.integers(-(2**31), 2**31, (n, k // 8)).astype(np.int32)


SQUARE = f32(2048, 2048)
HALF = SQUARE.astype(ml_dtypes.bfloat16)
PACKED = _C.PackedWeight(words(2048, 2048), np.ones((2048, 1), np.float32), 2048)
FACTOR = _C.gptq_factor(_C.gram(f32(1200, 1024)))
BYTES = _C.quantize_rows(SQUARE, 8)
CHAIN = np.tile([[0, 1], [1, 2]], (10_000, 1)).astype(np.int32)
TURN = _C.Rotation(2048, np.linalg.qr(f32(32, 32))[0], np.linalg.qr(f32(64, 64))[0])
ANGLES = np.ones(len(CHAIN))
LONG_TURN = _C.Rotation(2048, (2048, False, CHAIN, ANGLES))
STEPS = _C.duquant_steps(256, 64, 0)
ONE = np.ones((1, 1))


def layer_parts():
    a = geometry(256, 512, 8, 4, 32)
    linears = {role: (f32(n, k) / np.float32(k**0.5), None) for role, (n, k) in shapes(a).items()}
    return llama(a, linears)


PARTS = layer_parts()
LAYER = _C.DecoderLayer(**PARTS)


def forward(m):
    hidden, cache = f32(m, 256), new_cache(_C, PARTS, 1, m)
    return lambda: LAYER.forward(hidden.copy(), *tokens([m]), cache, 0)


def normal(*shape):
    return RNG.standard_normal(shape)


orthogonal = _C.random_orthogonal


def near_identity(n):
    return (np.eye(n) + normal(n, n) / (8 * n))[None]


# name -> (a call that works on so many rows, the rows to begin with, the power by which work grows)
CALLS = {
    "linear": (lambda m: partial(_C.linear, f32(m, 2048), PACKED), 64, 1),
    "linear_a16": (lambda m: partial(_C.linear, f32(m, 2048), PACKED, 16), 64, 1),
    "linear_dense": (lambda m: partial(_C.linear_dense, f32(m, 2048), SQUARE), 64, 1),
    "linear_bfloat16": (lambda m: partial(_C.linear_dense, f32(m, 2048), HALF), 128, 1),
    "linear_rows": (lambda m: partial(_C.linear_rows, f32(m, 2048), *BYTES, 8), 64, 1),
    "forward": (forward, 256, 2),
    "quantize": (lambda m: partial(_C.quantize, f32(m, 2048), 4, 0, True, 1.0, True), 64, 1),
    "quantize_rows": (lambda m: partial(_C.quantize_rows, f32(m, 2048), 4), 64, 1),
    "quantize_weight": (lambda m: partial(_C.quantize_weight, f32(m, 2048), 0, True, TURN), 64, 1),
    "rotate": (lambda m: partial(_C.rotate, f32(m, 2048), LONG_TURN), 64, 1),
    "gram": (lambda m: partial(_C.gram, f32(m, 2048)), 256, 1),
    "gptq_factor": (lambda k: partial(_C.gptq_factor, _C.gram(f32(k + 64, k))), 512, 3),
    "gptq_round": (lambda n: partial(_C.gptq_round, f32(n, 1024), *FACTOR), 64, 1),
    "axis_gram": (lambda m: partial(_C.axis_gram, f32(m, 2048), 2048, 1), 64, 1),
    "block_gram": (lambda m: partial(_C.block_gram, f32(m, 1024), 1024), 256, 1),
    "block_energy": (lambda b: partial(_C.block_energy, [spd(b)], [spd(b)]), 128, 3),
    "align_blocks": (lambda b: partial(_C.align_blocks, [spd(b)], [spd(b)], 0.1), 32, 3),
    "principal_directions": (lambda n: partial(_C.principal_directions, spd(n)), 64, 3),
    "chain_from_matrix": (lambda n: partial(_C.chain_from_matrix, orthogonal(n, 0)), 128, 3),
    "chain_apply": (lambda m: partial(_C.chain_apply, CHAIN, ANGLES, normal(m, 64)), 64, 1),
    "art_columns": (lambda n: partial(_C.art_columns, normal(n, 4), 1 << 20), 1024, 2),
    "uniformity_sweep": (lambda n: partial(_C.uniformity_sweep, normal(n, 256), 2), 64, 2),
    "random_orthogonal": (lambda n: partial(_C.random_orthogonal, n, 1), 128, 3),
    "duquant_blocks": (lambda m: partial(_C.duquant_blocks, f32(m, 256), STEPS), 64, 1),
    "Rotation": (lambda n: partial(_C.Rotation, n, ONE, np.eye(n), near_identity(n)), 64, 3),
}


class Stop(Exception):
    """What a handler of these tests raises."""


@pytest.fixture(autouse=True)
def usual_handler():
    """A shell starts what runs in the background with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def long_call():
    """Some 2 s of work for the whole pool."""
    make, rows, power = CALLS["linear_dense"]
    return make(sized(make, rows, power))


def seconds(call):
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def sized(make, rows, power):
    """So many rows that make(rows)() takes WANTED seconds. The faster of two counts: a process that
    takes the CPUs during one would make the call too short."""
    while (taken := min(seconds(make(rows)) for _ in range(2))) < 0.1:
        rows = int(rows * 2 ** (1 / power)) + 1
    return int(rows * (WANTED / taken) ** (1 / power))


def latency(call, number=signal.SIGINT, exception=KeyboardInterrupt):
    """Seconds from a signal amid the call to the exception; None if the call was over by then."""
    sent, over = [], False

    def send():
        time.sleep(DELAY)
        sent.append(time.perf_counter())
        os.kill(os.getpid(), number)

    sender = threading.Thread(target=send)
    sender.start()
    try:
        call()
        over = True
        sender.join()
        time.sleep(0.01)  # the handler runs here at the latest
    except exception:
        return None if over else time.perf_counter() - sent[0]
    finally:
        sender.join()
    pytest.fail("the handler did not raise")


def assert_interrupted(make, rows, power):
    found = []
    rows = sized(make, rows, power)
    for _ in range(TRIES):
        found.append(latency(make(rows)))
        if found[-1] is None:
            rows = int(rows * 2 ** (1 / power)) + 1
        elif found[-1] < LONGEST:
            return
    pytest.fail(f"seconds from the signal to the exception: {found}")


def same(a, b):
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a is b or np.array_equal(a, b)


@pytest.mark.parametrize("name", CALLS)
def test_call_is_interrupted_and_the_next_one_is_right(name):
    make, rows, power = CALLS[name]
    small = make(rows)
    expected = small()
    assert_interrupted(make, rows, power)
    if name == "Rotation":
        assert small().k == expected.k
    else:
        assert same(small(), expected)


def test_cache_forgets_an_interrupted_forward():
    def states(cache, lengths):
        parts = []
        for begin, end in lengths:
            hidden, at = start[begin:end].copy(), np.arange(begin, end)
            LAYER.forward(hidden, np.zeros(end - begin, np.int64), at, cache, 0)
            parts.append(hidden)
        return np.concatenate(parts)

    start = f32(40, 256)
    rows = sized(forward, 256, 2)
    expected = states(new_cache(_C, PARTS, 1, 40, bits=4), [(0, 30), (30, 40)])
    cache = new_cache(_C, PARTS, 1, 30 + rows, bits=4)
    states(cache, [(0, 30)])
    at, hidden = np.arange(30, 30 + rows), f32(rows, 256)
    assert latency(lambda: LAYER.forward(hidden, np.zeros(rows, np.int64), at, cache, 0))
    np.testing.assert_array_equal(states(cache, [(30, 40)]), expected[30:])


def test_session_is_as_it_was_before_an_interrupted_append():
    model = sq.load(sq.bundled_model())
    prompt, more = np.arange(5, 45), np.arange(50, 60)
    expected = model.new_session(1, 64)
    first, second = expected.append([prompt]), expected.append([more])

    def grow(rows):
        session = model.new_session(rows + 1, 128)
        session.append([prompt], [0])
        many = [np.arange(5, 105)] * rows
        return session, lambda: session.append(many, list(range(1, rows + 1)))

    rows = sized(lambda rows: grow(rows)[1], 2, 1)
    session, call = grow(rows)
    assert latency(call) is not None
    assert session.lengths.tolist() == [40] + [0] * rows
    np.testing.assert_array_equal(session.append([more], [0]), second)
    np.testing.assert_array_equal(session.append([prompt], [1]), first)


def test_sigterm_ends_a_call_too(long_call):
    def handle(*_):
        raise Stop

    usual = signal.signal(signal.SIGTERM, handle)
    try:
        found = (latency(long_call, signal.SIGTERM, Stop) for _ in range(TRIES))
        assert any(seconds is not None for seconds in found)
    finally:
        signal.signal(signal.SIGTERM, usual)


def during(long_call, handle):
    """Result of the call and whether `handle` ran before its end, as SIGINT's handler."""
    ran = []
    signal.signal(signal.SIGINT, lambda *_: ran.append((time.perf_counter(), handle())))
    timer = threading.Timer(DELAY, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    result = long_call()
    end = time.perf_counter()
    timer.join()
    return result, bool(ran) and end - ran[0][0] > DELAY


def test_handler_that_returns_leaves_the_call_alone(long_call):
    expected = long_call()
    for _ in range(TRIES):
        result, ran = during(long_call, lambda: None)
        np.testing.assert_array_equal(result, expected)
        if ran:
            return
    pytest.fail("the handler waited for the end of the call")


def test_handler_may_call_the_core_but_not_change_its_threads(long_call):
    x, found, refused = f32(64, 2048), [], []
    expected, inner = long_call(), _C.linear_dense(x, SQUARE)
    threads = sq.get_num_threads()
    sq.set_num_threads(2)

    def handle():
        found.append(_C.linear_dense(x, SQUARE))
        try:
            sq.set_num_threads(1)
        except RuntimeError as error:
            refused.append(str(error))

    try:
        result, ran = during(long_call, handle)
    finally:
        sq.set_num_threads(threads)
    np.testing.assert_array_equal(result, expected)
    np.testing.assert_array_equal(found[0], inner)
    assert refused or not ran


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # CPython's note on forking with threads
def test_handler_may_fork_but_the_call_ends_in_the_child(long_call):
    expected, children = long_call(), []
    parent = os.getpid()
    try:
        result, _ = during(long_call, lambda: children.append(os.fork()))
    except RuntimeError:
        os._exit(3 if os.getpid() != parent else 4)
    if os.getpid() != parent:
        os._exit(0 if np.array_equal(result, expected) else 5)
    np.testing.assert_array_equal(result, expected)
    assert os.waitstatus_to_exitcode(os.waitpid(children[0], 0)[1]) in (0, 3)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # CPython's note on forking with threads
def test_threads_fork_while_the_main_thread_asks(long_call):
    stop = threading.Event()

    def fork():
        while not stop.is_set():
            child = os.fork()
            if child == 0:
                os._exit(0)
            os.waitpid(child, 0)

    expected = long_call()
    thread = threading.Thread(target=fork)
    thread.start()
    try:
        np.testing.assert_array_equal(long_call(), expected)
    finally:
        stop.set()
        thread.join()


def test_call_of_another_thread_goes_on(long_call):
    expected, found, over = long_call(), [], threading.Event()

    def call():
        found.append(long_call())
        over.set()

    thread = threading.Thread(target=call)
    thread.start()
    assert latency(over.wait) is not None
    over.wait()
    np.testing.assert_array_equal(found[0], expected)
    thread.join()
