# SPDX-License-Identifier: Apache-2.0
"""Rotation of the residual stream, fused into the weights: what QuaRot and SpinQuant share.

RMSNorm without its weight commutes with an orthogonal Q, so a decoder computes the same when
its residual stream x becomes x Q (QuaRot, arXiv 2404.00456, section 3; after SliceGPT):

    norm weights g      -> 1, folded into the linears behind them: W -> W diag(g)
    embedding E         -> E Q
    q, k, v, gate, up   -> W Q                      head W -> W Q
    o, down             -> Q^T W, bias b -> b Q

and when each value head v becomes v R with R [head_dim, head_dim], taken back by o's columns.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields, replace
from functools import cached_property
from math import prod
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from .. import _C
from ..models.spec import NORM_PLACES, LayerSpec, ModelSpec, NormSpec
from ..rows import ROWS_PER_BLOCK, float32_blocks, require_finite
from ..tensors import DTYPES, TensorInfo
from ..weights import Dense, LayerWeights, Linear, Norm, norm_tensors

__all__ = [
    "DenseRotation",
    "RandomizedHadamard",
    "ResidualCheckpoint",
    "ValueCheckpoint",
    "View",
    "require_commuting",
]

ORTHOGONALITY_TOLERANCE = 1e-4  # largest entry of |Q^T Q - I|, as for the stored factors


class Rotation(Protocol):
    """An orthogonal Q [order, order] that acts on rows from the right."""

    order: int

    def apply(self, x: NDArray[np.float64]) -> NDArray[np.float64]: ...
    def digest(self) -> bytes: ...


class RandomizedHadamard:
    """Q = diag(s) H with random signs s: QuaRot's; applied in O(order log order), never built."""

    def __init__(self, order: int, seed: int | list[int] = 0) -> None:
        self.order = order
        self.signs = np.random.default_rng(seed).choice([-1.0, 1.0], order)

    def apply(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        """Rows x [rows, order] times Q."""
        return _C.hadamard_transform(x * self.signs)

    def digest(self) -> bytes:
        """What tells this rotation from another."""
        return b"hadamard" + np.packbits(self.signs > 0).tobytes()


class DenseRotation:
    """Q as a matrix [order, order]: SpinQuant's learned one. ValueError unless orthogonal."""

    def __init__(self, matrix: NDArray[np.floating], name: str = "residual") -> None:
        self.matrix = _orthogonal(matrix, name)
        self.order = len(self.matrix)

    def apply(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        """Rows x [rows, order] times Q."""
        return x @ self.matrix

    def digest(self) -> bytes:
        """What tells this rotation from another."""
        return b"dense" + self.matrix.tobytes()


def _orthogonal(matrix: NDArray[np.floating], name: str) -> NDArray[np.float64]:
    """A square matrix in float64. ValueError unless |M^T M - I| is within the tolerance."""
    matrix = np.array(matrix, np.float64)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"{name}: expected a square matrix, found {matrix.shape}")
    with np.errstate(all="ignore"):  # NaN and Inf fail the comparison as well
        error = np.abs(matrix.T @ matrix - np.eye(len(matrix))).max()
    if not error < ORTHOGONALITY_TOLERANCE:
        raise ValueError(f"{name}: expected an orthogonal matrix, found |M^T M - I| = {error:.3g}")
    return matrix


# ---- the views ----------------------------------------------------------------------------------


class View:
    """What the views of an unquantized Checkpoint, `source`, share."""

    source: Any
    quant_config = None
    quantized = False

    @property
    def path(self):
        """The source's folder: tokenizer and other files are copied from there."""
        return self.source.path

    @property
    def config(self) -> dict[str, Any]:
        """The source's config.json."""
        return self.source.config

    def facts(self) -> dict[str, str]:
        """The source's."""
        return self.source.facts()

    @property
    def dtype(self) -> str:
        """The source's element type."""
        return self.source.dtype

    @property
    def embedding(self) -> NDArray[Any]:
        """The source's embedding [vocab, hidden]."""
        return self.source.embedding

    @property
    def head(self) -> NDArray[Any]:
        """The source's head [vocab, hidden]."""
        return self.source.head

    @property
    def final_norm(self) -> Norm:
        """The source's last norm."""
        return self.source.final_norm

    @cached_property
    def spec(self) -> ModelSpec:
        """The source's spec, every linear by itself."""
        return self.source.spec.separate()

    def linear_name(self, layer: int, role: str) -> str:
        """Name of a linear without .weight, as `ignore` patterns see it."""
        return self.source.linear_name(layer, role)

    def require_unquantized(self) -> None:
        """Does nothing: the source is not packed."""

    def require_finite(self, i: int) -> None:
        """ValueError with the name of the source's tensor of layer i that has NaN or Inf."""
        self.source.require_finite(i)

    @property
    def tokenizer(self):
        """The source's tokenizer."""
        return self.source.tokenizer

    @property
    def tokenizer_config(self) -> dict[str, Any]:
        """The source's tokenizer_config.json."""
        return self.source.tokenizer_config

    @property
    def generation_config(self) -> dict[str, Any]:
        """The source's generation_config.json."""
        return self.source.generation_config

    def encode(self, text: str, special: bool = True) -> NDArray[np.int64]:
        """Token ids [count] of a text, by the source's tokenizer."""
        return self.source.encode(text, special)

    @property
    def outer(self) -> dict[str, NDArray[Any]]:
        """The tensors outside the layers by name."""
        return self.source.outer

    def __getstate__(self) -> dict[str, Any]:
        """What it was made of: what was computed since is computed again."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def layer(self, i: int) -> LayerWeights:
        """Layer i by role, rotated. IndexError beyond the last."""
        kept = self.__dict__.get("_kept")
        if kept is None or kept.index != i:
            self.__dict__.pop("_kept", None)  # one layer in memory at a time
            kept = self._layer(i)
            self.__dict__["_kept"] = kept
        return kept

    def _infos(self, dtypes: dict[str, str]) -> dict[str, TensorInfo]:
        """Sizes of the tensors by name. Their places mean nothing. dtypes: those that differ from
        the source's embedding's."""
        usual = self.source.tensors[f"{self.source.spec.embed}.weight"].dtype
        infos = {}
        for name, shape in self.spec.tensors():
            found = self.source.tensors.get(name)
            dtype = dtypes.get(name) or (found.dtype if found else usual)
            item = DTYPES[dtype].itemsize
            infos[name] = TensorInfo(self.path, dtype, shape, 0, item * prod(shape))
        return infos


@dataclass(frozen=True, eq=False, repr=False)
class ResidualCheckpoint(View):
    """An unquantized Checkpoint seen through a rotation of its residual stream.

    It takes a Checkpoint's place in calibrate, quantize, ModelWriter and Model. Tensors are float32
    and computed (in float64) when they are read; of the layers only the last one read is kept. A
    tied head becomes untied: the embedding and the head rotate differently, because of the last
    norm's weight. ValueError when the checkpoint is packed, a size does not fit or a norm is not an
    RMSNorm in front of what reads the residual stream: only that one commutes with a rotation.
    """

    source: Any  # the Checkpoint
    residual: Rotation  # [hidden, hidden]
    values: NDArray[np.float64] | None = None  # [layers, head_dim, head_dim], of each value head
    seconds: float = 0.0  # what finding the rotations took

    def __post_init__(self) -> None:
        self.source.require_unquantized()
        spec = self.source.spec
        require_commuting(spec)
        if self.residual.order != spec.hidden:
            raise ValueError(f"residual: expected a rotation of {spec.hidden} channels, "
                             f"found {self.residual.order}")
        if self.values is None:
            return
        d = spec.attention.head_dim
        expected, found = (spec.layers, d, d), np.shape(self.values)
        if found != expected:
            raise ValueError(f"values: expected {expected}, found {found}")
        checked = [_orthogonal(r, f"values[{i}]") for i, r in enumerate(self.values)]
        object.__setattr__(self, "values", np.stack(checked))

    # what it is

    dtype = "float32"

    @cached_property
    def spec(self) -> ModelSpec:
        """The source's spec with an untied head."""
        return replace(self.source.spec.separate(), tied=False)

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json as it describes the rotated weights."""
        config = {**self.source.config, "tie_word_embeddings": False}
        return config | {key: "float32" for key in ("dtype", "torch_dtype") if key in config}

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        """Type and size of the tensors by name; all are float32."""
        return self._infos({name: "F32" for name, _ in self.spec.tensors()})

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the source's fingerprint and the rotations."""
        digest = hashlib.sha256(self.source.fingerprint.encode() + self.residual.digest())
        digest.update(b"" if self.values is None else self.values.tobytes())
        return digest.hexdigest()

    # weights

    @cached_property
    def embedding(self) -> NDArray[np.float32]:
        """[vocab, hidden]: E Q."""
        return _frozen(self._inputs(self.source.embedding, f"{self.spec.embed}.weight"))

    @cached_property
    def head(self) -> NDArray[np.float32]:
        """[vocab, hidden]: W diag(g) Q, g the last norm's weight."""
        norm = self.source.final_norm
        scale = self._scale(norm, self.spec.final_norm)
        return _frozen(self._inputs(self.source.head, f"{self.spec.head}.weight", scale))

    @property
    def final_norm(self) -> Norm:
        """Ones: the weight is folded into the head."""
        return self._ones(self.source.final_norm, self.spec.final_norm)

    @property
    def outer(self) -> dict[str, NDArray[Any]]:
        """The tensors outside the layers by name."""
        spec = self.spec
        own = {f"{spec.embed}.weight": self.embedding, f"{spec.head}.weight": self.head}
        return {**self.source.outer, **own, **norm_tensors(self.final_norm)}

    def _scale(self, norm: Norm, spec: NormSpec) -> NDArray[np.float64]:
        """What a norm multiplies by."""
        return _float64(norm.weight, f"{norm.name}.weight") + spec.offset

    def _ones(self, norm: Norm, spec: NormSpec) -> Norm:
        """The norm that multiplies by 1."""
        ones = np.full(self.spec.hidden, 1 - spec.offset, np.float32)
        return Norm(norm.name, _frozen(ones), None)

    def _layer(self, i: int) -> LayerWeights:
        source, norms = self.source.layer(i), self.spec.layer(i).norms
        scales = {place: self._scale(norm, norms[place]) for place, norm in source.norms.items()
                  if place in NORM_PLACES}
        linears = {}
        for site in self.spec.layer(i).sites.values():
            for role in site.roles:
                scale = scales[site.norm] if site.reads == "residual" else None
                linears[role] = self._linear(i, role, source.linears[role], scale)
        ones = {place: self._ones(norm, norms[place]) if place in scales else norm
                for place, norm in source.norms.items()}
        dense = {key: self._router(tensor, scales["before_mlp"])
                 if key in ("router", "shared_router") else tensor
                 for key, tensor in source.dense.items()}
        return LayerWeights(i, ones, linears, dense=dense)

    def _router(self, tensor: Dense, norm: NDArray[np.float64]) -> Dense:
        """A router, which reads what the MLP would."""
        return Dense(tensor.name, _frozen(self._inputs(tensor.array, tensor.name, norm)))

    def _linear(
        self, i: int, role: str, linear: Linear, norm: NDArray[np.float64] | None
    ) -> Linear:
        """norm: the weight [hidden] of the norm that the linear reads; None for o and down."""
        weight_name, bias = f"{linear.name}.weight", linear.bias
        if bias is not None:
            bias = _float64(bias, f"{linear.name}.bias")
        if norm is not None:
            weight = self._inputs(linear.weight, weight_name, norm)
            if role == "v" and self.values is not None:  # rows: v R is (R^T W) x
                weight = self._heads(weight.T, i).T
                bias = None if bias is None else self._heads(bias, i)
        else:
            weight = self._outputs(linear.weight, weight_name)
            if role == "o" and self.values is not None:
                weight = self._heads(weight, i)
            bias = None if bias is None else self.residual.apply(bias[None])[0]
        return Linear(linear.name, _frozen(weight), None if bias is None else _frozen(bias))

    def _inputs(
        self, weight: NDArray, name: str, norm: NDArray[np.float64] | None = None
    ) -> NDArray[np.float32]:
        """W diag(norm) Q of W [n, hidden], a block of rows at a time."""
        out = np.empty(weight.shape, np.float32)
        for rows, block in float32_blocks(weight, name):
            block = block.astype(np.float64)
            out[rows] = self.residual.apply(block if norm is None else block * norm)
        return out

    def _outputs(self, weight: NDArray, name: str) -> NDArray[np.float32]:
        """Q^T W of W [hidden, k], a block of columns at a time."""
        out = np.empty(weight.shape, np.float32)
        require_finite(weight, name)
        for first in range(0, weight.shape[1], ROWS_PER_BLOCK):
            columns = slice(first, first + ROWS_PER_BLOCK)
            block = np.ascontiguousarray(weight[:, columns].T).astype(np.float64)
            out[:, columns] = self.residual.apply(block).T
        return out

    def _heads(self, x: NDArray, i: int) -> NDArray[np.float64]:
        """x [..., heads * head_dim] with layer i's value rotation applied to every head."""
        return _rotate_heads(x, self.values[i])

    def __repr__(self) -> str:
        values = "" if self.values is None else ", values"
        return f"ResidualCheckpoint({self.source!r}, {type(self.residual).__name__}{values})"


def require_commuting(spec: ModelSpec) -> None:
    """ValueError unless a rotation of the residual stream passes the norms of every layer."""
    for layer in spec.kinds:
        _require_commuting(spec, layer)


def _require_commuting(spec: ModelSpec, layer: LayerSpec) -> None:
    norms = [spec.final_norm, *(n for place, n in layer.norms.items() if place in NORM_PLACES)]
    plain = all(n is not None and n.kind == "rms" and n.weight and not n.bias for n in norms)
    before = all(site.norm for site in layer.sites.values() if site.reads == "residual")
    outer = spec.positions or spec.embed_norm or spec.embed_width
    heads = "v" in layer.linears and not layer.attention.qkv_clip
    after = any(place.startswith("after") for place in layer.norms)
    if not plain or not before or outer or not heads or after:
        raise ValueError(f"checkpoint: expected RMSNorms in front of attention and MLP alone, as a "
                         f"rotation of the residual stream needs them, found others "
                         f"({spec.family})")


@dataclass(frozen=True, eq=False, repr=False)
class ValueCheckpoint(View):
    """An unquantized Checkpoint whose value heads are rotated by a Hadamard, and nothing else.

    v becomes v H head by head, and o's columns take it back: what the cache holds of a value then
    has no outlying channels (QuaRot, arXiv 2404.00456, stage 1b). It takes a Checkpoint's place as
    `ResidualCheckpoint` does; v and o are float32, computed when they are read, all else is the
    source's. ValueError when the checkpoint is packed.
    """

    source: Any  # the Checkpoint

    def __post_init__(self) -> None:
        self.source.require_unquantized()

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        """Type and size of the tensors by name; those of v and o are float32."""
        names = [f"{self.linear_name(i, 'v')}.{part}" for i in range(self.spec.layers)
                 for part in ("weight", "bias")]
        names += [f"{self.linear_name(i, 'o')}.weight" for i in range(self.spec.layers)]
        return self._infos(dict.fromkeys(names, "F32"))

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the source's fingerprint and what is done to it."""
        return hashlib.sha256(self.source.fingerprint.encode() + b"hadamard values").hexdigest()

    def _layer(self, i: int) -> LayerWeights:
        source = self.source.layer(i)
        hadamard = _C.hadamard_transform(np.eye(self.spec.layer(i).attention.head_dim))
        v, o = source.linears["v"], source.linears["o"]
        bias = v.bias
        if bias is not None:
            bias = _frozen(_rotate_heads(_float64(bias, f"{v.name}.bias"), hadamard))
        rotated = {
            "v": Linear(v.name, self._rows(v, hadamard), bias),
            "o": Linear(o.name, self._columns(o, hadamard), o.bias),
        }
        linears = {role: rotated.get(role, linear) for role, linear in source.linears.items()}
        return replace(source, linears=linears)

    @staticmethod
    def _rows(linear: Linear, r: NDArray[np.float64]) -> NDArray[np.float32]:
        """Rows of v, head by head: v R is (R^T W) x."""
        out, d = np.empty(linear.weight.shape, np.float32), len(r)
        require_finite(linear.weight, f"{linear.name}.weight")
        for first in range(0, len(out), d):
            block = _C.to_float32(linear.weight[first : first + d]).astype(np.float64)
            out[first : first + d] = r.T @ block
        return _frozen(out)

    @staticmethod
    def _columns(linear: Linear, r: NDArray[np.float64]) -> NDArray[np.float32]:
        """Columns of o, head by head."""
        out = np.empty(linear.weight.shape, np.float32)
        for rows, block in float32_blocks(linear.weight, f"{linear.name}.weight"):
            out[rows] = _rotate_heads(block, r)
        return _frozen(out)

    def __repr__(self) -> str:
        return f"ValueCheckpoint({self.source!r})"


def _rotate_heads(x: NDArray, r: NDArray[np.float64]) -> NDArray[np.float64]:
    """x [..., heads * head_dim] with r [head_dim, head_dim] applied to every head."""
    return (x.reshape(-1, len(r)).astype(np.float64) @ r).reshape(x.shape)


def _float64(stored: NDArray, name: str) -> NDArray[np.float64]:
    """A vector of any stored type. ValueError names it when it holds NaN or Inf."""
    blocks = [block for _, block in float32_blocks(stored, name)]
    return np.concatenate(blocks).reshape(stored.shape).astype(np.float64)


def _frozen(array: NDArray) -> NDArray[np.float32]:
    """A read-only contiguous float32 array."""
    array = np.ascontiguousarray(array, np.float32)
    array.flags.writeable = False
    return array
