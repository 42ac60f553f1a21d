# SPDX-License-Identifier: Apache-2.0
"""The packed format of docs/format.md: its names, what is written and what is read."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from ml_dtypes import bfloat16
from numpy.typing import NDArray

from .. import _C
from .._C import FormatError
from ..config import KV_DTYPES, QuantConfig
from ..models.config_json import Fields
from ..models.spec import LinearSpec, ModelSpec, Site
from ..models.spec_json import model_json, model_spec
from ..rotations import FACTOR_DENSE_MAX, BlockRotation, Factor, SiteRotation
from ..tensors import DTYPE_NAMES, TensorFiles, TensorInfo, check_tensor
from ..weights import (
    TABLE_DTYPES,
    WEIGHT_BITS,
    PackedLinear,
    PackedTable,
    QuantizedLayer,
    int8_problem,
    packed_words,
    table_shapes,
)

QUANT_METHOD = "singlequant"  # quantization_config.quant_method
# What config.json says to transformers: without our quantizer it would only warn of a quant_method
# that it does not know, and start from random weights. As this names no file it stops instead.
GUARD_KEY = "transformers_weights"
GUARD = "none; `import singlequant.integrations.transformers` first, then load the folder again"
FORMAT_VERSION = 2  # quantization_config.format_version of what is written
READABLE_VERSIONS = (1, 2)

PACKED_PARTS = {"weight_packed": "I32", "weight_scale": "F32", "weight_shape": "I64"}
TABLE_PARTS = ("weight_codes", "weight_scale")
GROUP_SCALES = ("BF16", "F32")  # types of weight_scale where groups share a scale
CHAIN_PARTS = {"chain": "I64", "pairs": "I32", "angles": "F64"}
FACTOR_PARTS = ("left", "right")
ALIGN = "align"  # blocks in front of the factors; the right one may be absent then
BLOCK_PARTS = {"first": "F32", "permutation": "I32", "second": "F32"}


def source_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of a packed folder without what its writer added to the source's."""
    added = (GUARD_KEY, "quantization_config")
    return {key: value for key, value in config.items() if key not in added}


def rotation_name(layer: int, site: str, part: str) -> str:
    """Tensor of a site's rotation; part: left, right, or those with _chain, _pairs, _angles; or
    first, permutation, second."""
    return f"model.layers.{layer}.rotations.{site}.{part}"


def clip_name(layer: int, site: str) -> str:
    """Tensor of a site's own activation clip."""
    return f"model.layers.{layer}.activations.{site}.clip"


def int8_name(layer: int, site: str) -> str:
    """Tensor of the number of a site's leading inputs that keep 8 bits."""
    return f"model.layers.{layer}.activations.{site}.high"


def bits_name(linear: str) -> str:
    """Tensor of the bits of a linear's weights; absent where they are 4."""
    return f"{linear}.weight_bits"


# ---- what is written ----------------------------------------------------------------------------


def quantization_json(config: QuantConfig, spec: ModelSpec) -> dict[str, Any]:
    """config.json's quantization_config."""
    tables = config.table_bits(spec)
    bits = {"embedding_bits": tables.get(spec.embed),
            "head_bits": tables.get(spec.embed if spec.tied else spec.head)}
    return {
        "quant_method": QUANT_METHOD,
        "format_version": FORMAT_VERSION,
        "scheme": config.scheme,
        "method": config.method,
        "weights": {
            "bits": 4,
            "symmetric": True,
            "group_size": config.group_size,
            "rounding": config.weights,
        },
        "activations": {
            "bits": config.activation_bits,
            "symmetric": True,
            "per": "token",
            "clip": config.activation_clip,
        },
        "ignore": list(config.ignore),
        "kv_bits": config.kv_bits,
        **({"kv_dtype": config.kv_dtype} if config.kv_dtype != KV_DTYPES[0] else {}),
        **{key: count for key, count in bits.items() if count is not None},
        "model": model_json(spec),
    }


def factor_tensors(name: str, factor: Factor, transpose: bool) -> dict[str, NDArray[Any]]:
    """A factor as stored: its matrix (or the transpose) up to FACTOR_DENSE_MAX, else its chain."""
    if factor.order > FACTOR_DENSE_MAX:
        return {
            f"{name}_chain": np.array([factor.order, factor.hadamard], np.int64),
            f"{name}_pairs": factor.pairs,
            f"{name}_angles": factor.angles,
        }
    matrix = factor.matrix().astype(np.float32)
    return {name: np.ascontiguousarray(matrix.T if transpose else matrix)}


def outer_tensors(
    tensors: Mapping[str, NDArray[Any]], bits: Mapping[str, int]
) -> dict[str, NDArray[Any]]:
    """The tensors outside the layers as they are stored. bits: `QuantConfig.table_bits`."""
    stored = dict(tensors)
    for name, count in bits.items():
        table = PackedTable.of(stored.pop(f"{name}.weight"), count, name)
        parts = (f"{name}.{part}" for part in TABLE_PARTS)
        stored |= zip(parts, (table.codes, table.scales), strict=True)
    return stored


def rotation_tensors(layer: int, site: str, rotation: SiteRotation) -> dict[str, NDArray[Any]]:
    """A site's factors, and the blocks of its alignment if inference multiplies by them."""
    left, right, align = rotation.merged
    tensors = factor_tensors(rotation_name(layer, site, "left"), left, transpose=False)
    if right is not None:
        tensors |= factor_tensors(rotation_name(layer, site, "right"), right, transpose=True)
    if rotation.online:
        tensors[rotation_name(layer, site, ALIGN)] = align.stored()
    return tensors


def stored_scales(linear: PackedLinear) -> NDArray[Any]:
    """The scales as stored: those of groups in bfloat16 where that changes none, else float32."""
    if linear.group and not (linear.scales.view(np.uint32) & 0xFFFF).any():
        return linear.scales.astype(bfloat16)
    return linear.scales


def layer_tensors(layer: QuantizedLayer, config: QuantConfig) -> dict[str, NDArray[Any]]:
    """All tensors of a layer's shard by name."""
    tensors = dict(layer.dense)
    for name, linear in layer.packed.items():
        tensors[f"{name}.weight_packed"] = linear.words
        tensors[f"{name}.weight_scale"] = stored_scales(linear)
        tensors[f"{name}.weight_shape"] = np.array(linear.shape, np.int64)
        if linear.bits != 4:
            tensors[bits_name(name)] = np.array([linear.bits], np.int64)
    for site, rotation in layer.rotations.items():
        if rotation.is_identity:
            continue
        if isinstance(rotation, BlockRotation):
            names = [rotation_name(layer.index, site, part) for part in BLOCK_PARTS]
            tensors |= zip(
                names, (rotation.first, rotation.permutation, rotation.second), strict=True
            )
        else:
            tensors |= rotation_tensors(layer.index, site, rotation)
    for site, clip in layer.clips.items():
        if np.float32(clip) != np.float32(config.activation_clip):
            tensors[clip_name(layer.index, site)] = np.array([clip], np.float32)
    for site, count in layer.int8_inputs.items():
        if count:
            tensors[int8_name(layer.index, site)] = np.array([count], np.int64)
    return tensors


# ---- what is read: config.json ------------------------------------------------------------------


@dataclass(frozen=True)
class PackedHeader:
    """What quantization_config says: the recipe, and in version 2 the model."""

    config: QuantConfig
    spec: ModelSpec | None


def parse_quantization(values: Any, source: str) -> PackedHeader | None:
    """quantization_config of config.json, None when absent; FormatError if it is not ours."""
    if values is None:
        return None
    if not isinstance(values, dict) or values.get("quant_method") != QUANT_METHOD:
        found = values.get("quant_method") if isinstance(values, dict) else values
        raise FormatError(
            f"{source}: quantization_config.quant_method: expected an unquantized model or "
            f"{QUANT_METHOD!r}, found {found!r:.80}"
        )
    version = values.get("format_version")
    if type(version) is not int or version not in READABLE_VERSIONS:
        raise FormatError(
            f"{source}: quantization_config.format_version: expected "
            f"{' or '.join(map(str, READABLE_VERSIONS))}, found {version!r:.80}"
        )
    config = _parse_config(values, source)
    if version == 1:  # there were no codes of embedding and head
        return PackedHeader(replace(config, head_bits=16, embedding_bits=16), None)
    model = Fields(values, source, "quantization_config.").object("model")
    spec = model_spec(model)
    try:
        config.settled(spec.tied)
    except ValueError as error:
        raise FormatError(f"{source}: quantization_config: {error}") from None
    return PackedHeader(config, spec)


def _parse_config(values: Mapping[str, Any], source: str) -> QuantConfig:
    """The recipe's fields that quantization_config holds."""
    weights, activations = values.get("weights"), values.get("activations")
    weights = weights if isinstance(weights, dict) else {}
    activations = activations if isinstance(activations, dict) else {}
    ignore = values.get("ignore")
    tables = {key: values.get(key, 16) for key in ("head_bits", "embedding_bits")}
    try:
        if None in tables.values():  # in a recipe it means the default
            raise ValueError(f"head_bits, embedding_bits: expected numbers, found {tables}")
        config = QuantConfig(
            scheme=values.get("scheme", ""),
            method=values.get("method", ""),
            weights=weights.get("rounding", ""),
            group_size=weights.get("group_size", -1),
            clip=activations.get("clip", 0),
            ignore=tuple(ignore) if isinstance(ignore, list) else ignore,
            kv_bits=values.get("kv_bits"),
            kv_dtype=values.get("kv_dtype", KV_DTYPES[0]),
            **tables,
        )
    except (ValueError, TypeError) as error:
        raise FormatError(f"{source}: quantization_config: {error}") from None
    for key, expected, found in (
        ("weights.bits", 4, weights.get("bits")),
        ("weights.symmetric", True, weights.get("symmetric")),
        ("activations.bits", config.activation_bits, activations.get("bits")),
        ("activations.symmetric", True, activations.get("symmetric")),
        ("activations.per", "token", activations.get("per")),
    ):
        if type(found) is not type(expected) or found != expected:
            raise FormatError(
                f"{source}: quantization_config.{key}: expected {expected!r}, found {found!r:.80}"
            )
    return config


# ---- what is read: tensors ----------------------------------------------------------------------


class PackedReader:
    """The tensors of a packed folder that an unquantized one does not have."""

    def __init__(
        self, folder: Path, files: TensorFiles, spec: ModelSpec, config: QuantConfig
    ) -> None:
        self._folder, self._files, self._infos = folder, files, files.infos
        self._spec, self._config = spec, config
        self._table_bits = config.table_bits(spec)

    # headers, before any value is read

    def has(self, linear: str) -> bool:
        """Whether the linear of that name is packed."""
        return f"{linear}.weight_packed" in self._infos

    def check_linear(self, linear: str, n: int, k: int) -> set[str]:
        """The tensors of a packed linear; returns their names."""
        group = self._config.group_size or k
        if f"{linear}.weight" in self._infos:
            raise FormatError(
                f"{self._folder}: {linear}: expected weight or weight_packed, found both"
            )
        if k % group:
            raise FormatError(
                f"{self._folder}: {linear}: group_size: expected a divisor of {k}, found {group}"
            )
        shapes = ((n, packed_words(k, self._bits(linear))), (n, k // group), (2,))
        for (part, dtype), expected in zip(PACKED_PARTS.items(), shapes, strict=True):
            grouped = part == "weight_scale" and self._config.group_size
            self._check(f"{linear}.{part}", *GROUP_SCALES if grouped else (dtype,), shape=expected)
        bits = {bits_name(linear)} & set(self._infos)
        return {f"{linear}.{part}" for part in PACKED_PARTS} | bits

    def _bits(self, linear: str) -> int:
        """Bits of a packed linear's weights; they say how large its words are."""
        name = bits_name(linear)
        if name not in self._infos:
            return 4
        info = self._check(name, "I64", shape=(1,))
        (bits,) = _read_integers(info, 1)
        if bits not in WEIGHT_BITS or bits == 4:
            expected = " or ".join(map(str, WEIGHT_BITS[1:]))
            raise FormatError(f"{info.path}: {name}: expected {expected}, found {bits}")
        return bits

    def has_table(self, name: str) -> bool:
        """Whether the embedding or head of that name is stored in codes, as the header says."""
        return name in self._table_bits

    def check_tables(self) -> set[str]:
        """The tensors of embedding and head in codes; returns their names."""
        known: set[str] = set()
        for name, bits in self._table_bits.items():
            if f"{name}.weight" in self._infos:
                raise FormatError(f"{self._folder}: {name}: expected weight_codes alone, as it has "
                                  f"{bits} bits, found weight too")
            dtypes = (DTYPE_NAMES[TABLE_DTYPES[bits]], "BF16")
            shapes = table_shapes(self._spec.vocab, self._spec.width, bits)
            for part, dtype, shape in zip(TABLE_PARTS, dtypes, shapes, strict=True):
                self._check(f"{name}.{part}", dtype, shape=shape)
                known.add(f"{name}.{part}")
        return known

    def check_layer(self, layer: int) -> set[str]:
        """Rotations, clips and 8-bit inputs of a layer's sites; returns their tensors' names."""
        known: set[str] = set()
        for site in self._spec.layer(layer).sites.values():
            for name, dtype in ((clip_name(layer, site.name), "F32"),
                                (int8_name(layer, site.name), "I64")):
                if name in self._infos:
                    self._check(name, dtype, shape=(1,))
                    known.add(name)
            if self.has_rotation(layer, site.name):
                known |= self._check_rotation(layer, site.name, site.k)
        return known

    def _check(self, name: str, *dtypes: str, shape: tuple[int, ...]) -> TensorInfo:
        return check_tensor(self._folder, self._infos, name, dtypes, shape)

    def has_rotation(self, layer: int, site: str) -> bool:
        """Whether a site has one."""
        parts = ("left", "left_chain", "first")
        return any(rotation_name(layer, site, part) in self._infos for part in parts)

    def _check_rotation(self, layer: int, site: str, k: int) -> set[str]:
        if rotation_name(layer, site, "first") in self._infos:
            return self._check_blocks(layer, site, k)
        left, names = self._check_factor(rotation_name(layer, site, "left"))
        if rotation_name(layer, site, ALIGN) in self._infos:
            names |= self._check_align(layer, site, k)
            if not self._has_factor(layer, site, "right") and k % left == 0:
                return names
        right, others = self._check_factor(rotation_name(layer, site, "right"))
        if left * right != k:
            raise FormatError(
                f"{self._folder}: {rotation_name(layer, site, 'left')}: expected orders whose "
                f"product is {k}, found {left} x {right}"
            )
        return names | others

    def _has_factor(self, layer: int, site: str, side: str) -> bool:
        name = rotation_name(layer, site, side)
        return name in self._infos or f"{name}_chain" in self._infos

    def _check_align(self, layer: int, site: str, k: int) -> set[str]:
        """The tensor of an alignment: square blocks whose order divides k."""
        name = rotation_name(layer, site, ALIGN)
        found = self._infos[name].shape
        b = found[-1] if found and found[-1] and k % found[-1] == 0 else 1
        check_tensor(self._folder, self._infos, name, ("F16", "F32"), (k // b, b, b))
        return {name}

    def _check_blocks(self, layer: int, site: str, k: int) -> set[str]:
        """The tensors of a block rotation: square blocks whose order divides k."""
        names = [rotation_name(layer, site, part) for part in BLOCK_PARTS]
        found = self._infos[names[0]].shape
        b = found[-1] if found and found[-1] and k % found[-1] == 0 else 1
        blocks = (k // b, b, b)
        for name, dtype, shape in zip(names, BLOCK_PARTS.values(), (blocks, (k,), blocks),
                                      strict=True):
            self._check(name, dtype, shape=shape)
        return set(names)

    def _check_factor(self, name: str) -> tuple[int, set[str]]:
        """(order, names) of one stored factor: a matrix, or a chain whose order is read here."""
        infos = self._infos
        if f"{name}_chain" not in infos:
            info = infos.get(name)
            order = info.shape[0] if info and info.shape else 1
            info = self._check(name, "F32", shape=(order, order))
            if order > FACTOR_DENSE_MAX:
                raise FormatError(
                    f"{info.path}: {name}: expected an order of at most {FACTOR_DENSE_MAX}, "
                    f"found {order}"
                )
            return order, {name}
        steps = infos[f"{name}_angles"].shape[0] if f"{name}_angles" in infos else 0
        shapes = ((2,), (steps, 2), (steps,))
        for (part, dtype), expected in zip(CHAIN_PARTS.items(), shapes, strict=True):
            self._check(f"{name}_{part}", dtype, shape=expected)
        order, hadamard = _read_integers(infos[f"{name}_chain"], 2)
        if order <= FACTOR_DENSE_MAX or hadamard not in (0, 1):
            raise FormatError(
                f"{infos[f'{name}_chain'].path}: {name}_chain: expected (order above "
                f"{FACTOR_DENSE_MAX}, 0 or 1), found ({order}, {hadamard})"
            )
        return order, {f"{name}_{part}" for part in CHAIN_PARTS}

    # values, when a layer is read

    def linear(self, layer: int, linear: LinearSpec) -> PackedLinear:
        """A packed linear whose header was checked; checks the stored shape, scales and tail."""
        name, shape = linear.at(layer), (linear.n, linear.k)
        words, scales, stored = (self._files.view(f"{name}.{part}") for part in PACKED_PARTS)
        scales = scales if scales.dtype == np.float32 else _C.to_float32(scales)
        if tuple(stored.tolist()) != shape:
            raise self._error(f"{name}.weight_shape", list(shape), stored.tolist())
        if not np.isfinite(scales).all() or scales.min() < 0:
            raise self._error(f"{name}.weight_scale", "finite scales of at least 0", "others")
        k, groups, bits = shape[1], scales.shape[1], self._bits(name)
        used, zeros = k * bits % 32, _C.pack(np.zeros((1, k), np.int8), bits).view(np.uint32)
        if used and np.any(words[:, -1].view(np.uint32) >> used != zeros[0, -1] >> used):
            raise self._error(f"{name}.weight_packed", "code 0 in the tail of each row", "others")
        return PackedLinear(words, scales, shape, k // groups if groups > 1 else 0, bits)

    def table(self, name: str) -> PackedTable:
        """An embedding or a head whose header was checked; checks the stored scales."""
        codes, scales = (self._files.view(f"{name}.{part}") for part in TABLE_PARTS)
        if not np.isfinite(scales).all():
            raise self._error(f"{name}.weight_scale", "finite scales", "others")
        return PackedTable(codes, scales, (self._spec.vocab, self._spec.width))

    def rotations(self, layer: int) -> dict[str, _C.Rotation]:
        """The rotations of a layer by site; a site without one is absent."""
        sites = self._spec.layer(layer).sites.values()
        return {site.name: self.rotation(layer, site) for site in sites
                if self.has_rotation(layer, site.name)}

    def clips(self, layer: int) -> dict[str, float]:
        """The clips of a layer's activations by site."""
        return {site: self.clip(layer, site) for site in self._spec.layer(layer).sites}

    def int8_inputs(self, layer: int) -> dict[str, int]:
        """By site: how many leading inputs keep 8 bits."""
        sites = self._spec.layer(layer).sites.values()
        return {site.name: self.int8(layer, site.name, site.k) for site in sites}

    def rotation(self, layer: int, site: Site) -> _C.Rotation:
        """A site's rotation, whose tensors' shapes were checked; the core proves their contents."""
        blocks = rotation_name(layer, site.name, "first") in self._infos
        sides = BLOCK_PARTS if blocks else FACTOR_PARTS
        names = [rotation_name(layer, site.name, part) for part in sides]
        parts = [self._files.view(name) if blocks else self._factor(name) for name in names]
        align = rotation_name(layer, site.name, ALIGN)
        try:
            if blocks:
                return _C.Rotation.blocks(*parts)
            if isinstance(parts[1], np.ndarray):  # stored as what rows are multiplied by
                parts[1] = np.ascontiguousarray(parts[1].T)
            if align in self._infos:
                parts.append(_C.to_float32(self._files.view(align)))
            return _C.Rotation(site.k, *parts)
        except ValueError as error:  # `part: expected ..., got ...`
            part, _, problem = str(error).partition(": ")
            name = rotation_name(layer, site.name, part)
            info = self._infos.get(name) or self._infos[f"{name}_chain"]
            problem = problem.replace(", got ", ", found ")
            raise FormatError(f"{info.path}: {name}: {problem}") from None

    def _factor(self, name: str) -> Any:
        """Dense float32 [order, order] as stored, or (order, hadamard, pairs, angles); or None."""
        if name in self._infos:
            return self._files.view(name)
        if f"{name}_chain" not in self._infos:  # merged into the blocks of an alignment
            return None
        chain, pairs, angles = (self._files.view(f"{name}_{part}") for part in CHAIN_PARTS)
        order, hadamard = chain.tolist()
        return order, bool(hadamard), pairs, angles

    def clip(self, layer: int, site: str) -> float:
        """A site's clip: its own, or the recipe's."""
        name = clip_name(layer, site)
        if name not in self._infos:
            return self._config.activation_clip
        clip = float(self._files.view(name)[0])
        if not 0.0 < clip <= 1.0:
            raise self._error(name, "a number in (0, 1]", clip)
        return clip

    def int8(self, layer: int, site: str, k: int) -> int:
        """How many of a site's k inputs keep 8 bits."""
        name = int8_name(layer, site)
        if name not in self._infos:
            return 0
        count = int(self._files.view(name)[0])
        problem = int8_problem(count, k, self._config)
        if problem:
            raise FormatError(f"{self._infos[name].path}: {name}: {problem}, found {count}")
        return count

    def _error(self, name: str, expected: Any, found: Any) -> FormatError:
        """FormatError about the content of a tensor."""
        return FormatError(f"{self._infos[name].path}: {name}: expected {expected}, found {found}")


def _read_integers(info: TensorInfo, count: int) -> tuple[int, ...]:
    """The int64 [count] of a checked tensor, read without mapping its file."""
    with info.path.open("rb") as file:
        file.seek(info.begin)
        return struct.unpack(f"<{count}q", file.read(8 * count))
