# SPDX-License-Identifier: Apache-2.0
"""The recipe of a run, and what its fields may be."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import _C
from .files import MAX_LISTING_BYTES, read_json
from .html import table_html
from .methods.registry import DEFAULT_METHOD, METHODS

KV_BITS = (4, 8, 16)  # of the keys and values of a quantized model; 32 is for unquantized ones
TABLE_BITS = (4, 6, 8, 16)  # of embedding and head; 16: as they are
DEFAULT_TABLE_BITS = 8
KV_DTYPES = ("float16", "bfloat16")
# float16 ends at 65504. The keys and values of a calibration text are not the largest of all texts:
# beyond half of that, the cache takes bfloat16. float16 has steps of 2^-24 below 2^-14: where all
# keys, or all values, are below 2^-10, at most 14 bits are left of the largest, fewer of others.
KV_FLOAT16_LARGEST = 65504 / 2
KV_FLOAT16_LEAST = 2.0**-10
CALIBRATION_BITS = (8, 32)

INT8_STEP = _C.INT8_STEP  # inputs with 8 bits come in whole blocks

SCHEMES = {"w4a4": 4, "w4a8": 8, "w4a16": 16}

WEIGHTS = ("rtn", "mse", "gptq")

GPTQ_INPUTS = ("float", "quantized")

DEFAULT_TOKENS = {"rtn": 2048, "mse": 2048, "gptq": 8192}


DEFAULT_CLIP = {"w4a4": 0.75, "w4a8": 1.0, "w4a16": 1.0}


@dataclass(frozen=True)
class QuantConfig:
    """What a run makes. ValueError names the field, what was expected and what was found."""

    scheme: str = "w4a8"  # bits of weights and activations
    method: str = DEFAULT_METHOD  # transformation of the activations
    weights: str = "gptq"  # rounding: nearest ("rtn"), with an MSE-searched clip, or "gptq"
    bits: float = 4.75  # of a weight, on average: 4 to 8; above 4 some linears have 5, 6 or 8
    group_size: int = 0  # inputs that share a weight scale; 0 = the whole output channel
    clip: float | None = None  # activation range as a share of the token's maximum
    calibration_tokens: int = None  # type: ignore[assignment]  # None: DEFAULT_TOKENS
    calibration_window: int = 512  # tokens that are run as one text; at most the model's maximum
    seed: int = 0
    ignore: tuple[str, ...] = field(default=())  # linears left as they are (fnmatch patterns)
    calibration_bits: int = 8  # of the layers that carry the tokens, and of GPTQ's Gram matrix
    gptq_inputs: str = "float"  # "quantized": GPTQ's Gram matrix is of inputs as they are run
    gptq_order: bool = False  # GPTQ rounds inputs by falling diagonal of it
    gptq_damping: float = 0.1  # share of the diagonal's mean that is added to it
    learned: str | None = None  # spinquant's rotations, a file of `spinquant.save_learned`
    kv_bits: int = 16  # of cached keys and values; below 16 the value heads are rotated as well
    kv_dtype: str = "float16"  # the cache's 16-bit floats; "bfloat16" for numbers beyond 65504
    # None in both: 8, or 6 where `assign_bits` finds that better at equal bytes; None in one: 8.
    head_bits: int | None = None  # a tied head is the embedding: one may say it
    embedding_bits: int | None = None  # 16 in either leaves it as it is

    def __post_init__(self) -> None:
        for name, allowed in (("scheme", SCHEMES), ("method", METHODS), ("weights", WEIGHTS),
                              ("gptq_inputs", GPTQ_INPUTS), ("kv_dtype", KV_DTYPES)):
            value = getattr(self, name)
            if not isinstance(value, str) or value not in allowed:
                raise ValueError(f"{name}: expected one of {', '.join(allowed)}, found {value!r}")
        check_bits(self.bits)
        object.__setattr__(self, "bits", float(self.bits))
        _check_integer("group_size", self.group_size, 0)
        if self.group_size % 32:
            raise ValueError(
                f"group_size: expected 0 (per output channel) or a multiple of 32, "
                f"found {self.group_size}"
            )
        if self.calibration_tokens is None:  # as many as the rounding needs
            object.__setattr__(self, "calibration_tokens", DEFAULT_TOKENS[self.weights])
        _check_integer("calibration_tokens", self.calibration_tokens, 1)
        _check_integer("calibration_window", self.calibration_window, 1)
        _check_integer("seed", self.seed, 0)
        if self.clip is not None:
            check_clip(self.clip)
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
        _check_choice("kv_bits", self.kv_bits, KV_BITS)
        _check_choice("calibration_bits", self.calibration_bits, CALIBRATION_BITS)
        for name in ("head_bits", "embedding_bits"):
            if getattr(self, name) is not None:
                _check_choice(name, getattr(self, name), TABLE_BITS)
        _check_damping(self.gptq_damping)
        object.__setattr__(self, "gptq_damping", float(self.gptq_damping))

    @property
    def activation_bits(self) -> int:
        """4, 8 or 16."""
        return SCHEMES[self.scheme]

    @property
    def head_input_bits(self) -> int:
        """Of what meets a head of 8, 6 or 4 bits, with a scale for every 32 inputs of a token.

        24 are as good as float32. 16 add errors of 2e-3 to logits of 40.
        """
        return 24 if self.activation_bits == 16 else 8

    @property
    def activation_clip(self) -> float:
        """The clip that holds: the given one, or the scheme's default."""
        return DEFAULT_CLIP[self.scheme] if self.clip is None else self.clip

    @property
    def sample(self) -> tuple[int, int, int]:
        """What chooses the calibration windows of a text: how many tokens, their length, the seed.
        """
        return self.calibration_tokens, self.calibration_window, self.seed

    def ignores(self, linear: str) -> bool:
        """Whether the linear of that name (without .weight) stays as it is."""
        return any(fnmatch.fnmatchcase(linear, pattern) for pattern in self.ignore)

    @property
    def leaves_tables_open(self) -> bool:
        """Whether `assign_bits` may choose the bits of embedding and head: none were asked, and the
        linears can take the bits that these do without."""
        return self.bits > 4 and self.head_bits is None and self.embedding_bits is None

    def settled(self, tied: bool) -> QuantConfig:
        """The same with the bits of embedding and head as numbers, for a model whose head is the
        embedding (tied) or not. ValueError when two different numbers are asked of one table."""
        head, embedding = self.head_bits, self.embedding_bits
        if tied and None not in (head, embedding) and head != embedding:
            raise ValueError(f"embedding_bits: the model's head is its embedding, stored once: "
                             f"expected {head}, as head_bits, found {embedding}")
        if tied:
            head, embedding = (embedding if head is None else head,) * 2
        return dataclasses.replace(
            self, head_bits=DEFAULT_TABLE_BITS if head is None else head,
            embedding_bits=DEFAULT_TABLE_BITS if embedding is None else embedding)

    def table_bits(self, spec: Any) -> dict[str, int]:
        """Bits of embedding and head by name, without .weight, where they are below 16.

        spec: the ModelSpec. A tied head has no entry of its own. A table that a pattern of `ignore`
        names stays as it is; either name will do for a tied one.
        """
        config, kept = self.settled(spec.tied), [*map(self.ignores, (spec.embed, spec.head))]
        bits = {spec.embed: (config.embedding_bits, any(kept) if spec.tied else kept[0])}
        if not spec.tied:
            bits[spec.head] = (config.head_bits, kept[1])
        return {name: count for name, (count, stays) in bits.items() if count < 16 and not stays}

    def _repr_html_(self) -> str:
        default, names = QuantConfig(), [f.name for f in dataclasses.fields(self)]
        values = [getattr(self, name) for name in names]
        changed = [i for i, name in enumerate(names) if values[i] != getattr(default, name)]
        return table_html("QuantConfig", [["field", *names], ["value", *values]], left=2,
                          bold=changed, notes=["bold: not the default"] if changed else ())

    def to_json(self) -> dict[str, Any]:
        """A dict of JSON values; from_json() takes it back."""
        values = {**dataclasses.asdict(self), "ignore": list(self.ignore)}
        if self.kv_dtype == KV_DTYPES[0]:  # as before there was a choice
            del values["kv_dtype"]
        return values

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
    def from_file(cls, path: str | Path, given: Mapping[str, Any] | None = None) -> QuantConfig:
        """The recipe in a JSON file, or in a result's recipe.json; errors name the file.

        Values that are given besides win, and defaults that hang on others follow them.
        """
        values = read_json(Path(path), MAX_LISTING_BYTES)
        if isinstance(values.get("config"), dict):  # recipe.json also says what it was made from
            values = values["config"]
        try:
            own = cls.from_json(values)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        return cls.from_json({**values, **given}) if given else own


def _check_integer(name: str, value: Any, least: int) -> None:
    """ValueError unless value is an int (not a bool) of at least `least` and below 2^31."""
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**31:
        raise ValueError(
            f"{name}: expected an integer from {least} to {2**31 - 1}, found {value!r}"
        )


def _check_choice(name: str, value: Any, allowed: tuple[int, ...]) -> None:
    """ValueError unless value is an int among those."""
    if type(value) is not int or value not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(map(str, allowed))}, "
                         f"found {value!r}")


def check_bits(value: Any) -> None:
    """ValueError unless value is a number in [4, 8]."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 4.0 <= value <= 8.0:
        raise ValueError(f"bits: expected a number from 4 to 8, found {value!r}")


def check_clip(value: Any) -> None:
    """ValueError unless value is a number in (0, 1]."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0.0 < value <= 1.0:
        raise ValueError(f"clip: expected a number in (0, 1], found {value!r}")


def _check_damping(value: Any) -> None:
    """ValueError unless value is a number in [0, 1]."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0.0 <= value <= 1.0:
        raise ValueError(f"gptq_damping: expected a number in [0, 1], found {value!r}")
