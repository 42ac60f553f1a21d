# SPDX-License-Identifier: Apache-2.0
"""A mapped file that becomes shorter under a run ends it by a line that names the file."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from singlequant import _C

ROOT = Path(__file__).resolve().parents[1]


def run(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.run([sys.executable, "-c", code, *map(str, arguments)], text=True,
                          env={**os.environ, "PYTHONPATH": path}, capture_output=True, timeout=300)


SHRINK = """
import os, sys
from singlequant.checkpoint.folder import load_checkpoint
model = load_checkpoint(sys.argv[1])
weight = model.layer(1).linears["down"].weight
path = model.path / "model.safetensors"
os.truncate(path, 8192)
"""
COMMAND = """
import os, sys
from singlequant.checkpoint import folder
from singlequant.cli.main import main
layer = folder.Checkpoint.layer
def shrink(self, i):
    os.truncate(self.path / "model.safetensors", 8192)
    return layer(self, i)
folder.Checkpoint.layer = shrink
sys.exit(main(["quantize", sys.argv[1], sys.argv[2], "--calibration-tokens", "64"]))
"""


def test_command_that_loses_a_file_says_so(make_checkpoint, tmp_path):
    model = make_checkpoint(tmp_path / "model")
    done = run(COMMAND, model, tmp_path / "out")
    assert done.returncode == 2
    assert done.stderr == (f"singlequant: {model}/model.safetensors: the file became shorter while "
                           f"it was read\n")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("reader", ["float(weight.sum())", "_C.to_float32(weight)"])
def test_library_ends_as_before_but_names_the_file(make_checkpoint, tmp_path, reader):
    model = make_checkpoint(tmp_path / "model")
    done = run(f"{SHRINK}from singlequant import _C\n{reader}", model)
    assert done.returncode == -signal.SIGBUS
    assert f"{model}/model.safetensors: the file became shorter" in done.stderr


def test_handler_of_before_is_called(make_checkpoint, tmp_path):
    model = make_checkpoint(tmp_path / "model")
    done = run(f"import faulthandler; faulthandler.enable()\n{SHRINK}weight.sum()", model)
    assert done.returncode == -signal.SIGBUS
    assert "became shorter" in done.stderr
    assert "Fatal Python error: Bus error" in done.stderr


def test_names_cannot_move_the_cursor(make_checkpoint, tmp_path):
    model = make_checkpoint(tmp_path / "a\x1b[2Jb")
    done = run(f"{SHRINK}weight.sum()", model)
    assert "became shorter" in done.stderr
    assert "\x1b" not in done.stderr


def test_other_bus_errors_are_as_before(make_checkpoint, tmp_path):
    (tmp_path / "other").write_bytes(bytes(16384))
    code = f"{SHRINK}" + (
        f"import numpy as np; other = np.memmap({str(tmp_path / 'other')!r}, np.uint8, 'r')\n"
        f"os.truncate({str(tmp_path / 'other')!r}, 1); other.sum()")
    done = run(code, make_checkpoint(tmp_path / "model"))
    assert done.returncode == -signal.SIGBUS
    assert "became shorter" not in done.stderr


def test_many_files_and_long_names_are_no_problem(make_checkpoint, tmp_path):
    code = ("import numpy as np\nfrom singlequant import _C\n"
            "kept = [np.empty(8, np.uint8) for _ in range(3000)]\n"
            "for array in kept: _C.watch_mapping(array, 'x' * 5000)\n")
    done = run(code + SHRINK + "weight.sum()", make_checkpoint(tmp_path / "model"))
    assert done.stderr.count("became shorter") == 1


def test_arguments_are_checked():
    with pytest.raises(TypeError, match="contiguous"):
        _C.watch_mapping(np.ones(8)[::2], "x")
    with pytest.raises(TypeError, match="contiguous"):
        _C.watch_mapping(b"", "x")
    with pytest.raises(ValueError, match="status: expected -1 to 255, got 256"):
        _C.exit_when_lost(256)
    assert _C.watch_mapping(np.ones(0), "x") is None
    assert _C.exit_when_lost(-1) == -1
