"""What kernels of BLAS the machine has changes no byte of what the defaults write."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import singlequant as sq
from singlequant import _C
from singlequant.export.seal import RECIPE_FILE
from singlequant.methods.registry import METHODS

# Kernels that OpenBLAS is held to, and what a CPU must have to run them.
CORES = {"Nehalem": "sse4_2", "Haswell": "avx2", "SkylakeX": "avx512vl"}


def cores():
    flags = Path("/proc/cpuinfo").read_text().split() if platform.machine() == "x86_64" else []
    return [core for core, flag in CORES.items() if flag in flags]


def held_to(core, code, *arguments):
    """What a Python whose BLAS is held to a core prints."""
    done = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], check=True, text=True,
                          stdout=subprocess.PIPE, env={**os.environ, "OPENBLAS_CORETYPE": core})
    return done.stdout.strip()


QUANTIZE = """
import json, sys
import singlequant as sq
out, values = sys.argv[1], json.loads(sys.argv[2])
sq.quantize_folder(sq.bundled_model(), out, sq.QuantConfig(calibration_tokens=512, **values))
print(sq._C.blas_info())
"""


@pytest.fixture(scope="module")
def two_cores():
    found = cores()
    if len(found) < 2:
        pytest.skip("needs a CPU that runs several kernels of OpenBLAS")
    return found


def folders(two_cores, tmp_path, **values):
    """Bytes of every file of the folder, by core."""
    names = [held_to(core, QUANTIZE, tmp_path / core, json.dumps(values)) for core in two_cores]
    assert len(set(names)) == len(names), "the variable has no effect here"
    return [{file.name: file.read_bytes() for file in (tmp_path / core).iterdir()}
            for core in two_cores]


@pytest.mark.parametrize("values", [
    {}, {"scheme": "w4a4"}, {"group_size": 32}, {"method": "singlequant", "gptq_order": True},
], ids=["defaults", "w4a4", "groups", "singlequant"])
def test_bytes_are_of_no_kernel_of_blas(two_cores, tmp_path, values):
    first, *others = folders(two_cores, tmp_path, **values)
    assert all(other == first for other in others)
    assert "blas" not in json.loads(first[RECIPE_FILE])["kernels"]


FACTOR = """
import hashlib, sys
import numpy as np
from singlequant import _C
draw = np.random.default_rng(5)
found = hashlib.sha256()
for k, damping in ((40, 0.01), (513, 0.01), (800, 0.01), (800, 0.0)):
    x = draw.standard_normal((64 if damping == 0 else k, k)).astype(np.float32)
    gram = _C.gram(x, bits=8)
    if damping == 0:  # near to singular: in float64
        gram = np.full((k, k), 2**24 - 2, np.float32)
        gram[np.diag_indices(k)] += 1
    factor, permutation = _C.gptq_factor(gram, damping, True)
    found.update(factor.tobytes())
    if k % 32 == 0:
        rows = draw.standard_normal((300, k)).astype(np.float32)
        for array in _C.gptq_round(rows, *_C.gptq_factor(gram, damping, False), group=32):
            found.update(array.tobytes())
    blocks = _C.block_gram(x[:, :40], 20)
    for array in (blocks, *_C.align_blocks(blocks, blocks[::-1], 0.1)):
        found.update(array.tobytes())
print(found.hexdigest())
"""


def test_factors_and_alignments_are_of_no_kernel_of_blas(two_cores):
    assert len({held_to(core, FACTOR) for core in two_cores}) == 1


@pytest.mark.parametrize("values", [
    {"calibration_bits": 32}, {"kv_bits": 8}, {"method": "aligned"}])
def test_recipe_names_the_blas_that_took_part(tmp_path, values):
    config = sq.QuantConfig(calibration_tokens=64, weights="rtn", bits=4, **values)
    out = sq.quantize_folder(sq.bundled_model(), tmp_path / "out", config).out
    assert json.loads((out / RECIPE_FILE).read_text())["kernels"]["blas"] == _C.blas_info()


def test_layers_written_by_hand_are_of_unknown_sums(tmp_path):
    model = sq.load_checkpoint(sq.bundled_model())
    config = sq.QuantConfig(method="hadamard", weights="rtn", bits=4, calibration_tokens=64)
    statistics = sq.calibrate(model, sq.calibration_windows(model, config))
    layers = sq.quantize(model, sq.solve_rotations(statistics, config), config)
    sq.save(layers, tmp_path / "out", model, config)
    assert "blas" in json.loads((tmp_path / "out" / RECIPE_FILE).read_text())["kernels"]


def spread(k, rank, seed):
    """A Gram matrix [k, k] whose eigenvalues, but for so many, are one small one."""
    x = np.random.default_rng(seed).standard_normal((rank, k))
    return (x.T @ x + 1e-2 * np.eye(k)).astype(np.float32)


@pytest.mark.parametrize("k", [1, 15, 31, 32, 33, 64, 511, 512, 513, 560, 768, 1100])
def test_factor_times_itself_is_the_matrix(k):
    gram = spread(k, 2 * k, k)
    factor, order = _C.gptq_factor(gram, 0.0, True)
    wanted = gram[np.ix_(order, order)].astype(np.float64)
    wide = factor.astype(np.float64)
    assert np.all(np.triu(factor, 1) == 0)
    error = np.linalg.norm(wide @ wide.T - wanted)  # Frobenius: backward stable, a few last places
    assert error <= 4 * 2**-24 * np.sqrt(k) * np.linalg.norm(wanted)


@pytest.mark.parametrize("k", [1, 3, 255, 256, 257, 300, 700])
def test_factor_in_float64_stands_in_for_a_matrix_near_to_singular(k):
    x = np.random.default_rng(k).integers(-1, 2, (max(1, k // 4), k)).astype(np.float32)
    gram = x.T @ x  # exact, of a quarter of the rank
    gram[np.diag_indices(k)] += 2 * np.spacing(gram.max())  # less than a float32 elimination loses
    factor, order = _C.gptq_factor(gram, 0.0, True)
    wanted = gram[np.ix_(order, order)].astype(np.float64)
    wide = factor.astype(np.float64)
    assert np.linalg.norm(wide @ wide.T - wanted) <= 2**-23 * np.linalg.norm(wanted)


def test_methods_say_whether_they_use_blas():
    assert not METHODS[sq.QuantConfig().method].blas
    assert {name for name, row in METHODS.items() if row.residual or row.trains or row.aligns} <= {
        name for name, row in METHODS.items() if row.blas}
