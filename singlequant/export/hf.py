# SPDX-License-Identifier: Apache-2.0
"""Writes a plain folder as `save_pretrained` does: the family's own names, no rotation, no codes.

Of the checkpoint it reads the parts by role. The family's row says in which tensors they lie: by
themselves, fused, transposed, or stacked over experts.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from .._C import FormatError
from ..models.families import find_family
from ..models.spec import LinearSpec, ModelSpec
from ..rows import ROWS_PER_BLOCK, float32_blocks
from ..tensors import INDEX_FILE, write_safetensors
from ..weights import PackedTable, norm_tensors
from .folder import (
    CONFIG_FILE,
    copied_files,
    copy_files,
    shard_index,
    shard_names,
    whole_folder,
    write_json,
)

if TYPE_CHECKING:
    from ..checkpoint.folder import Checkpoint

NUMPY_DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16),
                "float32": np.dtype(np.float32)}
DTYPE_KEYS = ("dtype", "torch_dtype")  # of config.json, new and old
KEPT = ("correction",)  # dense tensors that stay as they are: transformers keeps them in float32


def write(
    checkpoint: Checkpoint, out: Path, dtype: str,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write an unquantized checkpoint, or a view of one, as a plain folder.

    FormatError where config.json does not describe the checkpoint, ValueError for weights that are
    beyond dtype.
    """
    spec, kind = stored_spec(checkpoint), NUMPY_DTYPES[dtype]
    shards, copies = shard_names(spec.layers), copied_files(checkpoint.path)
    with whole_folder(out, [*shards, INDEX_FILE, CONFIG_FILE, *copies]) as folder:
        paths = [folder / name for name in shards]
        outer = {name: narrowed(tensor, kind, name) for name, tensor in checkpoint.outer.items()}
        write_safetensors(paths[0], outer)
        del outer
        for i, path in enumerate(paths[1:]):
            write_safetensors(path, layer_tensors(checkpoint, spec, i, kind))
            if progress:
                progress(i + 1, spec.layers)
        write_json(folder / INDEX_FILE, shard_index(paths))
        write_json(folder / CONFIG_FILE, plain_config(checkpoint, dtype))
        copy_files(checkpoint.path, folder, copies)


def plain_config(checkpoint: Checkpoint, dtype: str) -> dict[str, Any]:
    """config.json of the written folder."""
    keys = [key for key in DTYPE_KEYS if key in checkpoint.config] or DTYPE_KEYS[1:]
    return {**checkpoint.config, **dict.fromkeys(keys, dtype)}


# ---- names --------------------------------------------------------------------------------------


def stored_spec(checkpoint: Checkpoint) -> ModelSpec:
    """The spec whose linears lie where the family's row says.

    FormatError unless config.json has a model_type and describes what the checkpoint holds.
    """
    source, config = str(checkpoint.path / CONFIG_FILE), checkpoint.config
    if not isinstance(config.get("model_type"), str):
        raise FormatError(f"{source}: model_type: expected a name, as transformers opens a folder "
                          f"by it, found {config.get('model_type')!r:.80}")
    spec = find_family(config, source).spec(config, source)
    if _unnamed(spec) != _unnamed(checkpoint.spec):
        raise FormatError(f"{source}: expected the model that its weights are of, found other "
                          f"sizes or blocks than in quantization_config.model")
    return spec


def _unnamed(spec: ModelSpec) -> ModelSpec:
    """The spec without the places of its linears, which may be stored in more than one way."""
    return replace(spec, kinds=tuple(
        replace(kind, linears={role: LinearSpec(role, x.n, x.k, x.bias)
                               for role, x in kind.linears.items()})
        for kind in spec.kinds))


def layer_tensors(
    checkpoint: Checkpoint, spec: ModelSpec, i: int, dtype: np.dtype,
    encode: Callable[[Any, str], NDArray[Any]] | None = None, skipped: Container[str] = (),
) -> dict[str, NDArray[Any]]:
    """All tensors of layer i by name, as the family stores them.

    encode(values, name): makes of a tensor, or of a linear's rows of it, what is stored; without
    it that is dtype. The rows of a linear stay apart, whatever is made of one. skipped: tensors
    that are left out.
    """
    encode = encode or (lambda values, name: narrowed(values, dtype, name))
    layer, own = checkpoint.layer(i), spec.layer(i)
    tensors: dict[str, NDArray[Any]] = {}
    for place, norm in layer.norms.items():
        for name, array in norm_tensors(norm, own.norms[place].weight).items():
            tensors[name] = encode(array, name)
    for key, dense in layer.dense.items():
        kept = key in KEPT
        tensors[dense.name] = dense.array if kept else encode(dense.array, dense.name)
    for role, place in own.linears.items():
        linear, shapes = layer.linears[role], dict(place.tensors(i))
        parts = {place.weight_name(i): linear.weight, place.bias_name(i): linear.bias}
        for name, values in parts.items():
            if values is None or name in skipped:
                continue
            values = encode(values, name)
            if place.stored is None:
                tensors[name] = values
                continue
            if name not in tensors:
                wide = shapes[name] if place.transposed else (*shapes[name][:-1], values.shape[-1])
                tensors[name] = np.empty(wide if values.ndim == 2 else shapes[name], values.dtype)
            rows = stored_rows(place, tensors[name], values.ndim)
            rows[...] = values.reshape(rows.shape)
    return tensors


def stored_rows(place: LinearSpec, stored: NDArray[Any], ndim: int) -> NDArray[Any]:
    """A view [blocks, n / blocks, ...] of a linear's rows in the tensor that holds them.

    ndim: 2 of a weight, 1 of a bias.
    """
    if place.experts:
        stored = stored[place.expert]
    if place.transposed and ndim == 2:
        stored = stored.T
    blocks = stored.reshape(place.blocks, -1, *stored.shape[1:])  # one axis becomes two: no copy
    return blocks[:, place.first_row : place.first_row + place.n // place.blocks]


# ---- values -------------------------------------------------------------------------------------


def narrowed(tensor: NDArray[Any] | PackedTable, dtype: np.dtype, name: str) -> NDArray[Any]:
    """A tensor in another type, a block of rows at a time.

    ValueError names it when it holds NaN or Inf, or what float16 cannot hold.
    """
    out = np.empty(tensor.shape, dtype)
    flat = out.reshape(len(out), -1)
    largest = float(ml_dtypes.finfo(dtype).max)
    for rows, block in _blocks(tensor, name):
        if dtype.itemsize < 4 and (found := float(np.abs(block).max(initial=0))) > largest:
            raise ValueError(f"{name}: expected values up to {largest:g}, as {dtype.name} has no "
                             f"larger ones, found {found:g}: choose another dtype")
        flat[rows] = block
    return out


def _blocks(
    tensor: NDArray[Any] | PackedTable, name: str
) -> Iterator[tuple[slice, NDArray[np.float32]]]:
    """(rows, block) of a tensor in float32, codes decoded."""
    if not isinstance(tensor, PackedTable):
        yield from float32_blocks(tensor, name)
        return
    for first in range(0, tensor.shape[0], ROWS_PER_BLOCK):
        last = min(first + ROWS_PER_BLOCK, tensor.shape[0])
        yield slice(first, last), tensor.gather(np.arange(first, last))
