"""Peaks of the machine: steps that run here, a read loop that leaves nothing out."""

import time

import numpy as np
import pytest

from singlequant import _C, _reference
from singlequant.study import bench


@pytest.fixture(autouse=True)
def threads():
    before = _C.get_num_threads()
    yield
    _C.set_num_threads(before)


@pytest.mark.parametrize("step", _C.peak_steps())
def test_every_step_that_runs_has_a_peak(step):
    peak = _C.measure_peak(step, 0.003)
    assert 0 < peak < 1e14  # how much depends on the machine


def test_a_peak_counts_the_threads_own_time():
    begin, own = time.perf_counter(), time.thread_time()
    _C.measure_peak("int64 multiply-add", 0.05)
    assert time.perf_counter() - begin >= 0.05
    assert time.thread_time() - own >= 1e-3  # one run at least, however busy the machine is


def test_wider_steps_are_not_slower():
    steps = ("maddubs + add16 256", "fma 256")
    if not set(steps) <= set(_C.peak_steps()):
        pytest.skip("needs AVX2")
    found = [[_C.measure_peak(step, 0.003) for step in steps] for _ in range(7)]  # in turn
    integer, floating = np.median(found, axis=0)
    # 32 products a step against 8, at the same rate of instructions: a third is room enough
    assert integer > 1.3 * floating


@pytest.mark.parametrize("step", ["none", ""])
def test_unknown_step_is_refused(step):
    with pytest.raises(ValueError, match="step: expected one of peak_steps"):
        _C.measure_peak(step)


@pytest.mark.parametrize("seconds", [0, -1, 61, float("nan")])
def test_peak_refuses_strange_times(seconds):
    with pytest.raises(ValueError, match="seconds"):
        _C.measure_peak("int64 multiply-add", seconds)


def test_every_table_names_steps_that_can_be_measured():
    kernels = _C.kernels()
    assert list(kernels["steps"]) == kernels["compiled"]
    for table in kernels["runnable"]:
        steps = kernels["steps"][table]
        assert set(steps) == {4, 8, 16}
        if table != "generic":  # whose compiler chooses
            assert set(steps.values()) <= set(_C.peak_steps()), table


@pytest.mark.parametrize("streams", [1, 2, 3, 4, 16])
@pytest.mark.parametrize("size", [0, 1, 7, 8, 63, 64, 1000, 300_001])
def test_read_loop_reads_every_byte(size, streams):
    data = np.random.default_rng(size).integers(0, 256, size).astype(np.uint8)
    for prefetch in (0, 512):
        assert _C.read_loop(data, prefetch, streams) == _reference.read_loop(data)
    for flipped in {0, size // 2, size - 1} - {-1} if size else ():
        changed = data.copy()
        changed[flipped] ^= 1
        assert _C.read_loop(changed, 0, streams) != _C.read_loop(data, 0, streams)


def test_read_loop_sees_the_panels_and_no_thread_changes_it():
    words = _C.pack(np.random.default_rng(0).integers(-8, 8, (70, 4096)).astype(np.int8))
    weight = _C.PackedWeight(words, np.ones(70, np.float32), 4096)
    found = set()
    for count in (1, 2, 3):
        _C.set_num_threads(count)
        found.add(_C.read_loop(weight, 0, 2))
    assert len(found) == 1
    words[0, 0] ^= 1  # the sum is an exclusive or: one bit shows
    other = _C.PackedWeight(words, np.ones(70, np.float32), 4096)
    assert _C.read_loop(other) != found.pop()


@pytest.mark.parametrize("arguments", [(-1, 1), (1 << 21, 1), (0, 0), (0, 17)])
def test_read_loop_refuses_strange_ranges(arguments):
    with pytest.raises(ValueError, match="prefetch or streams"):
        _C.read_loop(np.zeros(8, np.uint8), *arguments)


def test_measure_linear_times_both_parts_and_refuses_what_linear_refuses():
    weight = bench.TransformedLinear(np.ones((64, 128), np.float32), "w4a4").weights[0]
    parts = _C.measure_linear(np.ones((4, 128), np.float32), weight, 4, 0.8)
    assert all(0 <= part < 1 for part in parts)
    for x, arguments, part in (
        (np.ones((4, 127)), (), "x: expected"), (np.ones((4, 128)), (5,), "bits: expected"),
        (np.ones((4, 128)), (4, 2.0), "clip"), (np.full((4, 128), np.nan), (), "NaN"),
    ):
        with pytest.raises(ValueError, match=part):
            _C.measure_linear(x, weight, *arguments)
    with pytest.raises(TypeError, match="weight"):
        _C.measure_linear(np.ones((4, 128)), None)
