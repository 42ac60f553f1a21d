# SPDX-License-Identifier: Apache-2.0
"""Writes a folder with a GGUF file, by way of the gguf package, and the tokenizer's files.

`gguf` has weights in 16 or 32 bits. `gguf-blocks` keeps the codes of a packed folder whose linears
read their inputs as they are: 32 codes and a float16 scale are one block of llama.cpp's.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from .. import _C
from ..files import errors_name
from ..models.gguf_config import gguf_package, reordered_heads, tensor_names
from ..models.gguf_metadata import Metadata, gguf_metadata
from ..models.spec import ModelSpec
from ..rows import ROWS_PER_BLOCK
from ..weights import PackedLinear, PackedTable
from .codes import require_own_inputs
from .folder import CONFIG_FILE, copied_files, copy_files, whole_folder
from .gguf_tokens import add_tokenizer
from .hf import NUMPY_DTYPES, layer_tensors, narrowed, stored_spec

if TYPE_CHECKING:
    from ..checkpoint.folder import Checkpoint

FILE = "model.gguf"
BLOCK = 32  # codes that share a scale
LARGEST = float(np.finfo(np.float16).max)  # of the scales
# Bits of codes -> the type of llama.cpp that holds them, and the bits that each has there.
BLOCKS = {4: ("Q4_0", 4), 5: ("Q5_0", 5), 6: ("Q8_0", 8), 8: ("Q8_0", 8)}
PLAIN = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}

Encode = Callable[[Any, str], NDArray[Any]]


@dataclass(frozen=True)
class _Tensor:
    """A tensor of the file. parts: the spec's tensors that it stacks, or the one that it is."""

    shape: tuple[int, ...]
    kind: str  # of llama.cpp
    parts: tuple[str, ...]


def write(
    checkpoint: Checkpoint, out: Path, dtype: str,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write an unquantized checkpoint, or a view of one.

    ValueError for a model that GGUF cannot say and for weights beyond dtype.
    """
    _write(checkpoint, out, dtype, progress)


def write_blocks(
    checkpoint: Checkpoint, out: Path, dtype: str,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write a packed checkpoint; dtype is that of weights which are not packed.

    ValueError where a site is rotated at inference, and where blocks of 32 do not fill rows.
    """
    require_own_inputs(checkpoint, "gguf-blocks")
    _write(checkpoint, out, dtype, progress)


def _write(
    checkpoint: Any, out: Path, dtype: str, progress: Callable[[int, int], None] | None
) -> None:
    package, spec = gguf_package(), stored_spec(checkpoint)
    meta = gguf_metadata(checkpoint.config, spec, str(checkpoint.path / CONFIG_FILE))
    plan = _plan(package, meta, checkpoint, spec, dtype)
    copies = copied_files(checkpoint.path)
    with whole_folder(out, [FILE, *copies]) as folder, errors_name(folder / FILE):
        writer = package.GGUFWriter(folder / FILE, meta.name)
        try:
            _add_keys(package, writer, meta, checkpoint, plan, dtype)
            for name, tensor in plan.items():
                _add_info(package, writer, name, tensor)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for array in _arrays(checkpoint, spec, meta, plan, dtype, progress):
                writer.write_tensor_data(array)
        finally:
            writer.close()
        _sync(folder / FILE)
        copy_files(checkpoint.path, folder, copies)


def _sync(path: Path) -> None:
    """Wait until a file is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---- header -------------------------------------------------------------------------------------


def _plan(
    package: Any, meta: Metadata, checkpoint: Any, spec: ModelSpec, dtype: str
) -> dict[str, _Tensor]:
    """The tensors of the file by name, in its order."""
    names, kinds = tensor_names(package, meta.name, spec), _kinds(checkpoint, spec)
    found: dict[str, _Tensor] = {name: _Tensor(array.shape, "F32", ())
                                 for name, array in meta.tensors.items()}
    for name, shape in spec.tensors():
        if name not in names:
            raise ValueError(f"{name}: expected a tensor that GGUF has a name for in {meta.name}, "
                             f"found none")
        there, expert = names[name]
        matrix = len([size for size in shape if size > 1]) > 1
        kind = kinds.get(name, PLAIN[dtype] if matrix and _is_weight(name, spec) else "F32")
        _require_blocks(package, name, shape, kind)
        if expert is None:
            found[there] = _Tensor(_squeezed(shape), kind, (name,))
            continue
        before = found.get(there)
        if before is not None and before.kind != kind:
            raise ValueError(f"{name}: expected {before.kind}, as the other experts of the layer "
                             f"have, found {kind}: GGUF stacks them; choose --to gguf")
        parts = () if before is None else before.parts
        found[there] = _Tensor((len(parts) + 1, *shape), kind, (*parts, name))
    return found


def _is_weight(name: str, spec: ModelSpec) -> bool:
    """Whether a matrix is of a linear or a table; what llama.cpp keeps in float32 is neither."""
    return not any(name.endswith(tensor.name.partition("{i}")[2])
                   for kind in spec.kinds for tensor in kind.dense.values())


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape without sizes of 1 in front."""
    while len(shape) > 1 and shape[0] == 1:
        shape = shape[1:]
    return shape


def _kinds(checkpoint: Any, spec: ModelSpec) -> dict[str, str]:
    """Types of the tensors that are written in blocks, by the spec's names."""
    found: dict[str, str] = {}
    if not checkpoint.quantized:
        return found
    for name, table in checkpoint.outer.items():
        if isinstance(table, PackedTable):
            found[name] = BLOCKS[table.bits][0]
    for i in range(spec.layers):
        layer = checkpoint.layer(i)
        for role, place in spec.layer(i).linears.items():
            weight, name = layer.linears[role].weight, place.weight_name(i)
            kind = BLOCKS[weight.bits][0] if isinstance(weight, PackedLinear) else ""
            if found.setdefault(name, kind) != kind:
                raise ValueError(f"{name}: expected one type for all linears that it holds, found "
                                 f"{found[name] or 'none'} and {kind or 'none'}: choose --to gguf")
    return {name: kind for name, kind in found.items() if kind}


def _require_blocks(package: Any, name: str, shape: tuple[int, ...], kind: str) -> None:
    """ValueError unless a row of a tensor is whole blocks of its type."""
    block = package.GGML_QUANT_SIZES[package.GGMLQuantizationType[kind]][0]
    if shape[-1] % block:
        raise ValueError(f"{name}: expected rows of whole blocks of {block} for {kind}, found "
                         f"{shape[-1]} values: choose --to gguf")


def _add_keys(
    package: Any, writer: Any, meta: Metadata, checkpoint: Any, plan: Mapping[str, _Tensor],
    dtype: str,
) -> None:
    """Metadata, and the tokenizer where llama.cpp has it."""
    for key, value in meta.keys.items():
        add = {int: writer.add_uint32, float: writer.add_float32, list: writer.add_array,
               str: writer.add_string}[type(value)]
        add(key, value)
    kinds = {tensor.kind for tensor in plan.values()} & {kind for kind, _ in BLOCKS.values()}
    fullest = min(kinds, default=PLAIN[dtype])
    kind = package.LlamaFileType["ALL_F32" if fullest == "F32" else f"MOSTLY_{fullest}"]
    writer.add_file_type(kind)
    writer.add_quantization_version(package.GGML_QUANT_VERSION)
    writer.add_name(checkpoint.path.resolve().name)
    add_tokenizer(package, writer, checkpoint)


def _add_info(package: Any, writer: Any, name: str, tensor: _Tensor) -> None:
    """The line of a tensor in the header."""
    kind = package.GGMLQuantizationType[tensor.kind]
    values, nbytes = package.GGML_QUANT_SIZES[kind]
    size = int(np.prod(tensor.shape)) // values * nbytes
    writer.add_tensor_info(name, tensor.shape, np.dtype(np.float32), size, raw_dtype=kind)


# ---- data ---------------------------------------------------------------------------------------


def _arrays(
    checkpoint: Any, spec: ModelSpec, meta: Metadata, plan: Mapping[str, _Tensor], dtype: str,
    progress: Callable[[int, int], None] | None,
) -> Iterator[NDArray[Any]]:
    """The data of all tensors in the order of the plan, one layer in memory at a time."""
    yield from meta.tensors.values()
    place = {part: name for name, tensor in plan.items() for part in tensor.parts}
    names = [place[name] for name, _ in spec.outer_tensors()]
    for name, array in zip(names, checkpoint.outer.items(), strict=True):
        yield _stored(name, plan[name], [_encoder(plan, place)(array[1], array[0])], meta, spec)
    for i in range(spec.layers):
        tensors = layer_tensors(checkpoint, spec, i, NUMPY_DTYPES[dtype], _encoder(plan, place))
        for name in dict.fromkeys(place[part] for part, _ in spec.layer_tensors(i)):
            parts = [tensors.pop(part) for part in plan[name].parts]
            yield _stored(name, plan[name], parts, meta, spec)
        if progress:
            progress(i + 1, spec.layers)


def _encoder(plan: Mapping[str, _Tensor], place: Mapping[str, str]) -> Encode:
    """What turns a weight into values of its tensor's type."""
    dtypes = {kind: NUMPY_DTYPES[name] for name, kind in PLAIN.items()}

    def encode(weight: Any, name: str) -> NDArray[Any]:
        kind = plan[place[name]].kind
        if kind in dtypes:
            return narrowed(weight, dtypes[kind], name)
        return block_rows(weight, name)

    return encode


def _stored(
    name: str, tensor: _Tensor, parts: list[NDArray[Any]], meta: Metadata, spec: ModelSpec
) -> NDArray[Any]:
    """A tensor as llama.cpp's converter would store it."""
    array = parts[0] if len(parts) == 1 and tensor.shape[0] != 1 else np.stack(parts)
    heads = reordered_heads(meta.row, name, spec)
    if heads:
        halves = array.reshape(heads, 2, len(array) // heads // 2, -1)
        array = halves.swapaxes(1, 2).reshape(array.shape)
    if meta.row.offset and name.endswith("norm.weight"):
        array = array + np.float32(meta.row.offset)
    array = np.ascontiguousarray(array)
    return array.view(np.uint16) if array.dtype == ml_dtypes.bfloat16 else array


# ---- blocks -------------------------------------------------------------------------------------


def block_rows(weight: PackedLinear | PackedTable, name: str) -> NDArray[np.uint8]:
    """Rows of blocks, each a float16 scale and 32 codes. ValueError for a scale beyond float16."""
    n, k = weight.shape
    bits = BLOCKS[weight.bits][1]
    out = np.empty((n, k // BLOCK, 2 + BLOCK * bits // 8), np.uint8)
    for first in range(0, n, ROWS_PER_BLOCK):
        rows = slice(first, min(first + ROWS_PER_BLOCK, n))
        codes, scales = _codes(weight, rows)
        largest = float(np.abs(scales).max(initial=0))
        if largest > LARGEST:
            raise ValueError(f"{name}: expected scales up to {LARGEST:g}, as blocks have them in "
                             f"float16, found {largest:g}: choose --to gguf")
        out[rows, :, :2] = scales.astype(np.float16)[..., None].view(np.uint8)
        out[rows, :, 2:] = _block_codes(codes, bits)
    return out.reshape(n, -1)


def _codes(
    weight: PackedLinear | PackedTable, rows: slice
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Codes [rows, blocks, 32] and scales [rows, blocks] of some rows."""
    count, blocks = rows.stop - rows.start, weight.shape[1] // BLOCK
    if isinstance(weight, PackedTable):
        scales = weight.scales[rows].astype(np.float32)
        values = weight.gather(np.arange(rows.start, rows.stop)).reshape(count, blocks, BLOCK)
        divisors = np.where(scales == 0, np.float32(1), scales)[..., None]
        return np.rint(values / divisors).astype(np.int8), scales
    codes = _C.unpack(weight.words[rows], weight.shape[1], weight.bits)
    scales = weight.scales[rows]
    scales = np.repeat(scales, blocks // scales.shape[1], axis=1)
    return codes.reshape(count, blocks, BLOCK), scales


def _block_codes(codes: NDArray[np.int8], bits: int) -> NDArray[np.uint8]:
    """[..., 4 * bits] bytes of [..., 32] codes, as ggml-common.h lays out Q4_0, Q5_0 and Q8_0.

    Byte j has the low four bits of codes j and j + 16; a fifth bit of each lies in front.
    """
    if bits == 8:
        return codes.view(np.uint8)
    stored = (codes + np.int8(1 << bits - 1)).view(np.uint8)
    nibbles = stored[..., :16] & 15 | stored[..., 16:] << 4
    if bits == 4:
        return nibbles
    return np.concatenate([np.packbits(stored >> 4, axis=-1, bitorder="little"), nibbles], axis=-1)
