# SPDX-License-Identifier: Apache-2.0
"""A model that runs windows with one layer in memory: the same values, and never two layers."""

from __future__ import annotations

import numpy as np
import packed_folders as folders
import pytest

import singlequant as sq
from singlequant.runtime import windows
from singlequant.runtime.windows import WindowModel
from singlequant.study.check import check


@pytest.fixture
def source(make_checkpoint, tmp_path):
    return sq.load_checkpoint(make_checkpoint(tmp_path / "model", layers=3))


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
def test_windows_have_the_same_logits(source, tmp_path, packed):
    if packed:
        folders.write(source, tmp_path / "packed")
        source = sq.load_checkpoint(tmp_path / "packed")
    tokens = np.arange(60).reshape(3, 20) % source.spec.vocab
    model, expected = WindowModel(source), sq.load(source.path)
    np.testing.assert_array_equal(model.hidden_states(tokens), expected.hidden_states(tokens))
    np.testing.assert_array_equal(model.forward(tokens), expected.forward(tokens))


class Counted:
    """A layer that knows how many there are."""

    alive = most = built = 0

    def __init__(self, layer) -> None:
        self.forward = layer.forward
        Counted.built += 1
        Counted.alive += 1
        Counted.most = max(Counted.most, Counted.alive)

    def __del__(self) -> None:
        Counted.alive -= 1


def test_check_of_a_folder_holds_one_layer(source, tmp_path, monkeypatch):
    folders.write(source, tmp_path / "packed")
    build = windows.build_layer
    monkeypatch.setattr(windows, "build_layer", lambda *given: Counted(build(*given)))
    monkeypatch.setattr("singlequant.study.check.CHECK_LENGTH", 16)
    monkeypatch.setattr(type(source), "encode", lambda *_: np.arange(64) % source.spec.vocab)
    found = check(tmp_path / "packed", source)
    assert found.predictions == 4 * 15
    assert (Counted.most, Counted.alive, Counted.built) == (1, 0, 2 * source.spec.layers)
