# SPDX-License-Identifier: Apache-2.0
"""A model folder as a Checkpoint: facts are checked first, tensors are views of mapped files."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import mmap
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
from tokenizers import Tokenizer

from .. import _C
from .._C import FormatError
from ..config import SITES, QuantConfig
from ..export.names import (
    BLOCK_PARTS,
    CHAIN_PARTS,
    FACTOR_PARTS,
    FORMAT_VERSION,
    PACKED_PARTS,
    QUANT_METHOD,
    clip_name,
    high_name,
    rotation_name,
)
from ..files import read_json, unique_keys
from ..models.family import (
    Architecture,
    ModelShape,
    find_architecture,
    iterate_tensors,
    parse_shape,
)
from ..rotations import FACTOR_DENSE_MAX
from ..rows import require_finite
from ..weights import LayerWeights, Linear, PackedLinear, high_problem, packed_words

__all__ = ["Checkpoint", "load_checkpoint"]

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PICKLES = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt")
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library

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
}
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
    if not path.is_file():
        raise FormatError(f"{path}: no such file")
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise FormatError(
                f"{path}: truncated or not safetensors: its header should take {length} bytes, "
                f"the file has {size}"
            )
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
    if (folder / SINGLE_FILE).is_file():
        return read_header(folder / SINGLE_FILE)
    if not (folder / INDEX_FILE).is_file():
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
    weight_map = read_json(index).get("weight_map")
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


# ---- the checkpoint -----------------------------------------------------------------------------


@dataclass(frozen=True, eq=False, repr=False)
class Checkpoint:
    """An opened model folder, quantized or not. Weights stay in the files until they are read."""

    path: Path
    config: Mapping[str, Any]  # config.json
    architecture: Architecture
    shape: ModelShape
    quant_config: QuantConfig | None  # None: not quantized
    tensors: Mapping[str, TensorInfo]

    @property
    def quantized(self) -> bool:
        """Whether this is a packed folder (docs/format.md)."""
        return self.quant_config is not None

    @cached_property
    def _maps(self) -> dict[Path, mmap.mmap]:
        """One read-only map per file."""
        maps = {}
        for path in sorted({info.path for info in self.tensors.values()}):
            with path.open("rb") as file:
                maps[path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return maps

    @property
    def bytes_on_disk(self) -> int:
        """Bytes of the weight files."""
        return sum(path.stat().st_size for path in {i.path for i in self.tensors.values()})

    @property
    def dtype(self) -> str:
        """Element type of the embedding: float32, float16 or bfloat16."""
        return DTYPES[self.tensors[f"{self.architecture.embed}.weight"].dtype].name

    def tensor(self, name: str) -> NDArray[Any]:
        """Read-only view of a tensor; no byte is read before it is used. KeyError if unknown."""
        info = self.tensors[name]
        dtype = DTYPES[info.dtype]
        if not info.nbytes:
            return np.empty(info.shape, dtype)
        flat = np.frombuffer(self._maps[info.path], dtype, prod(info.shape), info.begin)
        return flat.reshape(info.shape)

    @property
    def embedding(self) -> NDArray[Any]:
        """[vocab, hidden]."""
        return self.tensor(f"{self.architecture.embed}.weight")

    @property
    def head(self) -> NDArray[Any]:
        """[vocab, hidden]; the embedding if the two are tied."""
        if self.shape.tie_word_embeddings:
            return self.embedding
        return self.tensor(f"{self.architecture.head}.weight")

    @property
    def final_norm(self) -> NDArray[Any]:
        """[hidden]."""
        return self.tensor(f"{self.architecture.final_norm}.weight")

    def linear_name(self, layer: int, role: str) -> str:
        """Name of a linear without .weight, as `ignore` patterns see it."""
        return self.architecture.linears[role].format(i=layer)

    def layer(self, i: int) -> LayerWeights:
        """Layer i by role. IndexError beyond the last; FormatError for packed data that lie."""
        if not 0 <= i < self.shape.layers:
            raise IndexError(f"layer: expected 0 to {self.shape.layers - 1}, found {i}")
        attention, mlp = (
            self.tensor(f"{norm.format(i=i)}.weight") for norm in self.architecture.norms
        )
        rotations, clips, high = {}, {}, {}
        if self.quant_config is not None:
            for site in SITES:
                if _has_rotation(self.tensors, i, site):
                    rotations[site] = self._rotation(i, site)
                clips[site] = self._clip(i, site, self.quant_config)
                high[site] = self._high(i, site, self.quant_config)
        linears = {role: self._linear(i, role) for role in self.architecture.linears}
        return LayerWeights(i, (attention, mlp), linears, rotations, clips, high)

    def require_unquantized(self) -> None:
        """ValueError for a packed checkpoint: what the sweep reads must not be packed."""
        if self.quantized:
            raise ValueError(
                f"checkpoint: expected an unquantized model, found a packed one ({self.path})"
            )

    def require_finite(self, i: int) -> None:
        """ValueError with the name of the tensor of layer i, unquantized, that has NaN or Inf."""
        names = [norm.format(i=i) for norm in self.architecture.norms]
        names += [self.linear_name(i, role) for role in self.architecture.linears]
        for name in names:
            for part in ("weight", "bias"):
                if f"{name}.{part}" in self.tensors:
                    require_finite(self.tensor(f"{name}.{part}"), f"{name}.{part}")

    def _linear(self, layer: int, role: str) -> Linear:
        name = self.linear_name(layer, role)
        bias = self.tensor(f"{name}.bias") if self.shape.bias(role) else None
        if f"{name}.weight" in self.tensors:
            return Linear(name, self.tensor(f"{name}.weight"), bias)
        return Linear(name, self._packed(name, self.shape.linear(role)), bias)

    def _packed(self, name: str, shape: tuple[int, int]) -> PackedLinear:
        """A packed linear whose header was checked; checks the stored shape, scales and tail."""
        words, scales, stored = (self.tensor(f"{name}.{part}") for part in PACKED_PARTS)
        if tuple(stored.tolist()) != shape:
            raise self._error(f"{name}.weight_shape", list(shape), stored.tolist())
        if not np.isfinite(scales).all() or scales.min() < 0:
            raise self._error(f"{name}.weight_scale", "finite scales of at least 0", "others")
        k, groups = shape[1], scales.shape[1]
        used = 4 * (k % 8)
        if used and np.any(words[:, -1].view(np.uint32) >> used != 0x88888888 >> used):
            raise self._error(f"{name}.weight_packed", "code 0 in the tail of each row", "others")
        return PackedLinear(words, scales, shape, k // groups if groups > 1 else 0)

    def _rotation(self, layer: int, site: str) -> _C.Rotation:
        """A site's rotation, whose tensors' shapes were checked; the core proves their contents."""
        blocks = rotation_name(layer, site, "first") in self.tensors
        names = [rotation_name(layer, site, p) for p in (BLOCK_PARTS if blocks else FACTOR_PARTS)]
        parts = [self.tensor(name) if blocks else self._factor(name) for name in names]
        try:
            if blocks:
                return _C.Rotation.blocks(*parts)
            if isinstance(parts[1], np.ndarray):  # stored as what rows are multiplied by
                parts[1] = np.ascontiguousarray(parts[1].T)
            return _C.Rotation(self.shape.site(site), *parts)
        except ValueError as error:  # `part: expected ..., got ...`
            part, _, problem = str(error).partition(": ")
            name = rotation_name(layer, site, part)
            info = self.tensors.get(name) or self.tensors[f"{name}_chain"]
            problem = problem.replace(", got ", ", found ")
            raise FormatError(f"{info.path}: {name}: {problem}") from None

    def _factor(self, name: str) -> Any:
        """Dense float32 [order, order] as stored, or (order, hadamard, pairs, angles)."""
        if name in self.tensors:
            return self.tensor(name)
        chain, pairs, angles = (self.tensor(f"{name}_{part}") for part in CHAIN_PARTS)
        order, hadamard = chain.tolist()
        return order, bool(hadamard), pairs, angles

    def _clip(self, layer: int, site: str, config: QuantConfig) -> float:
        name = clip_name(layer, site)
        if name not in self.tensors:
            return config.activation_clip
        clip = float(self.tensor(name)[0])
        if not 0.0 < clip <= 1.0:
            raise self._error(name, "a number in (0, 1]", clip)
        return clip

    def _high(self, layer: int, site: str, config: QuantConfig) -> int:
        name = high_name(layer, site)
        if name not in self.tensors:
            return 0
        high = int(self.tensor(name)[0])
        problem = high_problem(high, self.shape.site(site), config)
        if problem:
            raise FormatError(f"{self.tensors[name].path}: {name}: {problem}, found {high}")
        return high

    def _error(self, name: str, expected: Any, found: Any) -> FormatError:
        """FormatError about the content of a tensor; of a family's tensor the first part's file."""
        info = self.tensors.get(name) or self.tensors[f"{name}_chain"]
        return FormatError(f"{info.path}: {name}: expected {expected}, found {found}")

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """tokenizer.json, read at first use, without the truncation and padding of its training.

        FormatError when it is missing or broken.
        """
        path = self.path / "tokenizer.json"
        if not path.is_file():
            raise FormatError(
                f"{path}: no such file; slow tokenizers (tokenizer.model) are not read. Save a "
                f"fast one by transformers: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
            )
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises Exception itself
            raise FormatError(f"{path}: {error}") from None
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer

    def encode(self, text: str, special: bool = True) -> NDArray[np.int64]:
        """Token ids [count] of a text, with the tokenizer's own special tokens unless told.

        ValueError for a lone surrogate and for a token that is outside the vocabulary.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise ValueError("text: expected valid Unicode, found a lone surrogate") from None
        ids = np.asarray(self.tokenizer.encode(text, add_special_tokens=special).ids, np.int64)
        outside = ids[ids >= self.shape.vocab]
        if outside.size:
            token = self.tokenizer.id_to_token(int(outside[0]))
            raise ValueError(
                f"{self.path / 'tokenizer.json'}: token {token!r} has id {outside[0]}, but "
                f"config.json's vocab_size is {self.shape.vocab}"
            )
        return ids

    @cached_property
    def generation_config(self) -> dict[str, Any]:
        """generation_config.json, {} when absent."""
        return self._optional_json("generation_config.json")

    @cached_property
    def tokenizer_config(self) -> dict[str, Any]:
        """tokenizer_config.json, {} when absent."""
        return self._optional_json("tokenizer_config.json")

    def _optional_json(self, name: str) -> dict[str, Any]:
        return read_json(self.path / name) if (self.path / name).is_file() else {}

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of config, tokenizer, every tensor's name, type, shape and three pages of it.

        Enough to notice another model or a fine-tuned one without reading the weights.
        """
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        tokenizer = self.path / "tokenizer.json"
        digest.update(tokenizer.read_bytes() if tokenizer.is_file() else b"")
        for name, info in sorted(self.tensors.items()):
            digest.update(f"{name} {info.dtype} {info.shape}".encode())
            data, page = memoryview(self._maps[info.path]), 4096
            for begin in (0, info.nbytes // 2, max(0, info.nbytes - page)):
                begin += info.begin
                digest.update(data[begin : min(begin + page, info.begin + info.nbytes)])
        return digest.hexdigest()

    def __repr__(self) -> str:
        s, files = self.shape, len({info.path for info in self.tensors.values()})
        quant = f", {self.quant_config.scheme}" if self.quant_config else ""
        return (
            f"Checkpoint({self.path.name!r}, {self.architecture.name}, {s.layers} layers, hidden "
            f"{s.hidden}, {s.parameters / 1e6:.1f}M parameters, {self.dtype}{quant}, "
            f"{files} file{'s' if files > 1 else ''})"
        )


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Opens a folder as save_pretrained or singlequant writes it: config.json, *.safetensors.

    All names, types, shapes and offsets are checked here, before any weight is read. FormatError
    names the file, what was expected and what was found. Values are checked when they are used.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise FormatError(f"{folder}: no such folder")
    source = folder / "config.json"
    config = read_json(source)
    architecture = find_architecture(config, str(source))
    shape = parse_shape(config, architecture, str(source))
    quant_config = parse_quantization(config.get("quantization_config"), str(source))
    tensors = find_tensors(folder)
    _check_tensors(folder, tensors, shape, architecture, quant_config)
    return Checkpoint(folder, config, architecture, shape, quant_config, tensors)


# ---- what the tensors must be -------------------------------------------------------------------


def _check_tensors(
    folder: Path,
    tensors: Mapping[str, TensorInfo],
    shape: ModelShape,
    architecture: Architecture,
    config: QuantConfig | None,
) -> None:
    """Compares headers with config.json, both ways."""
    known: set[str] = set()
    linears = {
        template.format(i=i)
        for i in range(_whole_layers(tensors, shape))
        for template in architecture.linears.values()
    }
    for name, expected in iterate_tensors(shape, architecture):
        linear = name.removesuffix(".weight")
        if config and linear in linears and f"{linear}.weight_packed" in tensors:
            n, k = expected
            known |= _check_packed(folder, tensors, linear, (n, k), config.group_size)
        else:
            _check_tensor(folder, tensors, name, WEIGHT_DTYPES, expected)
            known.add(name)
    if config:
        for i in range(shape.layers):
            for site in SITES:
                known |= _check_site(folder, tensors, i, site, shape.site(site))
    ignored = architecture.ignored_tensors
    if shape.tie_word_embeddings:
        ignored += (f"{architecture.head}.weight",)  # some write the tied head as well
    for name in sorted(set(tensors) - known):
        if not any(fnmatch.fnmatchcase(name, pattern) for pattern in ignored):
            raise FormatError(
                f"{tensors[name].path}: {name}: unexpected tensor: not part of a "
                f"{architecture.name} with {shape.layers} layers as config.json describes it"
            )


def _whole_layers(tensors: Mapping[str, TensorInfo], shape: ModelShape) -> int:
    """Layers worth naming: config.json may claim billions, files hold at most one per tensor."""
    return min(shape.layers, len(tensors))


def _check_tensor(
    folder: Path,
    tensors: Mapping[str, TensorInfo],
    name: str,
    dtypes: tuple[str, ...],
    shape: tuple[int, ...],
) -> TensorInfo:
    info = tensors.get(name)
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


def _check_packed(
    folder: Path,
    tensors: Mapping[str, TensorInfo],
    linear: str,
    shape: tuple[int, int],
    group_size: int,
) -> set[str]:
    """The three tensors of a packed linear; returns their names."""
    (n, k), group = shape, group_size or shape[1]
    if f"{linear}.weight" in tensors:
        raise FormatError(f"{folder}: {linear}: expected weight or weight_packed, found both")
    if k % group:
        raise FormatError(
            f"{folder}: {linear}: group_size: expected a divisor of {k}, found {group}"
        )
    shapes = ((n, packed_words(k)), (n, k // group), (2,))
    for (part, dtype), expected in zip(PACKED_PARTS.items(), shapes, strict=True):
        _check_tensor(folder, tensors, f"{linear}.{part}", (dtype,), expected)
    return {f"{linear}.{part}" for part in PACKED_PARTS}


def _has_rotation(tensors: Mapping[str, TensorInfo], layer: int, site: str) -> bool:
    left = rotation_name(layer, site, "left")
    return any(n in tensors for n in (left, f"{left}_chain", rotation_name(layer, site, "first")))


def _check_site(
    folder: Path, tensors: Mapping[str, TensorInfo], layer: int, site: str, k: int
) -> set[str]:
    """Rotation and clip of a site, if any; returns the names of their tensors."""
    known: set[str] = set()
    if clip_name(layer, site) in tensors:
        known.add(clip_name(layer, site))
        _check_tensor(folder, tensors, clip_name(layer, site), ("F32",), (1,))
    if high_name(layer, site) in tensors:
        known.add(high_name(layer, site))
        _check_tensor(folder, tensors, high_name(layer, site), ("I64",), (1,))
    if not _has_rotation(tensors, layer, site):
        return known
    if rotation_name(layer, site, "first") in tensors:
        return known | _check_blocks(folder, tensors, layer, site, k)
    orders = []
    for side in ("left", "right"):
        order, names = _check_factor(folder, tensors, rotation_name(layer, site, side))
        orders.append(order)
        known |= names
    if orders[0] * orders[1] != k:
        name = rotation_name(layer, site, "left")
        raise FormatError(
            f"{folder}: {name}: expected orders whose product is {k}, "
            f"found {orders[0]} x {orders[1]}"
        )
    return known


def _check_blocks(
    folder: Path, tensors: Mapping[str, TensorInfo], layer: int, site: str, k: int
) -> set[str]:
    """The tensors of a block rotation: square blocks whose order divides k; returns their names."""
    names = [rotation_name(layer, site, part) for part in BLOCK_PARTS]
    found = tensors[names[0]].shape
    b = found[-1] if found and found[-1] and k % found[-1] == 0 else 1
    blocks = (k // b, b, b)
    for name, dtype, shape in zip(names, BLOCK_PARTS.values(), (blocks, (k,), blocks), strict=True):
        _check_tensor(folder, tensors, name, (dtype,), shape)
    return set(names)


def _check_factor(
    folder: Path, tensors: Mapping[str, TensorInfo], name: str
) -> tuple[int, set[str]]:
    """(order, names) of one stored factor: a matrix, or a chain whose order is read here."""
    if f"{name}_chain" not in tensors:
        info = tensors.get(name)
        order = info.shape[0] if info and info.shape else 1
        info = _check_tensor(folder, tensors, name, ("F32",), (order, order))
        if order > FACTOR_DENSE_MAX:
            raise FormatError(
                f"{info.path}: {name}: expected an order of at most {FACTOR_DENSE_MAX}, "
                f"found {order}"
            )
        return order, {name}
    steps = tensors[f"{name}_angles"].shape[0] if f"{name}_angles" in tensors else 0
    shapes = ((2,), (steps, 2), (steps,))
    for (part, dtype), expected in zip(CHAIN_PARTS.items(), shapes, strict=True):
        _check_tensor(folder, tensors, f"{name}_{part}", (dtype,), expected)
    order, hadamard = _read_pair(tensors[f"{name}_chain"])
    if order <= FACTOR_DENSE_MAX or hadamard not in (0, 1):
        raise FormatError(
            f"{tensors[f'{name}_chain'].path}: {name}_chain: expected (order above "
            f"{FACTOR_DENSE_MAX}, 0 or 1), found ({order}, {hadamard})"
        )
    return order, {f"{name}_{part}" for part in CHAIN_PARTS}


def _read_pair(info: TensorInfo) -> tuple[int, int]:
    """The two int64 of a checked tensor, read without mapping its file."""
    with info.path.open("rb") as file:
        file.seek(info.begin)
        return struct.unpack("<2q", file.read(16))


def parse_quantization(values: Any, source: str) -> QuantConfig | None:
    """quantization_config of config.json, None when absent; FormatError if it is not ours."""
    if values is None:
        return None
    if not isinstance(values, dict) or values.get("quant_method") != QUANT_METHOD:
        found = values.get("quant_method") if isinstance(values, dict) else values
        raise FormatError(
            f"{source}: quantization_config.quant_method: expected an unquantized model or "
            f"{QUANT_METHOD!r}, found {found!r:.80}"
        )
    weights, activations = values.get("weights"), values.get("activations")
    weights = weights if isinstance(weights, dict) else {}
    activations = activations if isinstance(activations, dict) else {}
    version, ignore = values.get("format_version"), values.get("ignore")
    if type(version) is not int or version != FORMAT_VERSION:
        raise FormatError(
            f"{source}: quantization_config.format_version: expected {FORMAT_VERSION}, "
            f"found {version!r:.80}"
        )
    try:
        config = QuantConfig(
            scheme=values.get("scheme", ""),
            method=values.get("method", ""),
            weights=weights.get("rounding", ""),
            group_size=weights.get("group_size", -1),
            clip=activations.get("clip", 0),
            ignore=tuple(ignore) if isinstance(ignore, list) else ignore,
            kv_bits=values.get("kv_bits"),
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
