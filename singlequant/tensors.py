# SPDX-License-Identifier: Apache-2.0
"""Safetensors files: headers are checked first, tensors are views of mapped files, and writing."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from . import _C
from ._C import FormatError
from .files import MAX_LISTING_BYTES, is_present, read_json, unique_keys, whole_file

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PICKLES = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt")

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
WEIGHT_DTYPES = ("F32", "F16", "BF16")


# ---- safetensors files --------------------------------------------------------------------------


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies; begin is a byte of the file."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    nbytes: int


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file. FormatError if any byte of it is unaccounted for."""
    if not is_present(path):
        raise FormatError(f"{path}: no such file")
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise FormatError(
                f"{path}: truncated or not safetensors: its header should take {length} bytes, "
                f"the file has {size}"
            )
        if length > MAX_LISTING_BYTES:
            raise FormatError(f"{path}: expected a header of at most {MAX_LISTING_BYTES} bytes, "
                              f"found {length}")
        raw = file.read(length)
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=unique_keys)
        if not isinstance(header, dict):
            raise ValueError(f"expected an object, found {type(header).__name__}")
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: header: {error}") from None
    header.pop("__metadata__", None)
    infos = {name: _entry(path, name, entry, 8 + length) for name, entry in header.items()}
    _check_layout(path, infos, 8 + length, size)
    return infos


def _entry(path: Path, name: str, entry: Any, start: int) -> TensorInfo:
    """One header entry, checked by itself."""
    if not isinstance(entry, dict):
        raise FormatError(f"{path}: {name}: expected an object, found {entry!r:.80}")
    dtype, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise FormatError(f"{path}: {name}: unknown dtype {dtype!r:.80}")
    for key, value in (("shape", shape), ("data_offsets", offsets)):
        if not isinstance(value, list) or not all(type(v) is int and 0 <= v < 2**62 for v in value):
            raise FormatError(f"{path}: {name}: {key}: expected sizes, found {value!r:.80}")
    if len(offsets) != 2 or len(shape) > 8:
        raise FormatError(f"{path}: {name}: data_offsets {offsets!r:.80}, shape {shape!r:.80}")
    expected, found = prod(shape) * DTYPES[dtype].itemsize, offsets[1] - offsets[0]
    if expected != found:
        raise FormatError(
            f"{path}: {name}: {dtype} {shape} takes {expected} bytes, its offsets {offsets} {found}"
        )
    return TensorInfo(path, dtype, tuple(shape), start + offsets[0], found)


def _check_layout(path: Path, infos: Mapping[str, TensorInfo], start: int, size: int) -> None:
    """The tensors must follow each other from start to the end of the file."""
    end = start
    for name, info in sorted(infos.items(), key=lambda item: (item[1].begin, item[1].nbytes)):
        if info.begin != end:
            kind = "overlaps the tensor before it" if info.begin < end else "leaves a gap before it"
            raise FormatError(f"{path}: {name}: {kind}: expected byte {end}, found {info.begin}")
        end = info.begin + info.nbytes
        if end > size:
            raise FormatError(
                f"{path}: {name}: truncated: the tensor ends at byte {end}, the file has {size}"
            )
    if end != size:
        raise FormatError(f"{path}: expected {end} bytes, found {size}: bytes of no tensor follow")


def find_tensors(folder: Path) -> dict[str, TensorInfo]:
    """All tensors of a model folder: model.safetensors, or the shards of its index."""
    if not folder.is_dir():
        raise FormatError(f"{folder}: no such folder")
    if is_present(folder / SINGLE_FILE):
        return read_header(folder / SINGLE_FILE)
    if not is_present(folder / INDEX_FILE):
        raise FormatError(_no_weights(folder))
    return _indexed_tensors(folder, folder / INDEX_FILE)


def _no_weights(folder: Path) -> str:
    """The text of the error when a folder has no readable weights."""
    pickles = sorted(file.name for pattern in PICKLES for file in folder.glob(pattern))
    if pickles:
        return (
            f"{folder}: {pickles[0]}: pickled weights are refused, loading them may run any code; "
            f"expected {SINGLE_FILE} or {INDEX_FILE}. Convert a folder you trust by transformers: "
            f"AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)"
        )
    shards = sorted(file.name for file in folder.glob("*.safetensors"))
    found = f"found {', '.join(shards[:3])} without an index" if shards else "found no safetensors"
    return f"{folder}: expected {SINGLE_FILE} or {INDEX_FILE}, {found}"


def _indexed_tensors(folder: Path, index: Path) -> dict[str, TensorInfo]:
    """The tensors of a sharded folder. Shards may be links, but their names are plain."""
    weight_map = read_json(index, MAX_LISTING_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError(f"{index}: weight_map: expected an object, found {weight_map!r:.80}")
    for name, file in weight_map.items():
        if not isinstance(file, str) or file in ("", ".", "..") or set(file) & set("/\\\0"):
            raise FormatError(
                f"{index}: {name}: expected the name of a file in this folder, found {file!r:.200}"
            )
    tensors: dict[str, TensorInfo] = {}
    for file in sorted(set(weight_map.values())):
        for name, info in read_header(folder / file).items():
            if name in tensors:
                raise FormatError(
                    f"{folder / file}: {name}: duplicate, also in {tensors[name].path.name}"
                )
            tensors[name] = info
    for name, file in weight_map.items():
        found = tensors[name].path.name if name in tensors else "no file"
        if found != file:
            raise FormatError(f"{index}: {name}: expected in {file}, found in {found}")
    return tensors


class TensorFiles:
    """The tensors of a folder, by name. A file is mapped when a tensor of it is first viewed."""

    def __init__(self, infos: Mapping[str, TensorInfo]) -> None:
        self.infos = infos
        self._states: dict[Path, list[int]] = {}  # of the files when they were mapped

    @cached_property
    def _maps(self) -> dict[Path, mmap.mmap]:
        """One read-only map per file."""
        maps = {}
        for path in sorted({info.path for info in self.infos.values()}):
            with path.open("rb") as file:
                self._states[path] = _state(os.fstat(file.fileno()))
                maps[path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            shown = "".join(c if c.isprintable() else "?" for c in str(path))
            _C.watch_mapping(
                np.frombuffer(maps[path], np.uint8),
                f"singlequant: {shown[-800:]}: the file became shorter while it was read")
        return maps

    def __contains__(self, name: str) -> bool:
        return name in self.infos

    def view(self, name: str) -> NDArray[Any]:
        """Read-only view of a tensor; no byte is read before it is used. KeyError if unknown."""
        info = self.infos[name]
        dtype = DTYPES[info.dtype]
        if not info.nbytes:
            return np.empty(info.shape, dtype)
        flat = np.frombuffer(self._maps[info.path], dtype, prod(info.shape), info.begin)
        return flat.reshape(info.shape)

    def pages(self, name: str, page: int = 4096) -> list[memoryview]:
        """The first, the middle and the last bytes of a tensor, at most a page each."""
        info = self.infos[name]
        data, end = memoryview(self._maps[info.path]), info.begin + info.nbytes
        begins = (0, info.nbytes // 2, max(0, info.nbytes - page))
        return [data[info.begin + b : min(info.begin + b + page, end)] for b in begins]

    def release(self, name: str) -> None:
        """Give back the memory of a tensor's pages, apart from those it shares with neighbours.

        Views stay as they are: the maps are of files and read-only, so that a later read maps the
        same bytes again.
        """
        info, page = self.infos[name], mmap.PAGESIZE
        begin = -(-info.begin // page) * page
        end = (info.begin + info.nbytes) // page * page
        if begin < end:
            self._maps[info.path].madvise(mmap.MADV_DONTNEED, begin, end - begin)

    def require_unchanged(self) -> None:
        """FormatError that names a file which somebody wrote to since it was mapped.

        A file that got its name in the place of another changes nothing: the map is of the old one.
        """
        for path in self._maps:
            with contextlib.suppress(FileNotFoundError):
                inode, *now = _state(path.stat())
                if inode == self._states[path][0] and now != self._states[path][1:]:
                    raise FormatError(f"{path}: the file changed while it was read")

    @property
    def bytes_on_disk(self) -> int:
        """Bytes of the files."""
        return sum(path.stat().st_size for path in {i.path for i in self.infos.values()})


def _state(found: os.stat_result) -> list[int]:
    """Which file it is, when it was written to, and its bytes."""
    return [found.st_ino, found.st_mtime_ns, found.st_size]


def check_tensor(
    folder: Path,
    infos: Mapping[str, TensorInfo],
    name: str,
    dtypes: tuple[str, ...],
    shape: tuple[int, ...],
) -> TensorInfo:
    """The tensor's entry. FormatError unless it is there with one of these types and this shape."""
    info = infos.get(name)
    if info is None:
        raise FormatError(f"{folder}: {name}: missing tensor, expected shape {list(shape)}")
    if info.dtype not in dtypes:
        expected = " or ".join(dtypes)
        raise FormatError(f"{info.path}: {name}: expected dtype {expected}, found {info.dtype}")
    if info.shape != shape:
        raise FormatError(
            f"{info.path}: {name}: expected shape {list(shape)}, found {list(info.shape)}"
        )
    return info


# ---- writing ------------------------------------------------------------------------------------


def write_safetensors(path: Path, tensors: Mapping[str, NDArray[Any]]) -> None:
    """Writes tensors to path without copying them; path appears only once all is on the disk.

    Same input, same bytes: wider types first, then by name, as the safetensors library orders
    them. OSError if the disk is full.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    order = sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    begin = 0
    for name, array in order:
        end = begin + array.nbytes
        header[name] = {
            "dtype": DTYPE_NAMES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [begin, end],
        }
        begin = end
    text = json.dumps(header, allow_nan=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with whole_file(path) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, array in order:
            file.write(memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8)))
