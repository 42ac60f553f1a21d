# SPDX-License-Identifier: Apache-2.0
"""What is wrong with a packed folder: the hashes of its seal, and what its numbers must be."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from .._C import FormatError
from ..export.folder import CONFIG_FILE, copied_files
from ..export.packed import PackedReader
from ..export.partial import content_digest
from ..export.seal import FILES, RECIPE_FILE, file_faults, read_seal
from ..models.spec import LayerSpec
from ..rows import ROWS_PER_BLOCK, require_finite
from ..tensors import INDEX_FILE, SINGLE_FILE
from ..weights import ROW_BLOCK, PackedTable
from .folder import Checkpoint, load_checkpoint

__all__ = ["verify_folder"]


def verify_folder(
    folder: str | Path,
    source: Checkpoint | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[str]:
    """Yield a line for everything that is wrong with a packed folder; none if it is sound.

    The files are compared with the sizes and hashes in recipe.json, which has a hash of its own.
    Then all that the files hold is read and checked: sizes and types, scales and dense weights that
    are finite, rotations that are orthogonal, codes behind the last column. A folder that was
    written before there were hashes has one line about that. source: the model that the folder was
    made of, whose bytes are compared with the hashes of those that were read. progress(layers done,
    layers) is called after each layer. FormatError when there is no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FormatError(f"{folder}: no such folder")
    try:
        seal = read_seal(folder)
    except FormatError as error:
        yield str(error)
    else:
        yield from file_faults(folder, seal[FILES])
        for name in _unsealed(folder, seal[FILES]):
            yield f"{folder / name}: expected a file that {RECIPE_FILE} names, found another"
        if source is not None:
            yield from _source_faults(folder / RECIPE_FILE, seal, source)
    try:
        checkpoint = load_checkpoint(folder)
        if checkpoint.quant_config is None:
            raise FormatError(f"{folder / CONFIG_FILE}: expected a packed folder, found no "
                              f"quantization_config")
    except (FormatError, OSError) as error:
        yield str(error)
        return
    yield from _content_faults(checkpoint, progress)


def _unsealed(folder: Path, files: Any) -> Iterator[str]:
    """Files that a reader would read though the seal does not know them."""
    read = [*copied_files(folder), CONFIG_FILE, INDEX_FILE, SINGLE_FILE]
    read += sorted(path.name for path in folder.glob("*.safetensors") if path.name != SINGLE_FILE)
    for name in read:
        if name not in files and (folder / name).is_file():
            yield name


def _source_faults(recipe: Path, seal: dict[str, Any], source: Checkpoint) -> Iterator[str]:
    """A line for each shard that was made of other bytes than the source now has."""
    shards = seal.get("shards")
    for key, expected in shards.items() if isinstance(shards, dict) else ():
        found = content_digest(source, key)
        if found != expected:
            yield (f"{source.path}: {f'layer {key}' if key.isdigit() else key}: expected the bytes "
                   f"that {recipe} names, sha256 {expected}, found {found}")


def _content_faults(
    checkpoint: Checkpoint, progress: Callable[[int, int], None] | None
) -> Iterator[str]:
    """A line for everything that the tensors hold and must not. Their headers are sound."""
    spec, config = checkpoint.spec, checkpoint.quant_config
    assert config is not None
    packed = PackedReader(checkpoint.path, checkpoint.files, spec, config)
    for name in config.table_bits(spec):
        yield from _faults(lambda name=name: _check_table(packed.table(name), name))
    for name, _ in spec.outer_tensors():
        yield from _faults(lambda name=name: _check_dense(checkpoint, name))
    for i in range(spec.layers):
        for reading in _readings(packed, spec.layer(i), i):
            yield from _faults(reading)
        for name, _ in spec.layer_tensors(i):
            yield from _faults(lambda name=name: _check_dense(checkpoint, name))
        if progress:
            progress(i + 1, spec.layers)


def _readings(packed: PackedReader, spec: LayerSpec, layer: int) -> Iterator[Callable[[], Any]]:
    """Calls that read a layer part by part; each raises FormatError where its part is wrong."""
    for linear in spec.linears.values():
        if packed.has(linear.at(layer)):
            yield partial(packed.linear, layer, linear)
    for site in spec.sites.values():
        if packed.has_rotation(layer, site.name):
            yield partial(packed.rotation, layer, site)
        yield partial(packed.clip, layer, site.name)
        yield partial(packed.int8, layer, site.name, site.k)


def _faults(check: Callable[[], Any]) -> Iterator[str]:
    """The line of a check that fails."""
    try:
        check()
    except ValueError as error:  # FormatError is one
        yield str(error)


def _check_dense(checkpoint: Checkpoint, name: str) -> None:
    """ValueError when a tensor that is stored as floats holds NaN or Inf."""
    if name in checkpoint.tensors:
        path = checkpoint.tensors[name].path
        require_finite(checkpoint.tensor(name), f"{path}: {name}")


def _check_table(table: PackedTable, name: str) -> None:
    """ValueError when a code behind the last column of a table is not 0."""
    rows, width = table.shape
    if width % ROW_BLOCK == 0 or table.bits == 8:
        return
    last = np.ascontiguousarray(table.codes[:, -ROW_BLOCK * table.bits // 8 :])
    ones = np.ones((rows, 1), table.scales.dtype)
    block = PackedTable(last, ones, (rows, ROW_BLOCK))
    for first in range(0, rows, ROWS_PER_BLOCK):
        values = block.gather(np.arange(first, min(first + ROWS_PER_BLOCK, rows)))
        if values[:, width % ROW_BLOCK :].any():
            raise FormatError(f"{name}.weight_codes: expected code 0 behind column {width - 1}, "
                              f"found others")
