# SPDX-License-Identifier: Apache-2.0
"""A model folder as a Checkpoint: facts are checked first, tensors are views of mapped files."""

from __future__ import annotations

import hashlib
import json
import socket
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from .._C import FormatError
from ..config import QuantConfig
from ..export.packed import PACKED_PARTS, TABLE_PARTS, PackedReader, parse_quantization
from ..files import folder_bytes, is_present, read_json
from ..html import facts_html, megabytes
from ..models.families import find_family, language_config
from ..models.spec import LinearSpec, ModelSpec, NormSpec, norm_channels, tensor_name
from ..rows import require_finite
from ..tensors import DTYPES, WEIGHT_DTYPES, TensorFiles, TensorInfo, check_tensor
from ..weights import Dense, LayerWeights, Linear, Norm, PackedTable
from .names import has_own_head, require_head, sort_extras, warn_of
from .special_tokens import add_tokens, has_tokenizer
from .stored import find_quantization, open_tensors
from .tokenizer_errors import tokenizer_errors

__all__ = ["Checkpoint", "load_checkpoint", "open_model"]


@dataclass(frozen=True, eq=False, repr=False)
class Checkpoint:
    """An opened model folder, quantized or not. Weights stay in the files until they are read."""

    path: Path
    config: Mapping[str, Any]  # config.json
    spec: ModelSpec
    quant_config: QuantConfig | None  # None: not quantized
    files: TensorFiles
    ignored_tensors: tuple[str, ...] = ()  # stored, but not of the model
    file: Path | None = None  # of GGUF; path is then the folder that it lies in

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
    def name(self) -> str:
        """Of the folder, or of the GGUF file."""
        return (self.file or self.path).resolve().name

    @property
    def bytes_with_tokenizer(self) -> int:
        """Bytes of the folder, or of the GGUF file."""
        return self.bytes_on_disk if self.file else folder_bytes(self.path)

    @property
    def dtype(self) -> str:
        """Element type of the embedding: float32, float16 or bfloat16; int8 or int4 in codes."""
        if self._has_table(self.spec.embed):
            return f"int{self.embedding.bits}"
        return DTYPES[self.tensors[f"{self.spec.embed}.weight"].dtype].name

    def tensor(self, name: str) -> NDArray[Any]:
        """Read-only view of a tensor; no byte is read before it is used. KeyError if unknown."""
        return self.files.view(name)

    @property
    def embedding(self) -> NDArray[Any] | PackedTable:
        """[vocab, hidden]."""
        return self._table(self.spec.embed)

    @property
    def head(self) -> NDArray[Any] | PackedTable:
        """[vocab, hidden]; the embedding if the two are tied."""
        return self.embedding if self.spec.tied else self._table(self.spec.head)

    def _has_table(self, name: str) -> bool:
        return self._packed is not None and self._packed.has_table(name)

    def _table(self, name: str) -> NDArray[Any] | PackedTable:
        """The embedding or the head of that name."""
        return self._packed.table(name) if self._has_table(name) else self.tensor(f"{name}.weight")

    @property
    def final_norm(self) -> Norm | None:
        """The norm before the head."""
        norm = self.spec.final_norm
        return None if norm is None else self._norm(norm, 0, self.spec.hidden)

    @property
    def outer(self) -> dict[str, NDArray[Any] | PackedTable]:
        """The tensors outside the layers by name."""
        tables = {f"{name}.weight": name for name in (self.spec.embed, self.spec.head)}
        return {name: self._table(tables[name]) if name in tables else self.tensor(name)
                for name, _ in self.spec.outer_tensors()}

    def linear_name(self, layer: int, role: str) -> str:
        """Name of a linear without .weight, as `ignore` patterns see it."""
        return self.spec.layer(layer).linears[role].at(layer)

    def layer(self, i: int) -> LayerWeights:
        """Layer i by role. IndexError beyond the last; FormatError for packed data that lie."""
        if not 0 <= i < self.spec.layers:
            raise IndexError(f"layer: expected 0 to {self.spec.layers - 1}, found {i}")
        spec, packed = self.spec.layer(i), self._packed
        norms = {
            place: self._norm(norm, i, norm_channels(place, norm, spec.hidden, spec.attention))
            for place, norm in spec.norms.items()
        }
        linears = {role: self._linear(linear, i) for role, linear in spec.linears.items()}
        dense = {key: Dense(tensor_name(row.name, i), self.tensor(tensor_name(row.name, i)))
                 for key, row in spec.dense.items()}
        if packed is None:
            return LayerWeights(i, norms, linears, dense=dense)
        return LayerWeights(i, norms, linears, packed.rotations(i), packed.clips(i),
                            packed.int8_inputs(i), dense)

    @cached_property
    def _packed(self) -> PackedReader | None:
        """The reader of what a packed folder has beside norms and dense weights."""
        if self.quant_config is None:
            return None
        return PackedReader(self.path, self.files, self.spec, self.quant_config)

    def _norm(self, norm: NormSpec, layer: int, channels: int) -> Norm:
        """A norm's weight and bias, of norm.shape; rows that are stored apart are put together."""
        names = [name for name, _ in norm.tensors(layer, channels)]
        weights = [self.tensor(name) for name in names if name.endswith(".weight")]
        biases = [self.tensor(name) for name in names if name.endswith(".bias")]
        name = tensor_name(norm.name, layer)
        if "{h}" in name:
            return Norm(name, np.stack(weights), np.stack(biases) if biases else None)
        ones = np.ones(norm.shape or channels, np.float32)
        return Norm(name, weights[0] if weights else ones, biases[0] if biases else None)

    def _linear(self, linear: LinearSpec, layer: int) -> Linear:
        name = linear.at(layer)
        if self._packed is not None and self._packed.has(name):
            bias = self.tensor(f"{name}.bias") if linear.bias else None
            return Linear(name, self._packed.linear(layer, linear), bias)
        weight = self.tensor(linear.weight_name(layer))
        bias = self.tensor(linear.bias_name(layer)) if linear.bias else None
        if linear.experts:
            weight, bias = weight[linear.expert], None if bias is None else bias[linear.expert]
        weight = _rows(linear, weight.T if linear.transposed else weight)
        return Linear(name, weight, None if bias is None else _rows(linear, bias))

    def release_packed(self, name: str) -> None:
        """Give back the memory of a packed linear's or table's pages, once nobody reads them."""
        for part in {*PACKED_PARTS, *TABLE_PARTS}:
            if f"{name}.{part}" in self.files.infos:
                self.files.release(f"{name}.{part}")

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled as the place where it lies, which is opened again: workers see the same path."""
        return reopened, (str((self.file or self.path).resolve()), self.fingerprint)

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
        path = self.path / "tokenizer.json"
        digest.update(path.read_bytes() if has_tokenizer(path) else b"")
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
        present = has_tokenizer(path)
        if not present and self.file is not None:
            raise FormatError(f"{path}: no such file; put tokenizer.json and tokenizer_config.json "
                              f"of the model that {self.file.name} was made of beside it")
        if not present:
            raise FormatError(
                f"{path}: no such file; slow tokenizers (tokenizer.model) are not read. Save a "
                f"fast one by transformers: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
            )
        with tokenizer_errors(self.path):
            tokenizer = Tokenizer.from_file(str(path))
            tokenizer.no_truncation()
            tokenizer.no_padding()
        add_tokens(tokenizer, self)
        return tokenizer

    def encode(self, text: str, special: bool = True) -> NDArray[np.int64]:
        """Token ids [count] of a text, with the tokenizer's own special tokens unless told.

        ValueError for a lone surrogate and for a token that is outside the vocabulary.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise ValueError("text: expected valid Unicode, found a lone surrogate") from None
        tokenizer = self.tokenizer  # its own errors name the file
        with tokenizer_errors(self.path):
            found = tokenizer.encode(text, add_special_tokens=special).ids
        ids = np.asarray(found, np.int64)
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
        return read_json(self.path / name) if is_present(self.path / name) else {}

    def __repr__(self) -> str:
        s, files = self.spec, len({info.path for info in self.tensors.values()})
        quant = f", {self.quant_config.scheme}" if self.quant_config else ""
        return (
            f"Checkpoint({(self.file or self.path).name!r}, {s.family}, {s.layers} layers, hidden "
            f"{s.hidden}, {s.parameters / 1e6:.1f}M parameters, {self.dtype}{quant}, "
            f"{files} file{'s' if files > 1 else ''})"
        )

    def facts(self) -> dict[str, str]:
        """What a person asks of a folder, by name, as text."""
        s, quant = self.spec, self.quant_config
        facts = {
            "folder": str(self.file or self.path), "family": s.family,
            "sizes": f"{s.layers} layers, hidden {s.hidden}, vocabulary {s.vocab}",
            "parameters": f"{s.parameters / 1e6:.1f} million",
            "on disk": megabytes(self.bytes_with_tokenizer),
        }
        if quant is None:
            return facts | {"weights": f"{self.dtype}, not quantized"}
        return facts | {"scheme": f"{quant.scheme}, method {quant.method}, weights {quant.weights}",
                        "embedding": self.dtype}

    def _repr_html_(self) -> str:
        return facts_html("Checkpoint", self.facts())


def open_model(model: str | Path | Checkpoint) -> Checkpoint:
    """A Checkpoint as it is; a path is opened."""
    return model if isinstance(model, Checkpoint) else load_checkpoint(model)


def _rows(linear: LinearSpec, stored: NDArray[Any]) -> NDArray[Any]:
    """The linear's rows [n, ...] of a tensor that holds others' too; a view where they adjoin."""
    count = linear.n // linear.blocks
    blocks = stored.reshape(linear.blocks, -1, *stored.shape[1:])
    rows = blocks[:, linear.first_row : linear.first_row + count]
    return np.ascontiguousarray(rows.reshape(linear.n, *stored.shape[1:]))


def load_checkpoint(path: str | Path, dequantize: bool = False) -> Checkpoint:
    """Opens a folder as save_pretrained or singlequant writes it: config.json, *.safetensors. Or
    a GGUF file, with tokenizer.json beside it.

    dequantize: read weights that GPTQ, AWQ or compressed-tensors quantized as 16-bit ones, instead
    of refusing them (docs/checkpoints.md).

    All names, types, shapes and offsets are checked here, before any weight is read. FormatError
    names the file, what was expected and what was found. Values are checked when they are used.
    """
    folder = Path(path)
    if is_present(folder):
        return _open_file(folder)
    if not folder.is_dir():
        raise FormatError(f"{folder}: no such folder")
    source = folder / "config.json"
    config = language_config(read_json(source))
    quantization = find_quantization(config, folder, dequantize)
    if quantization is not None:
        config = {key: value for key, value in config.items()
                  if key not in ("quantization_config", "compression_config")}
    header = parse_quantization(config.get("quantization_config"), str(source))
    family = None if header and header.spec else find_family(config, str(source))
    spec = header.spec if family is None else family.spec(config, str(source))
    opened = open_tensors(folder, spec, family.respelled if family else None, quantization)
    if family is not None and family.experts:  # they are stored in more than one way
        spec = family.spec(config, str(source), opened.files.__contains__)
    if header is None and has_own_head(folder, spec, opened.files):
        config, spec = {**config, "tie_word_embeddings": False}, replace(spec, tied=False)
    checkpoint = Checkpoint(folder, config, spec, None if header is None else header.config,
                            opened.files)
    extras = _check_tensors(checkpoint)
    silent, reported = sort_extras(spec, config, checkpoint.tensors, extras, opened.outside,
                                   opened.unneeded)
    warn_of(folder, reported)
    return replace(checkpoint, ignored_tensors=(*silent, *reported))


@lru_cache(maxsize=2)
def reopened(path: str, fingerprint: str) -> Checkpoint:
    """The checkpoint that another process opened under that path, opened once in this one.

    FormatError when another lies there, or none.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they were given where it was opened first
        try:
            found = load_checkpoint(path, dequantize=True)
        except FormatError as error:
            raise FormatError(f"{error} (on {socket.gethostname()}: workers must see the model "
                              f"under the path of the process that asks them)") from None
    if found.fingerprint != fingerprint:
        raise FormatError(f"{path}: expected the model that the run began with, found another")
    return found


def _open_file(path: Path) -> Checkpoint:
    """The model of a GGUF file."""
    from .gguf_file import open_gguf

    model = open_gguf(path)
    checkpoint = Checkpoint(path.parent, model.config, model.spec, None, model.files, file=path)
    _check_tensors(checkpoint)
    return checkpoint


def _check_tensors(checkpoint: Checkpoint) -> set[str]:
    """Compares the tensors' headers with the spec. The names that the spec does not explain."""
    folder, tensors, spec = checkpoint.path, checkpoint.tensors, checkpoint.spec
    packed, known = checkpoint._packed, set()
    if not checkpoint._has_table(spec.head):
        require_head(folder, spec, tensors)
    if packed is not None:
        known |= packed.check_tables()
        for i in range(min(spec.layers, len(tensors))):  # config.json may claim billions of layers
            for linear in spec.layer(i).linears.values():
                name = linear.at(i)
                if packed.has(name):
                    known |= packed.check_linear(name, linear.n, linear.k)
    for name, shape in spec.tensors():
        module = name.removesuffix(".weight")
        if not {f"{module}.weight_packed", f"{module}.weight_codes"} & known:
            check_tensor(folder, tensors, name, WEIGHT_DTYPES, shape)
            known.add(name)
    if packed is not None:
        for i in range(spec.layers):
            known |= packed.check_layer(i)
    return set(tensors) - known
