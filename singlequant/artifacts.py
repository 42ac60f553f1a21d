# SPDX-License-Identifier: Apache-2.0
"""Frozen dataclasses passed between the stages, the recipe of a run, the names of the format."""

from __future__ import annotations

import dataclasses
import fnmatch
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import _C
from ._C import FormatError

__all__ = [
    "BALANCED_SITES",
    "DEFAULT_METHOD",
    "FACTOR_DENSE_MAX",
    "FORMAT_VERSION",
    "GPTQ_INPUTS",
    "HIGH_STEP",
    "KV_BITS",
    "METHODS",
    "QUANT_METHOD",
    "RESIDUAL_METHODS",
    "SCHEMES",
    "SITES",
    "WEIGHTS",
    "BlockRotation",
    "Factor",
    "FormatError",
    "LayerRotations",
    "LayerStatistics",
    "LayerWeights",
    "Linear",
    "PackedLinear",
    "QuantConfig",
    "QuantizedLayer",
    "SiteRotation",
    "SiteStatistics",
    "chain_problem",
    "clip_name",
    "high_name",
    "high_problem",
    "packed_words",
    "packing_problem",
    "read_json",
    "permutation_problem",
    "rotation_name",
    "unique_keys",
]

QUANT_METHOD = "singlequant"  # quantization_config.quant_method
FORMAT_VERSION = 1  # quantization_config.format_version; docs/format.md
KV_BITS = (4, 8, 16)  # of the keys and values of a quantized model; 32 is for unquantized ones
FACTOR_DENSE_MAX = 512  # SQ_FACTOR_DENSE_MAX of the core: larger factors stay chains
HIGH_STEP = 32  # SQ_K_ALIGN of the core: inputs with 8 bits come in whole blocks
MAX_JSON_BYTES = 100_000_000

SCHEMES = {"w4a4": 4, "w4a8": 8, "w4a16": 16}
METHODS = (
    "balanced",
    "singlequant",
    "paper",
    "art",
    "urt",
    "hadamard",
    "random",
    "quarot",
    "spinquant",
    "duquant",
    "smoothquant",
    "none",
)
DEFAULT_METHOD = "balanced"
# Methods that rotate the residual stream inside the weights, and the sites they rotate online.
RESIDUAL_METHODS = {"quarot": ("o", "down"), "spinquant": ("down",)}
WEIGHTS = ("rtn", "mse", "gptq")
GPTQ_INPUTS = ("float", "quantized")
SITES = ("qkv", "o", "gate_up", "down")
# Methods that fold a balance into the weights, and the sites that get one; smoothquant, as
# published, where a norm feeds the linears.
BALANCED_SITES = {"balanced": SITES, "duquant": SITES, "smoothquant": ("qkv", "gate_up")}
DEFAULT_CLIP = {"w4a4": 0.8, "w4a8": 1.0, "w4a16": 1.0}


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in path. FormatError naming the file if it is missing or anything else."""
    if not path.is_file():
        raise FormatError(f"{path}: no such file")
    if path.stat().st_size > MAX_JSON_BYTES:
        raise FormatError(
            f"{path}: expected at most {MAX_JSON_BYTES} bytes of JSON, found {path.stat().st_size}"
        )
    try:
        value = json.loads(path.read_bytes(), object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: expected a JSON object, found: {error}") from None
    if not isinstance(value, dict):
        raise FormatError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """json's object hook: a key that stands twice is an error, not a silent overwrite."""
    unique = dict(pairs)
    if len(unique) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"key {key!r} stands twice")
            seen.add(key)
    return unique


# ---- the recipe ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class QuantConfig:
    """What a run makes. ValueError names the field, what was expected and what was found."""

    scheme: str = "w4a4"  # bits of weights and activations
    method: str = DEFAULT_METHOD  # transformation of the activations
    weights: str = "gptq"  # rounding: nearest ("rtn"), with an MSE-searched clip, or "gptq"
    group_size: int = 0  # inputs that share a weight scale; 0 = the whole output channel
    clip: float | None = None  # activation range as a share of the token's maximum
    calibration_tokens: int = 2048
    seed: int = 0
    ignore: tuple[str, ...] = field(default=())  # linears left as they are (fnmatch patterns)
    gptq_inputs: str = "float"  # "quantized": GPTQ's Gram matrix is of inputs as they are run
    gptq_order: bool = False  # GPTQ rounds inputs by falling diagonal of it
    gptq_damping: float = 0.1  # share of the diagonal's mean that is added to it
    learned: str | None = None  # spinquant's rotations, a file of `spinquant.save_learned`
    kv_bits: int = 16  # of cached keys and values; below 16 the value heads are rotated as well

    def __post_init__(self) -> None:
        for name, allowed in (("scheme", SCHEMES), ("method", METHODS), ("weights", WEIGHTS),
                              ("gptq_inputs", GPTQ_INPUTS)):
            value = getattr(self, name)
            if not isinstance(value, str) or value not in allowed:
                raise ValueError(f"{name}: expected one of {', '.join(allowed)}, found {value!r}")
        _check_integer("group_size", self.group_size, 0)
        if self.group_size % 32:
            raise ValueError(
                f"group_size: expected 0 (per output channel) or a multiple of 32, "
                f"found {self.group_size}"
            )
        _check_integer("calibration_tokens", self.calibration_tokens, 1)
        _check_integer("seed", self.seed, 0)
        if self.clip is not None:
            _check_clip(self.clip)
            object.__setattr__(self, "clip", float(self.clip))
        listed = isinstance(self.ignore, (tuple, list))
        if not listed or not all(isinstance(pattern, str) for pattern in self.ignore):
            raise ValueError(f"ignore: expected a list of patterns, found {self.ignore!r}")
        object.__setattr__(self, "ignore", tuple(self.ignore))
        if not isinstance(self.gptq_order, bool):
            raise ValueError(f"gptq_order: expected true or false, found {self.gptq_order!r}")
        if self.learned is not None and not (
            isinstance(self.learned, str) and self.method == "spinquant"
        ):
            raise ValueError(f"learned: expected a file's name, with method 'spinquant' alone, "
                             f"found {self.learned!r} with {self.method!r}")
        if type(self.kv_bits) is not int or self.kv_bits not in KV_BITS:
            raise ValueError(f"kv_bits: expected one of {', '.join(map(str, KV_BITS))}, "
                             f"found {self.kv_bits!r}")
        _check_damping(self.gptq_damping)
        object.__setattr__(self, "gptq_damping", float(self.gptq_damping))

    @property
    def activation_bits(self) -> int:
        """4, 8 or 16."""
        return SCHEMES[self.scheme]

    @property
    def activation_clip(self) -> float:
        """The clip that holds: the given one, or the scheme's default."""
        return DEFAULT_CLIP[self.scheme] if self.clip is None else self.clip

    def ignores(self, linear: str) -> bool:
        """Whether the linear of that name (without .weight) stays as it is."""
        return any(fnmatch.fnmatchcase(linear, pattern) for pattern in self.ignore)

    def to_json(self) -> dict[str, Any]:
        """A dict of JSON values; from_json() takes it back."""
        return {**dataclasses.asdict(self), "ignore": list(self.ignore)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> QuantConfig:
        """The config of a dict. ValueError names unknown keys."""
        known = [f.name for f in dataclasses.fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ValueError(f"unknown key {unknown[0]!r}: expected keys are {', '.join(known)}")
        values = dict(values)
        if isinstance(values.get("ignore"), list):
            values["ignore"] = tuple(values["ignore"])
        elif "ignore" in values:
            raise ValueError(f"ignore: expected a list, found {values['ignore']!r}")
        return cls(**values)

    @classmethod
    def from_file(cls, path: str | Path) -> QuantConfig:
        """The recipe in a JSON file, or in a result's recipe.json; errors name the file."""
        values = read_json(Path(path))
        if isinstance(values.get("config"), dict):  # recipe.json also says what it was made from
            values = values["config"]
        try:
            return cls.from_json(values)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None


def _check_integer(name: str, value: Any, least: int) -> None:
    """ValueError unless value is an int (not a bool) of at least `least` and below 2^31."""
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**31:
        raise ValueError(
            f"{name}: expected an integer from {least} to {2**31 - 1}, found {value!r}"
        )


def _check_clip(value: Any) -> None:
    """ValueError unless value is a number in (0, 1]."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0.0 < value <= 1.0:
        raise ValueError(f"clip: expected a number in (0, 1], found {value!r}")


def _check_damping(value: Any) -> None:
    """ValueError unless value is a number in [0, 1]."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0.0 <= value <= 1.0:
        raise ValueError(f"gptq_damping: expected a number in [0, 1], found {value!r}")


# ---- rotations ----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False, repr=False)
class Factor:
    """One Kronecker factor as it acts on its axis's vectors: v -> chain(H v)."""

    order: int
    hadamard: bool
    pairs: NDArray[np.int32]  # [steps, 2], in order of application
    angles: NDArray[np.float64]  # [steps] rad

    def __post_init__(self) -> None:
        object.__setattr__(self, "pairs", _frozen(self.pairs, np.int32).reshape(-1, 2))
        object.__setattr__(self, "angles", _frozen(self.angles, np.float64).reshape(-1))
        problem = chain_problem(self.order, self.pairs, self.angles)
        if problem:
            raise ValueError(f"factor: {problem}")

    @classmethod
    def identity(cls, order: int) -> Factor:
        """The factor that leaves vectors of that order as they are."""
        return cls(order, False, np.empty((0, 2), np.int32), np.empty(0))

    @property
    def steps(self) -> int:
        """Number of Givens rotations."""
        return len(self.angles)

    @property
    def is_identity(self) -> bool:
        """True without a Hadamard and without a Givens rotation."""
        return not self.hadamard and self.steps == 0

    def matrix(self) -> NDArray[np.float64]:
        """The orthogonal matrix [order, order], v -> matrix @ v."""
        rows = np.eye(self.order)  # row i is e_i: transformed, it is column i of the matrix
        if self.hadamard:
            rows = _C.hadamard_transform(rows)
        if self.steps:
            rows = _C.chain_apply(self.pairs, self.angles, rows)
        return np.ascontiguousarray(rows.T)

    def runtime(self) -> NDArray[np.float32] | tuple[int, bool, Any, Any]:
        """What _C.rotate takes: a dense float32 matrix up to FACTOR_DENSE_MAX, else the chain."""
        if self.order <= FACTOR_DENSE_MAX:
            return self.matrix().astype(np.float32)
        return self.order, self.hadamard, self.pairs, self.angles

    def __repr__(self) -> str:
        return f"Factor({self.order}{', H' if self.hadamard else ''}, {self.steps} rotations)"


def chain_problem(order: int, pairs: NDArray[Any], angles: NDArray[Any]) -> str | None:
    """What is wrong with a chain of that order, or None. Reads every pair and angle."""
    if order < 1:
        return f"expected an order of at least 1, found {order}"
    if pairs.ndim != 2 or pairs.shape != (angles.size, 2) or angles.ndim != 1:
        return f"expected pairs [steps, 2] and angles [steps], found {pairs.shape}, {angles.shape}"
    if pairs.size and not (pairs.min() >= 0 and pairs.max() < order):
        return f"expected indices from 0 to {order - 1}, found {pairs.min()} to {pairs.max()}"
    if np.any(pairs[:, 0] == pairs[:, 1]):
        return "expected two different indices in each pair"
    if not np.isfinite(angles).all():
        return "expected finite angles"
    return None


@dataclass(frozen=True, eq=False, repr=False)
class SiteRotation:
    """The transformation of one site: X [k1, k2] -> left (X / balance) right^T.

    Each factor acts on its axis; the balance, one factor per input, folds into what produces x.
    """

    left: Factor  # order k1: the paper's R1 = R_U1 R_A
    right: Factor  # order k2: the transpose of the paper's R2 = H R_U2
    art_steps: int = 0
    urt_steps: int = 0
    sweep_rotations: int = 0
    balance: NDArray[np.float32] | None = None  # [k] x / balance, W * balance
    high: int = 0  # leading inputs, after rotation, that keep 8 bits where the others get 4

    def __post_init__(self) -> None:
        if self.balance is not None:
            object.__setattr__(self, "balance", _checked_balance(self.balance, self.k))
        if not 0 <= self.high < self.k or self.high % HIGH_STEP:
            raise ValueError(
                f"high: expected a multiple of {HIGH_STEP} below {self.k}, found {self.high}"
            )

    @property
    def k(self) -> int:
        """Inputs of the site's linears."""
        return self.left.order * self.right.order

    @property
    def sizes(self) -> tuple[int, int]:
        """(k1, k2)."""
        return self.left.order, self.right.order

    @property
    def is_identity(self) -> bool:
        """True if both factors leave everything as it is."""
        return self.left.is_identity and self.right.is_identity

    @cached_property
    def arrays(self) -> tuple[Any, Any]:
        """(left, right) as _C.rotate takes them."""
        return self.left.runtime(), self.right.runtime()

    def __repr__(self) -> str:
        return (
            f"SiteRotation({self.left.order}x{self.right.order}, art {self.art_steps}, "
            f"urt {self.urt_steps}, sweeps {self.sweep_rotations}"
            f"{', balanced' if self.balance is not None else ''}"
            f"{f', {self.high} at 8 bits' if self.high else ''})"
        )


def permutation_problem(permutation: NDArray[Any]) -> str | None:
    """What keeps a vector of integers from being a permutation, or None."""
    if np.array_equal(np.sort(permutation), np.arange(len(permutation))):
        return None
    return f"expected each of 0 to {len(permutation) - 1} once, found others or one twice"


@dataclass(frozen=True, eq=False, repr=False)
class BlockRotation:
    """x [k] -> x blockdiag(first), permuted, times blockdiag(second): DuQuant's form."""

    first: NDArray[np.float32]  # [k / b, b, b]
    permutation: NDArray[np.int32]  # [k]: channel permutation[i] goes to place i
    second: NDArray[np.float32]  # [k / b, b, b]
    balance: NDArray[np.float32] | None = None  # [k] x / balance, W * balance, as in SiteRotation

    art_steps = urt_steps = sweep_rotations = high = 0  # no Givens rotations, one width

    def __post_init__(self) -> None:
        for name, dtype in (("first", np.float32), ("permutation", np.int32),
                            ("second", np.float32)):
            object.__setattr__(self, name, _frozen(getattr(self, name), dtype))
        count, b = (self.first.shape + (0, 0))[:2]
        for name, shape in (("first", (count, b, b)), ("second", (count, b, b)),
                            ("permutation", (count * b,))):
            found = getattr(self, name).shape
            if found != shape or not count * b:
                raise ValueError(f"{name}: expected square blocks (k / b, b, b) twice and a "
                                 f"permutation (k,), found {found}")
        problem = permutation_problem(self.permutation)
        if problem:
            raise ValueError(f"permutation: {problem}")
        if self.balance is not None:
            object.__setattr__(self, "balance", _checked_balance(self.balance, self.k))

    @property
    def k(self) -> int:
        """Inputs of the site's linears."""
        return len(self.permutation)

    @property
    def sizes(self) -> tuple[int, int]:
        """(k / b, b)."""
        return self.first.shape[0], self.first.shape[1]

    @cached_property
    def is_identity(self) -> bool:
        """True if blocks and permutation leave everything as it is."""
        eye = np.eye(self.sizes[1], dtype=np.float32)
        unmoved = np.array_equal(self.permutation, np.arange(self.k))
        return unmoved and bool((self.first == eye).all() and (self.second == eye).all())

    @property
    def arrays(self) -> tuple[Any, Any, Any]:
        """(first, permutation, second) as _C.rotate_blocks takes them."""
        return self.first, self.permutation, self.second

    def __repr__(self) -> str:
        return f"BlockRotation({self.sizes[0]} blocks of {self.sizes[1]})"


@dataclass(frozen=True, eq=False, repr=False)
class SiteStatistics:
    """Moments and extremes of a site's inputs x [k], k = k1 * k2, over the calibration tokens."""

    k1: int
    k2: int
    count: int  # tokens
    min: NDArray[np.float64]  # [k]
    max: NDArray[np.float64]  # [k]
    sum: NDArray[np.float64]  # [k]
    sum2: NDArray[np.float64]  # [k] sum of squares
    sum4: NDArray[np.float64]  # [k] sum of fourth powers
    gram1: NDArray[np.float64]  # [k1, k1] sum over tokens of X X^T, X = x as (k1, k2)
    gram2: NDArray[np.float64]  # [k2, k2] sum over tokens of X^T X
    sample: NDArray[np.float32]  # [tokens kept, k], evenly spaced
    weights: NDArray[np.float32]  # [rows kept, k] of the site's linears, evenly spaced
    weight_max: NDArray[np.float64]  # [k] largest magnitude of a column of the site's linears
    weight_sum2: NDArray[np.float64]  # [k] sum of squares of a column
    shared: tuple[int, int, int]  # k = a * b * c; inputs that differ in b share one producer
    inputs: NDArray[np.float32] | None = None  # [count, k] if kept, while the layer is processed

    def __repr__(self) -> str:
        return (
            f"SiteStatistics({self.k1}x{self.k2}, {self.count} tokens, {len(self.sample)} kept, "
            f"{len(self.weights)} weight rows)"
        )


@dataclass(frozen=True)
class LayerStatistics:
    """The statistics of one layer's sites."""

    index: int
    sites: Mapping[str, SiteStatistics]

    def __post_init__(self) -> None:
        _check_sites("sites", self.sites)


@dataclass(frozen=True)
class LayerRotations:
    """The rotations of one layer by site; a site without a rotation is absent."""

    layer: int
    sites: Mapping[str, SiteRotation | BlockRotation]
    statistics: LayerStatistics | None = None  # what they were solved from, for weights "gptq"

    def __post_init__(self) -> None:
        _check_sites("sites", self.sites)


# ---- weights ------------------------------------------------------------------------------------


def packed_words(k: int) -> int:
    """int32 words of one packed row of k codes."""
    return -(-k // 8)


@dataclass(frozen=True, eq=False, repr=False)
class PackedLinear:
    """int4 weights in the stored layout: code + 8 in nibbles, low nibble first, tail code 0."""

    words: NDArray[np.int32]  # [n, ceil(k / 8)]
    scales: NDArray[np.float32]  # [n, k / group], [n, 1] for group 0
    shape: tuple[int, int]  # (n, k)
    group: int  # inputs per scale, 0 = all of them

    def __post_init__(self) -> None:
        n, k = self.shape
        if self.group and k % self.group:
            raise ValueError(f"group: expected a divisor of k = {k}, found {self.group}")
        groups = k // self.group if self.group else 1
        for name, dtype, shape in (
            ("words", np.int32, (n, packed_words(k))),
            ("scales", np.float32, (n, groups)),
        ):
            array = getattr(self, name)
            if array.dtype != dtype or array.shape != shape:
                raise ValueError(
                    f"{name}: expected {np.dtype(dtype)} {shape}, found {array.dtype} {array.shape}"
                )

    @property
    def nbytes(self) -> int:
        """Bytes of words and scales."""
        return self.words.nbytes + self.scales.nbytes

    def __repr__(self) -> str:
        n, k = self.shape
        return f"PackedLinear({n}x{k}, {f'group {self.group}' if self.group else 'per channel'})"


@dataclass(frozen=True, eq=False)
class Linear:
    """One linear of a layer, y = x weight^T + bias."""

    name: str  # "model.layers.0.self_attn.q_proj"
    weight: NDArray[Any] | PackedLinear  # [n, k] in 32 or 16 bits, or packed
    bias: NDArray[Any] | None  # [n]

    def __repr__(self) -> str:
        n, k = self.weight.shape
        kind = "packed" if isinstance(self.weight, PackedLinear) else self.weight.dtype
        return f"Linear({self.name}, {n}x{k}, {kind}{', bias' if self.bias is not None else ''})"


@dataclass(frozen=True, eq=False)
class LayerWeights:
    """One decoder layer of a checkpoint, by role. Arrays are read-only views of the files."""

    index: int
    norms: tuple[NDArray[Any], NDArray[Any]]  # [hidden] before attention, [hidden] before the MLP
    linears: Mapping[str, Linear]  # q, k, v, o, gate, up, down, in this order
    rotations: Mapping[str, tuple[Any, ...]]  # by site: the `arrays` of its rotation
    clips: Mapping[str, float]  # by site; empty for an unquantized checkpoint
    high: Mapping[str, int] = field(default_factory=dict)  # by site, inputs with 8 bits; absent = 0


@dataclass(frozen=True, eq=False, repr=False)
class QuantizedLayer:
    """One layer as it is written to the packed file."""

    index: int
    packed: Mapping[str, PackedLinear]  # by linear: "model.layers.0.self_attn.q_proj"
    dense: Mapping[str, NDArray[Any]]  # by tensor: norms, biases, weights of ignored linears
    rotations: Mapping[str, SiteRotation | BlockRotation]  # by site; absent = not rotated
    clips: Mapping[str, float] = field(default_factory=dict)  # by site; absent = the config's
    high: Mapping[str, int] = field(default_factory=dict)  # by site, inputs with 8 bits; absent = 0

    def __post_init__(self) -> None:
        for name in ("rotations", "clips", "high"):
            _check_sites(name, getattr(self, name))
        for value in self.clips.values():
            _check_clip(value)

    def __repr__(self) -> str:
        sites = ", ".join(f"{s} {r.sizes[0]}x{r.sizes[1]}" for s, r in self.rotations.items())
        return (
            f"QuantizedLayer({self.index}, {len(self.packed)} packed, {len(self.dense)} dense, "
            f"rotations: {sites or 'none'})"
        )


def _checked_balance(balance: Any, k: int) -> NDArray[np.float32]:
    """The balance, frozen. ValueError unless it has k positive finite numbers."""
    balance = _frozen(balance, np.float32)
    if balance.shape != (k,) or not (np.isfinite(balance) & (balance > 0)).all():
        raise ValueError(
            f"balance: expected {k} positive numbers, found shape {balance.shape}, "
            f"least {balance.min(initial=np.inf):g}"
        )
    return balance


def _check_sites(name: str, sites: Iterable[str]) -> None:
    unknown = [site for site in sites if site not in SITES]
    if unknown:
        raise ValueError(f"{name}: expected keys among {', '.join(SITES)}, found {unknown[0]!r}")


def _frozen(array: Any, dtype: Any) -> NDArray[Any]:
    """A read-only contiguous array of dtype; a copy unless it is one already."""
    array = np.asarray(array)
    if array.dtype != dtype or array.flags.writeable or not array.flags.c_contiguous:
        array = np.array(array, dtype=dtype, order="C")
        array.flags.writeable = False
    return array


# ---- names of the packed format (docs/format.md) ------------------------------------------------


def rotation_name(layer: int, site: str, part: str) -> str:
    """Tensor of a site's rotation; part: left, right, or those with _chain, _pairs, _angles; or
    first, permutation, second."""
    return f"model.layers.{layer}.rotations.{site}.{part}"


def clip_name(layer: int, site: str) -> str:
    """Tensor of a site's own activation clip."""
    return f"model.layers.{layer}.activations.{site}.clip"


def high_name(layer: int, site: str) -> str:
    """Tensor of the number of a site's leading inputs that keep 8 bits."""
    return f"model.layers.{layer}.activations.{site}.high"


PACKED_PARTS = {"weight_packed": "I32", "weight_scale": "F32", "weight_shape": "I64"}
CHAIN_PARTS = {"chain": "I64", "pairs": "I32", "angles": "F64"}
BLOCK_PARTS = {"first": "F32", "permutation": "I32", "second": "F32"}


def high_problem(high: int, k: int, config: QuantConfig) -> str | None:
    """What a number of inputs with 8 bits among k is expected to be, if it is not; or None."""
    if high and config.activation_bits != 4:
        return f"expected 0 with {config.scheme}"
    step = config.group_size or HIGH_STEP
    if not 0 <= high < k or high % step:
        return f"expected a multiple of {step} below {k}"
    return None


def packing_problem(linear: str, k: int, config: QuantConfig) -> str | None:
    """Why a linear with k inputs cannot be packed as config says, or None."""
    if config.group_size and k % config.group_size:
        return (
            f"group_size: expected a divisor of {linear}'s {k} inputs, found {config.group_size} "
            f"(choose another, 0, or list the linear under ignore)"
        )
    return None
