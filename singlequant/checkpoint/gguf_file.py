# SPDX-License-Identifier: Apache-2.0
"""A GGUF file as a config.json and tensors under the family's names, by way of the gguf package."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .._C import FormatError
from ..models.families import find_family
from ..models.gguf_config import (
    ROTARY_TENSORS,
    ROWS,
    Row,
    gguf_package,
    make_config,
    reordered_heads,
    tensor_names,
)
from ..models.spec import ModelSpec
from ..tensors import TensorFiles
from .decoded import Decoded, Forms, StoredTensors
from .floats import made_info
from .gguf_header import PLAIN, Header, Stored, read_gguf_header

VALUES_AT_A_TIME = 1 << 22  # dequantized in float32 before they are rounded to float16


@dataclass(frozen=True)
class GgufModel:
    """An opened file."""

    config: dict[str, Any]  # as config.json would say it
    spec: ModelSpec
    files: TensorFiles


def open_gguf(path: Path) -> GgufModel:
    """The model of a file. FormatError names what is wrong; ImportError without the package."""
    package = gguf_package()
    sizes = {int(kind): size for kind, size in package.GGML_QUANT_SIZES.items()}
    header = read_gguf_header(path, sizes)
    files = TensorFiles({name: entry.info for name, entry in header.tensors.items()})
    name = header.metadata.get("general.architecture")
    row = ROWS.get(name) if isinstance(name, str) else None
    if row is None:
        raise FormatError(f"{path}: general.architecture: expected one of {', '.join(ROWS)}, found "
                          f"{name!r:.80}")
    config = make_config(path, name, row, header.metadata,
                         {key: entry.shape for key, entry in header.tensors.items()}, files.view)
    spec = find_family(config, str(path)).spec(config, str(path))
    if spec.layers > len(header.tensors):
        raise FormatError(f"{path}: {name}.block_count: expected at most {len(header.tensors)}, "
                          f"the number of tensors, found {spec.layers}")
    sources = tensor_names(package, name, spec)
    unread = header.tensors.keys() - {source for source, _ in sources.values()} - {*ROTARY_TENSORS}
    if unread:
        raise FormatError(f"{path}: {min(unread)}: unexpected tensor: not part of a {spec.family} "
                          f"with {spec.layers} layers as the metadata describe it")
    return GgufModel(config, spec, _shown(package, path, header, row, spec, files, sources))


# ---- tensors ------------------------------------------------------------------------------------


def _shown(
    package: Any, path: Path, header: Header, row: Row, spec: ModelSpec, files: TensorFiles,
    sources: dict[str, tuple[str, int | None]],
) -> StoredTensors:
    """The tensors under the spec's names; a missing one is left for the check of all names."""
    names, forms, shapes = {}, Forms(), dict(spec.tensors())
    _require_kinds(package, path, header, {source for source, _ in sources.values()})
    for name, (source, expert) in sources.items():
        entry = header.tensors.get(source)
        if entry is None:
            continue
        heads = reordered_heads(row, source, spec)
        offset = row.offset if source.endswith("norm.weight") else 0.0
        change = _Change(entry, shapes[name], expert, heads, offset)
        if change.needed:
            names[source] = source
            made = made_info(entry.info, change.made, change.dtype)
            forms.add(name, Decoded(made, (source,), partial(_decode, package, change)))
        else:
            names[name] = source
    return StoredTensors(files, names, forms)


@dataclass(frozen=True)
class _Change:
    """What lies between a stored tensor and the family's."""

    entry: Stored
    shape: tuple[int, ...]  # the family's
    expert: int | None  # of a stack
    heads: int  # whose rows are reordered; 0: none
    offset: float  # that was added

    @property
    def made(self) -> tuple[int, ...]:
        """The shape of the result: the family's where only sizes of 1 differ."""
        shape = self.entry.shape if self.expert is None else self.entry.shape[1:]
        same = [n for n in shape if n != 1] == [n for n in self.shape if n != 1]
        return self.shape if same else shape

    @property
    def dtype(self) -> str:
        """Quantized weights become float16, which keeps more of a value than its block says."""
        plain = PLAIN.get(self.entry.kind)
        return "F16" if plain is None else "F32" if self.offset else plain

    @property
    def needed(self) -> bool:
        """Whether the stored bytes are not the tensor already."""
        return (self.entry.kind not in PLAIN or self.expert is not None or bool(self.heads)
                or bool(self.offset) or self.made != self.entry.shape)


def _decode(package: Any, change: _Change, stored: NDArray[Any]) -> NDArray[Any]:
    """The family's tensor."""
    if change.expert is not None:
        if change.expert >= len(stored):
            raise FormatError(f"{change.entry.info.path}: expected more than {change.expert} "
                              f"experts in a stack, found {len(stored)}")
        stored = stored[change.expert]
    values = stored
    if change.entry.kind not in PLAIN:
        values = _dequantized(package, change.entry.kind, stored)
    if change.heads:
        half = len(values) // change.heads // 2
        values = values.reshape(change.heads, half, 2, -1).swapaxes(1, 2)
    if change.offset:
        values = values.astype(np.float32) - np.float32(change.offset)
    return np.ascontiguousarray(values).reshape(change.made).view()


def _dequantized(package: Any, kind: int, stored: NDArray[np.uint8]) -> NDArray[np.float16]:
    """Rows of blocks as float16, some rows at a time: the package works in float32."""
    rows = stored.reshape(-1, stored.shape[-1])
    block, nbytes = package.GGML_QUANT_SIZES[package.GGMLQuantizationType(kind)]
    k = rows.shape[1] // nbytes * block
    out, step = np.empty((len(rows), k), np.float16), max(1, VALUES_AT_A_TIME // max(k, 1))
    for first in range(0, len(rows), step):
        part = np.ascontiguousarray(rows[first : first + step])
        with np.errstate(all="ignore"):  # Inf and NaN are refused by name when they are used
            out[first : first + step] = package.quants.dequantize(
                part, package.GGMLQuantizationType(kind))
    return out.reshape(*stored.shape[:-1], k)


def _require_kinds(package: Any, path: Path, header: Header, used: set[str]) -> None:
    """FormatError for a type that the gguf package cannot dequantize."""
    for name in sorted(used & header.tensors.keys()):
        entry = header.tensors[name]
        if entry.kind in PLAIN or not prod(entry.shape):
            continue
        kind = package.GGMLQuantizationType(entry.kind)
        block = np.zeros((1, package.GGML_QUANT_SIZES[kind][1]), np.uint8)
        try:
            package.quants.dequantize(block, kind)
        except NotImplementedError:
            raise FormatError(f"{path}: {name}: expected a type that the gguf package dequantizes, "
                              f"found {kind.name}") from None
