# SPDX-License-Identifier: Apache-2.0
"""A model folder as a Checkpoint: facts are checked first, tensors are views of mapped files."""

from __future__ import annotations

import fnmatch
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from .._C import FormatError
from ..config import QuantConfig
from ..export.packed import PackedReader, parse_quantization
from ..files import read_json
from ..models.families import FAMILIES, find_family
from ..models.spec import LinearSpec, ModelSpec, NormSpec, tensor_name
from ..rows import require_finite
from ..tensors import DTYPES, WEIGHT_DTYPES, TensorFiles, TensorInfo, check_tensor, find_tensors
from ..weights import LayerWeights, Linear, Norm

__all__ = ["Checkpoint", "load_checkpoint"]


@dataclass(frozen=True, eq=False, repr=False)
class Checkpoint:
    """An opened model folder, quantized or not. Weights stay in the files until they are read."""

    path: Path
    config: Mapping[str, Any]  # config.json
    spec: ModelSpec
    quant_config: QuantConfig | None  # None: not quantized
    files: TensorFiles

    @property
    def quantized(self) -> bool:
        """Whether this is a packed folder (docs/format.md)."""
        return self.quant_config is not None

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Type, shape and place of every tensor by name."""
        return self.files.infos

    @property
    def bytes_on_disk(self) -> int:
        """Bytes of the weight files."""
        return self.files.bytes_on_disk

    @property
    def dtype(self) -> str:
        """Element type of the embedding: float32, float16 or bfloat16."""
        return DTYPES[self.tensors[f"{self.spec.embed}.weight"].dtype].name

    def tensor(self, name: str) -> NDArray[Any]:
        """Read-only view of a tensor; no byte is read before it is used. KeyError if unknown."""
        return self.files.view(name)

    @property
    def embedding(self) -> NDArray[Any]:
        """[vocab, hidden]."""
        return self.tensor(f"{self.spec.embed}.weight")

    @property
    def head(self) -> NDArray[Any]:
        """[vocab, hidden]; the embedding if the two are tied."""
        return self.embedding if self.spec.tied else self.tensor(f"{self.spec.head}.weight")

    @property
    def final_norm(self) -> Norm:
        """The norm before the head."""
        return self._norm(self.spec.final_norm, 0)

    def linear_name(self, layer: int, role: str) -> str:
        """Name of a linear without .weight, as `ignore` patterns see it."""
        return tensor_name(self.spec.layer(layer).linears[role].name, layer)

    def layer(self, i: int) -> LayerWeights:
        """Layer i by role. IndexError beyond the last; FormatError for packed data that lie."""
        if not 0 <= i < self.spec.layers:
            raise IndexError(f"layer: expected 0 to {self.spec.layers - 1}, found {i}")
        spec, packed = self.spec.layer(i), self._packed
        norms = {place: self._norm(norm, i) for place, norm in spec.norms.items()}
        linears = {role: self._linear(linear, i) for role, linear in spec.linears.items()}
        if packed is None:
            return LayerWeights(i, norms, linears)
        return LayerWeights(i, norms, linears, packed.rotations(i), packed.clips(i),
                            packed.int8_inputs(i))

    @cached_property
    def _packed(self) -> PackedReader | None:
        """The reader of what a packed folder has beside norms and dense weights."""
        if self.quant_config is None:
            return None
        return PackedReader(self.path, self.files, self.spec, self.quant_config)

    def _norm(self, norm: NormSpec, layer: int) -> Norm:
        name = tensor_name(norm.name, layer)
        bias = self.tensor(f"{name}.bias") if norm.bias else None
        return Norm(name, self.tensor(f"{name}.weight"), bias)

    def _linear(self, linear: LinearSpec, layer: int) -> Linear:
        name = tensor_name(linear.name, layer)
        if self._packed is not None and self._packed.has(name):
            bias = self.tensor(f"{name}.bias") if linear.bias else None
            return Linear(name, self._packed.linear(layer, linear), bias)
        stored = name if linear.stored is None else tensor_name(linear.stored, layer)
        rows = slice(linear.first_row, linear.first_row + linear.n)
        bias = self.tensor(f"{stored}.bias")[rows] if linear.bias else None
        return Linear(name, self.tensor(f"{stored}.weight")[rows], bias)

    def require_unquantized(self) -> None:
        """ValueError for a packed checkpoint: what the sweep reads must not be packed."""
        if self.quantized:
            raise ValueError(
                f"checkpoint: expected an unquantized model, found a packed one ({self.path})"
            )

    def require_finite(self, i: int) -> None:
        """ValueError with the name of the tensor of layer i, unquantized, that has NaN or Inf."""
        for name, _ in self.spec.layer_tensors(i):
            require_finite(self.tensor(name), name)

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
            for page in self.files.pages(name):
                digest.update(page)
        return digest.hexdigest()

    # text

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
        outside = ids[ids >= self.spec.vocab]
        if outside.size:
            token = self.tokenizer.id_to_token(int(outside[0]))
            raise ValueError(
                f"{self.path / 'tokenizer.json'}: token {token!r} has id {outside[0]}, but "
                f"config.json's vocab_size is {self.spec.vocab}"
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

    def __repr__(self) -> str:
        s, files = self.spec, len({info.path for info in self.tensors.values()})
        quant = f", {self.quant_config.scheme}" if self.quant_config else ""
        return (
            f"Checkpoint({self.path.name!r}, {s.family}, {s.layers} layers, hidden "
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
    header = parse_quantization(config.get("quantization_config"), str(source))
    if header is not None and header.spec is not None:
        spec = header.spec
    else:
        spec = find_family(config, str(source)).spec(config, str(source))
    checkpoint = Checkpoint(folder, config, spec, None if header is None else header.config,
                            TensorFiles(find_tensors(folder)))
    _check_tensors(checkpoint)
    return checkpoint


def _check_tensors(checkpoint: Checkpoint) -> None:
    """Compares the tensors' headers with the spec, both ways."""
    folder, tensors, spec = checkpoint.path, checkpoint.tensors, checkpoint.spec
    packed, known = checkpoint._packed, set()
    if packed is not None:
        for i in range(min(spec.layers, len(tensors))):  # config.json may claim billions of layers
            for linear in spec.layer(i).linears.values():
                name = tensor_name(linear.name, i)
                if packed.has(name):
                    known |= packed.check_linear(name, linear.n, linear.k)
    for name, shape in spec.tensors():
        if f"{name.removesuffix('.weight')}.weight_packed" not in known:
            check_tensor(folder, tensors, name, WEIGHT_DTYPES, shape)
            known.add(name)
    if packed is not None:
        for i in range(spec.layers):
            known |= packed.check_layer(i)
    family = FAMILIES.get(spec.family)
    ignored = family.ignored_tensors if family else ()
    if spec.tied:
        ignored += (f"{spec.head}.weight",)  # some write the tied head as well
    for name in sorted(set(tensors) - known):
        if not any(fnmatch.fnmatchcase(name, pattern) for pattern in ignored):
            raise FormatError(
                f"{tensors[name].path}: {name}: unexpected tensor: not part of a "
                f"{spec.family} with {spec.layers} layers as config.json describes it"
            )
