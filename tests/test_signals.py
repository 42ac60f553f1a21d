# SPDX-License-Identifier: Apache-2.0
"""SIGINT and SIGTERM end a command by one line and an exit code; what is finished stays."""

from __future__ import annotations

import os
import signal
import threading

import pytest

import singlequant as sq
from singlequant.cli.main import main
from singlequant.export.writer import ModelWriter

SIGNALS = {signal.SIGINT: ("interrupted", 130), signal.SIGTERM: ("terminated", 143)}
USUAL = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}


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


def test_command_runs_beside_the_main_thread(capsys):
    codes = []
    thread = threading.Thread(target=lambda: codes.append(main(["runtime"])))
    thread.start()
    thread.join()
    assert codes == [0]
