# SPDX-License-Identifier: Apache-2.0
"""What a loaded model holds in memory: packed linears as panels, not as their file's pages too."""

from __future__ import annotations

import mmap
from pathlib import Path

import numpy as np
import packed_folders as folders
import pytest
from safetensors.numpy import load_file, save_file

from singlequant.checkpoint.decoded import Forms, StoredTensors
from singlequant.checkpoint.folder import load_checkpoint
from singlequant.runtime.open import load
from singlequant.tensors import TensorFiles, read_header

PAGEMAP = Path("/proc/self/pagemap")


def present(array: np.ndarray) -> np.ndarray:
    """Which pages of an array, from the one it begins in, this process holds."""
    if not PAGEMAP.exists():
        pytest.skip("needs /proc/self/pagemap")
    first = array.ctypes.data // mmap.PAGESIZE
    last = (array.ctypes.data + array.nbytes - 1) // mmap.PAGESIZE
    with PAGEMAP.open("rb") as file:
        file.seek(8 * first)
        entries = np.frombuffer(file.read(8 * (last + 1 - first)), np.uint64)
    return entries >> np.uint64(63) == 1


@pytest.fixture
def tensors(tmp_path) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    made = {name: rng.standard_normal(size).astype(np.float32)
            for name, size in (("a", 70_000), ("b", 50_001), ("c", 70_000), ("d", 7))}
    save_file(made, tmp_path / "model.safetensors")
    return made


@pytest.mark.parametrize("stored", [False, True], ids=["plain", "renamed"])
def test_release_gives_back_the_whole_pages_of_one_tensor(tmp_path, tensors, stored):
    files = TensorFiles(read_header(tmp_path / "model.safetensors"))
    prefix = "model." if stored else ""
    if stored:
        files = StoredTensors(files, {prefix + name: name for name in tensors}, Forms())
    views = {name: files.view(prefix + name) for name in tensors}
    for name, view in views.items():
        np.testing.assert_array_equal(view, tensors[name])
    assert all(present(view).all() for view in views.values())
    files.release(f"{prefix}b")
    assert not present(views["b"])[1:-1].any()
    assert present(views["b"])[[0, -1]].all()  # the neighbours' too
    assert all(present(views[name]).all() for name in "acd")
    np.testing.assert_array_equal(views["b"], tensors["b"])
    files.release(f"{prefix}d")  # less than a page
    assert present(views["d"]).all()


def test_loaded_model_holds_panels_without_the_pages_they_were_made_of(make_checkpoint, tmp_path):
    source = load_checkpoint(make_checkpoint(tmp_path / "model", hidden=512, intermediate=1024))
    folders.write(source, tmp_path / "packed")
    model = load(tmp_path / "packed")
    tensors = model.checkpoint.tensors
    words = [name for name in tensors if name.endswith(".weight_packed")]
    assert len(words) == 7 * source.spec.layers
    held = np.concatenate([present(model.checkpoint.tensor(name))[1:-1] for name in words])
    assert held.mean() < 0.2  # a read near by maps some pages again
    for name in words:
        stored = load_file(tensors[name].path)[name]
        np.testing.assert_array_equal(model.checkpoint.tensor(name), stored)
    window = np.arange(8)[None]
    np.testing.assert_array_equal(model.forward(window), load(tmp_path / "packed").forward(window))
