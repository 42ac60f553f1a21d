"""The pool: thread counts, forks, concurrent callers."""

import os
import shutil
import subprocess
import sys
import threading

import numpy as np
import pytest

import singlequant as sq
from singlequant import _C


def busy_work():
    x = np.random.default_rng(0).standard_normal((256, 512)).astype(np.float32)
    return _C.quantize(x, 4, 0, True, 1.0, True)[0]


@pytest.mark.parametrize("count", [0, -1, 257])
def test_set_num_threads_refuses_what_is_out_of_range(count):
    with pytest.raises(ValueError, match=f"num_threads: expected 1 to 256, got {count}"):
        sq.set_num_threads(count)


def test_set_num_threads_may_exceed_the_cpus_and_come_back():
    expected = busy_work()
    for count in (7, 2, 1, 5):
        sq.set_num_threads(count)
        assert sq.get_num_threads() == count
        np.testing.assert_array_equal(busy_work(), expected)


def test_concurrent_callers_get_their_own_results():
    expected = busy_work()
    sq.set_num_threads(4)
    results = [None] * 8
    threads = [
        threading.Thread(target=lambda i=i: results.__setitem__(i, busy_work())) for i in range(8)
    ]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for result in results:
        np.testing.assert_array_equal(result, expected)


CPU_TIME = """
import os, time
import numpy as np
from singlequant import _C

x = np.random.default_rng(0).standard_normal((256, 512)).astype(np.float32)
expected = _C.quantize(x, 4, 0, True, 1.0, True)[0]

def took(threads):
    _C.set_num_threads(threads)
    begin = time.process_time()
    for _ in range(300):
        found = _C.quantize(x, 4, 0, True, 1.0, True)[0]
    assert np.array_equal(found, expected)
    return time.process_time() - begin

took(2)  # starts the worker
cpu = {min(os.sched_getaffinity(0))}
for thread in os.listdir("/proc/self/task"):  # as taskset --all-tasks does it
    os.sched_setaffinity(int(thread), cpu)
rounds = [(took(1), took(2)) for _ in range(5)]
print(np.median([two / one for one, two in rounds]))
"""


def test_waiting_costs_little_where_threads_share_a_cpu():
    """The CPUs became fewer than the threads: who waits leaves the CPU to who works."""
    run = subprocess.run([sys.executable, "-c", CPU_TIME], capture_output=True, text=True,
                         check=True)
    assert float(run.stdout) < 2


@pytest.mark.parametrize(("count", "expected"), [(None, 1), ("3", 3)])
def test_pool_has_the_cpus_that_taskset_gives_unless_told(count, expected):
    if shutil.which("taskset") is None:
        pytest.skip("needs taskset")
    variables = {k: v for k, v in os.environ.items() if k != "SINGLEQUANT_NUM_THREADS"}
    run = subprocess.run(
        ["taskset", "--cpu-list", str(min(os.sched_getaffinity(0))), sys.executable, "-c",
         "from singlequant import _C; print(_C.get_num_threads())"],
        env=variables | ({} if count is None else {"SINGLEQUANT_NUM_THREADS": count}),
        capture_output=True, text=True, check=True)
    assert int(run.stdout) == expected


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # CPython's note on forking with threads
def test_fork_after_parallel_work_neither_hangs_nor_differs():
    sq.set_num_threads(3)
    expected = busy_work()
    child = os.fork()
    if child == 0:
        same = np.array_equal(busy_work(), expected)
        os._exit(0 if same else 1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    np.testing.assert_array_equal(busy_work(), expected)


@pytest.mark.parametrize(("value", "expected"), [("3", "3"), ("0", None), ("two", None)])
def test_environment_sets_the_number_of_threads(value, expected):
    run = subprocess.run(
        [sys.executable, "-c", "from singlequant import _C; print(_C.get_num_threads())"],
        env={**os.environ, "SINGLEQUANT_NUM_THREADS": value}, capture_output=True, text=True,
        check=False,
    )
    if expected:
        assert run.stdout.strip() == expected
    else:
        assert "SINGLEQUANT_NUM_THREADS: expected 1 to 256" in run.stderr
