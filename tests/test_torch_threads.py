"""Our threads beside torch's: numbers apart, calls at once, and what OMP_WAIT_POLICY changes."""

import os
import subprocess
import sys
import threading

import pytest

torch = pytest.importorskip("torch", reason="needs the torch extra")

import singlequant as sq  # noqa: E402
from singlequant import _C  # noqa: E402
from singlequant.integrations.torch import quantize_  # noqa: E402


@pytest.fixture
def model():
    torch.manual_seed(0)
    made = torch.nn.Sequential(torch.nn.Linear(96, 96), torch.nn.GELU(), torch.nn.Linear(96, 32))
    quantize_(made, [torch.randn(64, 96)], sq.QuantConfig(method="singlequant", bits=4))
    return made


def test_numbers_of_threads_are_apart():
    ours, theirs = _C.get_num_threads(), torch.get_num_threads()
    try:
        _C.set_num_threads(3)
        assert torch.get_num_threads() == theirs
        torch.set_num_threads(1)
        assert _C.get_num_threads() == 3
    finally:
        _C.set_num_threads(ours)
        torch.set_num_threads(theirs)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_calls_at_once_give_what_they_give_alone(mode, model):
    inputs = [torch.randn(40, 96) for _ in range(6)]
    with mode():
        expected = [model(x) for x in inputs]
    found = [[] for _ in inputs]

    def run(i):
        with mode():
            for _ in range(20):
                found[i].append(model(inputs[i].clone()))

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for outputs, one in zip(found, expected, strict=True):
        assert len(outputs) == 20
        assert all(torch.equal(y, one) for y in outputs)


SPIN = """
import time, torch
torch.set_num_threads(2)
x = torch.randn(400, 4000)
torch.relu(x)
begin = time.process_time()
for _ in range(20):
    torch.relu(x)
    time.sleep(0.01)
print(time.process_time() - begin)
"""


def cpu_seconds(**variables):
    """CPU time of a loop of torch's operations with pauses."""
    known = {key: value for key, value in os.environ.items()
             if not key.startswith(("OMP_", "GOMP_", "KMP_"))}
    done = subprocess.run([sys.executable, "-c", SPIN], env=known | variables, capture_output=True,
                          text=True, check=True)
    return float(done.stdout)


@pytest.mark.skipif(_C.get_num_threads() < 2, reason="needs two CPUs")
def test_a_passive_wait_policy_leaves_the_cpus_between_torchs_operations():
    """What docs/torch.md advises: by default torch's threads spin in each pause."""
    assert cpu_seconds(OMP_WAIT_POLICY="passive") < cpu_seconds() / 2
