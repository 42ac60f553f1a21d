# SPDX-License-Identifier: Apache-2.0
"""Writes compressed-tensors folders: pack-quantized for W4A16, int-quantized for W4A8.

Words of pack-quantized are those of a packed folder. transform_config says rotations that all
layers share, as a matrix in the file: vLLM and the compressed-tensors package apply it, and
transformers does not. config.json therefore stops transformers there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .. import _C
from ..models.spec import ModelSpec
from ..weights import PackedLinear
from .codes import (
    Plain,
    require_linears,
    require_packed,
    require_scheme,
    rotated_sites,
    unpacked_modules,
    write_linears,
)
from .folder import CONFIG_FILE
from .hf import NUMPY_DTYPES, narrowed, plain_config, stored_spec
from .packed import GUARD_KEY

if TYPE_CHECKING:
    from ..checkpoint.folder import Checkpoint

TO = "compressed-tensors"
PACKED, INTEGERS = "pack-quantized", "int-quantized"
GUARD = ("none; transformers does not apply transform_config: vLLM does, and "
         "apply_transform_config of compressed-tensors")
NEAR = 1e-5  # largest difference of two layers' rotations that count as one


def write(
    checkpoint: Checkpoint, out: Path, dtype: str,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write a packed checkpoint of W4A16 or W4A8; scales and all that is not packed have dtype.

    ValueError for what compressed-tensors has no words for.
    """
    require_packed(checkpoint, TO)
    require_scheme(checkpoint, TO, "w4a16", "w4a8")
    plain = Plain(checkpoint)
    spec, recipe = stored_spec(plain), checkpoint.quant_config
    require_linears(spec, TO, checkpoint.path)
    if recipe.activation_bits == 8:
        _require_no_clips(checkpoint, spec)
    transforms, matrices = _transforms(checkpoint, spec, dtype)
    name = INTEGERS if recipe.activation_bits == 8 else PACKED

    def encode(stem: str, linear: PackedLinear) -> dict[str, NDArray[Any]]:
        scales = narrowed(linear.scales, NUMPY_DTYPES[dtype], f"{stem}.weight_scale")
        if name == INTEGERS:
            return {"weight": _C.unpack(linear.words, linear.shape[1], linear.bits),
                    "weight_scale": scales}
        return {"weight_packed": linear.words, "weight_scale": scales,
                "weight_shape": np.array(linear.shape, np.int64)}

    def config(bits: Mapping[str, int]) -> dict[str, Any]:
        values = plain_config(plain, dtype)
        settings = _settings(bits, unpacked_modules(spec, bits), name, recipe)
        guard = {GUARD_KEY: GUARD} if transforms else {}
        if transforms:
            settings["transform_config"] = {"config_groups": transforms}
        return {**values, **guard, "quantization_config": settings}

    write_linears(plain, spec, out, dtype, encode, config, matrices, progress=progress)


def _require_no_clips(checkpoint: Checkpoint, spec: ModelSpec) -> None:
    """ValueError for activations whose codes do not reach a token's largest."""
    clip = checkpoint.quant_config.activation_clip
    clips = {f"layer {i}: {site}": value for i in range(spec.layers)
             for site, value in checkpoint.layer(i).clips.items()}
    for where, value in {"the recipe": clip, **clips}.items():
        if value != 1.0:
            raise ValueError(f"{checkpoint.path}: {TO}: expected a clip of 1, as its activations "
                             f"have none, found {value:g} ({where})")


def _settings(bits: Mapping[str, int], left: list[str], name: str, recipe: Any) -> dict[str, Any]:
    """quantization_config of linears with those bits by name. left: those that stay as they are."""
    activations = None if name == PACKED else {
        "num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True,
        "observer": None, "group_size": None}
    weights = {"num_bits": _one_number(bits, name), "type": "int", "symmetric": True,
               "dynamic": False, "strategy": "group" if recipe.group_size else "channel",
               "group_size": recipe.group_size or None}
    group = {"targets": ["Linear"], "format": name, "input_activations": activations,
             "output_activations": None, "weights": weights}
    return {"quant_method": TO, "format": name, "quantization_status": "compressed",
            "config_groups": {"group_0": group}, "ignore": left, "kv_cache_scheme": None}


def _one_number(bits: Mapping[str, int], name: str) -> int:
    """The bits of all linears. int8 holds whatever codes there are; words hold one kind.

    A group for each number could say others, but transformers dequantizes all as the first group.
    """
    counts = sorted({*bits.values()})
    if len(counts) == 1:
        return counts[0]
    if name == INTEGERS:
        return 8
    raise ValueError(f"{TO}: expected one number of bits for all linears of {PACKED}, found "
                     f"{', '.join(map(str, counts))}: quantize with --bits 4")


# ---- rotations ----------------------------------------------------------------------------------


def _transforms(
    checkpoint: Checkpoint, spec: ModelSpec, dtype: str
) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """(transform_config's groups by site, the matrix of each as a tensor of its first linear).

    ValueError for a rotation that is not the same in all layers: a group has one matrix.
    """
    groups: dict[str, Any] = {}
    tensors: dict[str, NDArray[Any]] = {}
    for name in dict.fromkeys(each.rpartition(".")[2] for each in rotated_sites(checkpoint)):
        turned, left = _modules(checkpoint, spec, name)
        matrix = _shared(checkpoint, name, turned)
        first = next(iter(turned.values()))[0]
        turned_names = [module for modules in turned.values() for module in modules]
        kinds = dict.fromkeys(module.rpartition(".")[2] for module in turned_names)
        group = f"{name}_rotation"
        tensor = f"{first}.{group}_input.weight"
        scaled = matrix * np.float32(len(matrix) ** 0.5)  # both programs divide by it again
        tensors[tensor] = narrowed(scaled, NUMPY_DTYPES[dtype], tensor)
        groups[group] = {"type": "random-hadamard", "randomize": False, "requires_grad": False,
                         "apply": [{"targets": [f"re:.*{kind}$" for kind in kinds],
                                    "location": "input", "inverse": False, "ignore": left}]}
    return groups, tensors


def _modules(
    checkpoint: Checkpoint, spec: ModelSpec, site: str
) -> tuple[dict[int, list[str]], list[str]]:
    """By layer: the linears that read a site's rotated inputs. And those of all layers that read
    its own, not being packed."""
    turned: dict[int, list[str]] = {}
    left: list[str] = []
    for i in range(spec.layers):
        linears = spec.layer(i).linears
        for role in spec.layer(i).sites[site].roles:
            packed = f"{checkpoint.linear_name(i, role)}.weight_packed" in checkpoint.tensors
            module = linears[role].weight_name(i).removesuffix(".weight")
            of = turned.setdefault(i, []) if packed else left
            if module not in of:
                of.append(module)
    return turned, left


def _shared(checkpoint: Checkpoint, name: str, layers: Iterable[int]) -> NDArray[np.float32]:
    """The matrix A [k, k] of x A, of the rotation that those layers have at a site."""
    where = f"{checkpoint.path / CONFIG_FILE}: {TO}: {name}: expected one rotation for all layers"
    said, advice = "as transform_config says it", "choose --to hf, which turns weights back"
    probe = first = matrix = None
    for i in layers:
        rotation = checkpoint.layer(i).rotations.get(name)
        if rotation is None or rotation.kind != "kronecker":
            what = "none" if rotation is None else "an alignment or blocks"
            raise ValueError(f"{where}, {said}, found {what} in layer {i}: {advice}")
        if first is None:
            probe = np.random.default_rng(0).standard_normal((2, rotation.k)).astype(np.float32)
            first = _C.rotate(probe, rotation)
            matrix = _C.rotate(np.eye(rotation.k, dtype=np.float32), rotation)
        found = _C.rotate(probe, rotation)
        if not np.allclose(found, first, rtol=0, atol=NEAR * rotation.k**0.5):
            raise ValueError(f"{where}, {said}, found another one in layer {i}: methods that look "
                             f"at no layer have one (quarot, hadamard); or {advice}")
    return matrix
