# SPDX-License-Identifier: Apache-2.0
"""Standard streams of the command that are closed, or that cannot show every character."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import singlequant as sq
from singlequant.cli.main import main

ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
PROMPT = "x = 'é🙂'"


def shell(script, *arguments, **environment):
    """Of a shell in which "$@" is the command with arguments: exit code, output and errors."""
    command = [sys.executable, "-m", "singlequant", *map(str, arguments)]
    found = subprocess.run(["bash", "-c", script, "bash", *command], capture_output=True,
                           env={**os.environ, **environment}, check=False)
    return found.returncode, found.stdout, found.stderr


def generate(script, prompt=PROMPT, **environment):
    return shell(script, "generate", sq.bundled_model(), "--prompt", prompt, "--max-new-tokens",
                 "3", **environment)


@pytest.mark.parametrize("closed", ["2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_progress_needs_no_standard_error(tmp_path, text, closed):
    code, out, error = shell(f'"$@" {closed}', "eval", sq.bundled_model(), "--text", text,
                             "--seq-len", "16", "--windows", "2")
    assert (code, error) == (0, b"")
    assert (b"perplexity" in out) == (">&-" not in closed.split())


def test_no_file_gets_the_number_of_a_closed_stream(tmp_path):
    script = ("import os, singlequant.startup as s; s.prepare_streams();"
              f"f = open({str(tmp_path / 'file')!r}, 'wb'); os._exit(f.fileno())")
    assert shell(f'{sys.executable} -c "{script}" 2>&-')[0] > 2


def test_error_of_the_command_does_not_go_to_the_output(tmp_path):
    assert shell('"$@" 2>&-', "verify", tmp_path / "none") == (2, b"", b"")


@pytest.mark.parametrize("environment", [{"PYTHONIOENCODING": "ascii"}, ASCII])
def test_characters_that_a_terminal_cannot_show_are_escaped(environment):
    code, out, error = generate('"$@"', **environment)
    assert (code, error) == (0, b"")
    whole = generate('"$@"', PYTHONIOENCODING="utf-8")[1].decode()
    assert PROMPT in whole
    assert out.decode() == whole.encode("ascii", "backslashreplace").decode()


def test_names_that_are_no_text_are_escaped(make_checkpoint, tmp_path, text):
    """Printing the name of OUT must not fail when the work is done."""
    out = os.fsencode(tmp_path) + b"/out\xff"
    code, printed, _ = shell(
        '"$@" --weights rtn --method hadamard --calibration-tokens 64 --no-check', "quantize",
        make_checkpoint(tmp_path / "model"), os.fsdecode(out), "--calibration", text)
    assert code == 0
    assert os.path.isdir(out)
    assert b"out\\udcff" in printed


@pytest.mark.parametrize("lost", ["2>/dev/full", "2> >(exec true); sleep 1"])
def test_exit_code_stays_where_errors_cannot_be_written(tmp_path, lost):
    redirection, _, rest = lost.partition(";")
    script = f'exec 3>&2 {redirection};{rest or " :"}; "$@"'
    assert shell(script, "verify", tmp_path / "none")[0] == 2


def test_work_goes_on_where_warnings_cannot_be_written(make_checkpoint, tmp_path, text):
    model = make_checkpoint(tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    save_file({**tensors, "tower.weight": np.ones(3, np.float32)}, model / "model.safetensors")
    code, out, _ = shell('exec 2>/dev/full; "$@"', "eval", model, "--text", text, "--seq-len", "16",
                         "--windows", "2")
    assert code == 0
    assert b"perplexity" in out


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("arguments", [
    ["--help"], ["--version"], ["bench", "--help"], ["quantize", "--help"], ["runtime"]], ids=str)
def test_output_that_cannot_be_written_is_an_error(arguments, unbuffered):
    found = shell('"$@" >/dev/full', *arguments, PYTHONUNBUFFERED=unbuffered)
    assert found == (2, b"", b"singlequant: standard output: No space left on device\n")
    # a reader that left wanted no more
    script = 'exec > >(exec true); sleep 0.2; "$@"'
    found = shell(script, *arguments, PYTHONUNBUFFERED=unbuffered)
    assert found == (0, b"", b"")


def test_streams_of_a_program_stay_as_they_are(capsys):
    main(["runtime"])
    assert sys.stdout.errors == "strict"
