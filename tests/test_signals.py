# SPDX-License-Identifier: Apache-2.0
"""SIGINT, SIGTERM and SIGHUP end a command by one line and an exit code; what is finished stays."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import singlequant as sq
from singlequant.cli.main import main, stoppable
from singlequant.export.writer import ModelWriter
from singlequant.startup import is_command

ROOT = Path(__file__).resolve().parents[1]

SIGNALS = {signal.SIGINT: ("interrupted", 130), signal.SIGTERM: ("terminated", 143),
           signal.SIGHUP: ("hung up", 129)}
USUAL = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL,
         signal.SIGHUP: signal.SIG_DFL}


@pytest.fixture(autouse=True)
def usual_handlers():
    """A shell starts what runs in the background with SIGINT ignored."""
    before = {number: signal.signal(number, usual) for number, usual in USUAL.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_signal_is_one_line_and_resumable(
    make_checkpoint, tmp_path, text, capsys, monkeypatch, number
):
    model, out = make_checkpoint(tmp_path / "model"), tmp_path / "out"
    write_layer = ModelWriter.write_layer

    def write_and_be_stopped(self, layer):
        write_layer(self, layer)
        os.kill(os.getpid(), number)

    monkeypatch.setattr(ModelWriter, "write_layer", write_and_be_stopped)
    code = main(["quantize", str(model), str(out), "--calibration", str(text),
                 "--calibration-tokens", "64", "--bits", "4"])
    monkeypatch.undo()
    word, expected = SIGNALS[number]
    assert code == expected
    assert capsys.readouterr().err == (
        f"singlequant: {word}: 1 finished layer is in {out}.partial: the same run with resume "
        f"(--resume) goes on\n")
    assert signal.getsignal(number) is USUAL[number]
    config = sq.QuantConfig(calibration_tokens=64, bits=4)
    assert sq.quantize_folder(model, out, config, text, resume=True).resumed_layers == 1


AGAIN = """
import os, sys
from singlequant.cli.main import main
from singlequant.export.writer import ModelWriter

def kill_amid(name):
    whole = getattr(ModelWriter, name)
    def call(*arguments):
        os.kill(os.getpid(), {number})
        return whole(*arguments)
    setattr(ModelWriter, name, call)

kill_amid("write_layer")
kill_amid("__exit__")
sys.exit(main())
"""

HANG = """
import sys, time
from singlequant.cli.main import main
from singlequant.export.writer import ModelWriter

write_layer = ModelWriter.write_layer

def write_and_wait(self, layer):
    write_layer(self, layer)
    print("a layer", flush=True)
    time.sleep(60)

ModelWriter.write_layer = write_and_wait
sys.exit(main())
"""


@pytest.mark.parametrize("number", SIGNALS)
def test_signal_amid_the_end_is_one_line_as_well(make_checkpoint, tmp_path, text, number):
    model, out = make_checkpoint(tmp_path / "model"), tmp_path / "out"
    script = tmp_path / "singlequant"
    script.write_text(AGAIN.format(number=int(number)))
    command = [sys.executable, str(script), "quantize", str(model), str(out), "--calibration",
               str(text), "--calibration-tokens", "64", "--bits", "4"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120,
                          env={**os.environ, "PYTHONPATH": str(ROOT)},
                          preexec_fn=lambda: signal.signal(number, signal.SIG_DFL))
    word, code = SIGNALS[number]
    assert (done.returncode, done.stderr) == (code, f"singlequant: {word}\n")
    config = sq.QuantConfig(calibration_tokens=64, bits=4)
    assert sq.quantize_folder(model, out, config, text, resume=True).resumed_layers == 0


def hung_up_amid_layers(tmp_path, make_checkpoint, text, before=None):
    """Of a quantize that gets SIGHUP as it writes each layer: what it is, when it has ended."""
    script = tmp_path / "singlequant"
    script.write_text(AGAIN.replace('kill_amid("__exit__")\n', "").format(number=1))
    command = [sys.executable, str(script), "quantize", str(make_checkpoint(tmp_path / "model")),
               str(tmp_path / "out"), "--calibration", str(text), "--calibration-tokens", "64",
               "--bits", "4", "--no-check"]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, preexec_fn=before,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})


def test_command_under_nohup_is_not_hung_up(make_checkpoint, tmp_path, text):
    done = hung_up_amid_layers(tmp_path, make_checkpoint, text,
                               lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    assert (done.returncode, done.stderr) == (0, "")
    assert sq.load(tmp_path / "out").spec.layers == 2


def test_terminal_that_is_closed_leaves_a_resumable_run(make_checkpoint, tmp_path, text):
    """The kernel sends SIGHUP, and every write to the terminal fails."""
    model, out = make_checkpoint(tmp_path / "model"), tmp_path / "out"
    script = tmp_path / "singlequant"
    script.write_text(HANG)
    child, terminal = pty.fork()
    if child == 0:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        os.execve(sys.executable, [
            sys.executable, str(script), "quantize", str(model), str(out), "--calibration",
            str(text), "--calibration-tokens", "64", "--bits", "4",
        ], {**os.environ, "PYTHONPATH": str(ROOT)})
    heard = b""
    while b"a layer" not in heard:
        heard += os.read(terminal, 4096)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 129
    config = sq.QuantConfig(calibration_tokens=64, bits=4)
    assert sq.quantize_folder(model, out, config, text, resume=True).resumed_layers == 1


def test_program_keeps_its_own_handler_of_a_hangup(capsys):
    heard = []
    signal.signal(signal.SIGHUP, lambda *_: heard.append(True))
    with stoppable():
        os.kill(os.getpid(), signal.SIGHUP)
    assert heard == [True]


def test_command_runs_beside_the_main_thread(capsys):
    codes = []
    thread = threading.Thread(target=lambda: codes.append(main(["runtime"])))
    thread.start()
    thread.join()
    assert codes == [0]


HOOK = """
import importlib.abc, os, sys

class Hook(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "{module}":
            os.kill(os.getpid(), {number})

sys.meta_path.insert(0, Hook())
"""


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize(("how", "module"), [
    ("module", "singlequant.arrays"), ("script", "numpy"), ("module", "singlequant._C"),
    ("script", "singlequant.cli.bench")])
def test_signal_amid_the_start_is_one_line(tmp_path, how, module, number):
    """A module that is looked for while the command starts brings the signal."""
    hook = HOOK.format(module=module, number=int(number))
    script = tmp_path / "singlequant"
    script.write_text(f"{hook}\nfrom singlequant.cli.main import main\nsys.exit(main())\n")
    run = f"{hook}\nimport runpy\nsys.argv[0] = '-m'\nsys.orig_argv[1:1] = ['-m', 'singlequant']\n"
    run += "runpy.run_module('singlequant', run_name='__main__', alter_sys=True)\n"
    command = [str(script)] if how == "script" else ["-c", run]
    done = subprocess.run([sys.executable, *command, "runtime"], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=60,
                          preexec_fn=lambda: signal.signal(number, signal.SIG_DFL))
    word, code = SIGNALS[number]
    assert (done.returncode, done.stderr) == (code, f"singlequant: {word}\n")


def test_importing_the_package_leaves_signals_alone():
    ask = "import signal, singlequant; print(signal.getsignal(signal.SIGTERM).name)"
    done = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=60)
    assert done.stdout == "SIG_DFL\n"


@pytest.mark.parametrize(("arguments", "original", "expected"), [
    (["/usr/bin/singlequant", "eval"], ["python", "/usr/bin/singlequant", "eval"], True),
    (["-m", "eval"], ["python", "-m", "singlequant", "eval"], True),
    (["-m", "singlequant"], ["python", "-m", "pytest", "singlequant"], False),
    (["train.py", "singlequant"], ["python", "train.py", "singlequant"], False),
    ([""], ["python"], False), ([], [], False)])
def test_command_is_known_by_its_name(arguments, original, expected):
    assert is_command(arguments, original) is expected


def test_interrupt_amid_a_text_that_exec_runs_keeps_the_exit_code(tmp_path):
    """Dataclasses and named tuples run such texts while modules are imported."""
    (tmp_path / "interrupted_command.py").write_text(
        "import os, signal, sys\n"
        "from singlequant import startup\n"
        "from singlequant.cli import main\n"
        "signal.signal(signal.SIGINT, startup.end)\n"
        "text = 'os.kill(os.getpid(), signal.SIGINT)\\nfor _ in range(10**9): pass'\n"
        "main.run_runtime = lambda _: exec(text, {'os': os, 'signal': signal})\n"
        "sys.exit(main.main(['runtime']))\n")
    run = subprocess.run(
        [sys.executable, "-m", "interrupted_command"], capture_output=True, text=True,
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert (run.returncode, run.stderr) == (130, "singlequant: interrupted\n")
