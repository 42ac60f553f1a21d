# SPDX-License-Identifier: Apache-2.0
"""What formats that keep the codes of a packed folder share: what they ask of it, and the layer as
other programs store it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..methods.registry import METHODS
from ..models.spec import LinearSpec, ModelSpec
from ..tensors import INDEX_FILE, write_safetensors
from ..weights import PackedLinear
from .folder import (
    CONFIG_FILE,
    copied_files,
    copy_files,
    shard_index,
    shard_names,
    whole_folder,
    write_json,
)
from .hf import NUMPY_DTYPES, layer_tensors, narrowed, stored_rows
from .packed import source_config

if TYPE_CHECKING:
    from ..checkpoint.folder import Checkpoint

ROTATIONS = ".rotations."


def require_packed(checkpoint: Checkpoint, to: str) -> None:
    """ValueError for an unquantized model."""
    if not checkpoint.quantized:
        raise ValueError(f"{checkpoint.path}: {to}: expected a packed folder, whose codes it "
                         "keeps, found an unquantized model: quantize it first")


def rotated_sites(checkpoint: Checkpoint) -> list[str]:
    """The sites of a packed folder that are rotated at inference: "model.layers.0.rotations.o"."""
    names = (name.rpartition(".")[0] for name in checkpoint.tensors if ROTATIONS in name)
    return list(dict.fromkeys(names))


def require_own_inputs(checkpoint: Checkpoint, to: str) -> None:
    """ValueError unless every packed linear reads its inputs as the model makes them."""
    require_packed(checkpoint, to)
    rotated = rotated_sites(checkpoint)
    if rotated:
        plain = [row.name for row in METHODS.values() if not row.rotates and not row.aligns]
        raise ValueError(
            f"{checkpoint.path}: {to}: expected codes of weights that read their inputs as they "
            f"are, found a rotation that runs beside them ({rotated[0]}): quantize with --method "
            f"{' or '.join(plain)} (of a folder that --to rotated-hf --fuse rotation made, for a "
            f"rotation inside the weights), or choose --to hf or gguf, which turn weights back")


def require_scheme(checkpoint: Checkpoint, to: str, *schemes: str) -> None:
    """ValueError for a packed folder of another scheme."""
    found = checkpoint.quant_config.scheme
    if found not in schemes:
        raise ValueError(f"{checkpoint.path}: {to}: expected {' or '.join(schemes)}, found {found}")


def require_shapes(name: str, linear: PackedLinear, to: str, bits: tuple[int, ...]) -> None:
    """ValueError unless a linear has one of those numbers of bits and fills words both ways."""
    if linear.bits not in bits:
        raise ValueError(f"{name}: {to}: expected {' or '.join(map(str, bits))} bits, found "
                         f"{linear.bits}: quantize with --bits {bits[0]}")
    per = 32 // linear.bits
    if linear.shape[0] % per or linear.shape[1] % per:
        raise ValueError(f"{name}: {to}: expected sizes that are multiples of {per}, found "
                         f"{list(linear.shape)}")


def require_linears(spec: ModelSpec, to: str, source: Any) -> None:
    """ValueError where a family's linears are no matrices [outputs, inputs] of their own."""
    for kind in spec.kinds:
        for role, place in kind.linears.items():
            if kind.experts or place.transposed:
                what = "experts" if kind.experts else "weights stored as [inputs, outputs]"
                raise ValueError(f"{source}: {to}: expected a family of plain linears, found "
                                 f"{what} ({spec.family}: {role})")


class Plain:
    """A packed checkpoint with the config.json of the model that was quantized."""

    def __init__(self, source: Checkpoint) -> None:
        self._source, self.config = source, source_config(source.config)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)


# ---- a layer ------------------------------------------------------------------------------------


def packed_linears(checkpoint: Any, spec: ModelSpec, i: int) -> dict[str, PackedLinear]:
    """The packed linears of layer i as the family stores them, by name without .weight.

    Linears whose rows share a tensor become one. ValueError where their bits differ, or where some
    of them are not packed.
    """
    layer, found = checkpoint.layer(i), {}
    groups: dict[str, dict[LinearSpec, Any]] = {}
    for role, place in spec.layer(i).linears.items():
        parts = groups.setdefault(place.weight_name(i).removesuffix(".weight"), {})
        parts[place] = layer.linears[role].weight
    for name, parts in groups.items():
        packed = [weight for weight in parts.values() if isinstance(weight, PackedLinear)]
        if packed and (len(packed) < len(parts) or len({weight.bits for weight in packed}) > 1):
            raise ValueError(f"{name}: expected as many bits for all linears that it holds, found "
                             f"{', '.join(_bits(weight) for weight in parts.values())}")
        if packed:
            found[name] = packed[0] if len(parts) == 1 else _merged(parts)
    return found


def _bits(weight: Any) -> str:
    """Of a linear's weight, in words."""
    return str(weight.bits) if isinstance(weight, PackedLinear) else "none"


def _merged(parts: Mapping[LinearSpec, PackedLinear]) -> PackedLinear:
    """Linears whose rows lie in one tensor as one linear."""
    first = next(iter(parts.values()))
    n = sum(weight.shape[0] for weight in parts.values())
    words = np.empty((n, first.words.shape[1]), np.int32)
    scales = np.empty((n, first.scales.shape[1]), np.float32)
    for place, weight in parts.items():
        for whole, own in ((words, weight.words), (scales, weight.scales)):
            rows = stored_rows(place, whole, 2)
            rows[...] = own.reshape(rows.shape)
    return PackedLinear(words, scales, (n, first.shape[1]), first.group, first.bits)


def write_linears(
    checkpoint: Any, spec: ModelSpec, out: Path, dtype: str,
    encode: Callable[[str, PackedLinear], Mapping[str, NDArray[Any]]],
    config: Callable[[Mapping[str, int]], Mapping[str, Any]],
    more: Mapping[str, NDArray[Any]] | None = None, files: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write a folder in which each packed linear has other tensors, and all else is in dtype.

    encode(name, linear): its tensors by what follows the name. config(bits): config.json, of the
    bits of each packed linear by name. more: tensors beside those outside the layers. files: other
    JSON files by name.
    """
    kind, files = NUMPY_DTYPES[dtype], files or {}
    shards, copies = shard_names(spec.layers), copied_files(checkpoint.path)
    bits: dict[str, int] = {}
    with whole_folder(out, [*shards, INDEX_FILE, CONFIG_FILE, *files, *copies]) as folder:
        paths = [folder / name for name in shards]
        outer = {name: narrowed(tensor, kind, name) for name, tensor in checkpoint.outer.items()}
        write_safetensors(paths[0], {**outer, **(more or {})})
        del outer
        for i, path in enumerate(paths[1:]):
            packed = packed_linears(checkpoint, spec, i)
            skipped = {f"{name}.weight" for name in packed}
            tensors = layer_tensors(checkpoint, spec, i, kind, skipped=skipped)
            for name, linear in packed.items():
                bits[name] = linear.bits
                tensors |= {f"{name}.{part}": array for part, array in encode(name, linear).items()}
            write_safetensors(path, tensors)
            if progress:
                progress(i + 1, spec.layers)
        write_json(folder / INDEX_FILE, shard_index(paths))
        write_json(folder / CONFIG_FILE, config(bits))
        for name, values in files.items():
            write_json(folder / name, values)
        copy_files(checkpoint.path, folder, copies)


def unpacked_modules(spec: ModelSpec, packed: Iterable[str]) -> list[str]:
    """Linears that are not among `packed`, the head first, by the family's names."""
    found, names = [spec.head], {*packed}
    for i in range(spec.layers):
        for place in spec.layer(i).linears.values():
            name = place.weight_name(i).removesuffix(".weight")
            if name not in names and name not in found:
                found.append(name)
    return found
