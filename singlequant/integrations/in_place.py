# SPDX-License-Identifier: Apache-2.0
"""`quantize_`: the linears of a torch model in memory become `Linear` modules."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .. import _C
from ..config import QuantConfig
from ..html import table_html
from ..methods.registry import METHODS, find_method
from ..methods.solve import config_int8_step, solve_site
from ..rotations import BlockRotation, SiteRotation
from ..statistics import SiteStatistics
from ..sweep.bits import Share, spend
from ..sweep.calibrate import site_statistics
from ..sweep.layer import gptq_factor, int8_inputs_of, quantize_linear
from ..weights import packing_problem
from .inputs import Found, SharedInput, find_sites, passes, record_inputs
from .linear import REQUIRED, Linear
from .saving import keep_savable

FOLDER_FIELDS = ("kv_bits", "kv_dtype", "head_bits", "embedding_bits", "learned")
# Modules of torch whose own forward reads the weights of the linears inside.
READERS = (torch.nn.TransformerEncoderLayer, torch.nn.TransformerDecoderLayer,
           torch.nn.MultiheadAttention)


@dataclass(frozen=True)
class Quantized:
    """A linear that became a `Linear`."""

    name: str
    shape: tuple[int, int]  # (n, k)
    bits: int  # of a weight
    nbytes: int  # of codes, scales and bias


@dataclass(frozen=True)
class Left:
    """A linear that stays as it is."""

    name: str
    shape: tuple[int, int]
    reason: str


@dataclass(frozen=True)
class Report:
    """What `quantize_` did."""

    config: QuantConfig
    linears: tuple[Quantized, ...]
    left: tuple[Left, ...]

    @property
    def bits(self) -> float:
        """Mean bits of a quantized weight, without scales; 0 where there is none."""
        weights = sum(n * k for n, k in (linear.shape for linear in self.linears))
        bits = sum(linear.bits * linear.shape[0] * linear.shape[1] for linear in self.linears)
        return bits / max(1, weights)

    def __str__(self) -> str:
        size = sum(linear.nbytes for linear in self.linears)
        lines = [f"{len(self.linears)} linears in {self.config.scheme}, {self.bits:.2f} bits a "
                 f"weight, {size / 1e6:.1f} MB; {len(self.left)} left as they are"]
        lines += [f"{linear.name}: {linear.shape[0]}x{linear.shape[1]}, {linear.bits} bits"
                  for linear in self.linears]
        lines += [f"{left.name}: left, {left.reason}" for left in self.left]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        every = (*self.linears, *self.left)
        shapes = [f"{n} x {k}" for n, k in (linear.shape for linear in every)]
        bits = [*(str(linear.bits) for linear in self.linears),
                *(f"left: {left.reason}" for left in self.left)]
        return table_html(
            f"{len(self.linears)} linears in {self.config.scheme}, {self.bits:.2f} bits a weight",
            [["linear", *(linear.name for linear in every)], ["shape", *shapes], ["bits", *bits]])


def quantize_(
    model: torch.nn.Module, calibration: Iterable[Any] | None = None,
    config: QuantConfig | None = None, ignore: Sequence[str] | None = None,
) -> Report:
    """Put 4-bit linears in the place of a model's torch.nn.Linear and transformers' Conv1D.

    calibration: batches as the model's forward takes them: mappings by name, tuples and lists by
    position, others as the one argument. They are kept while it runs, and the model's forward sees
    each several times. Of a linear's inputs, config.calibration_tokens rows are looked at, evenly
    spaced. Methods and roundings that look at inputs need them. config: the recipe (default:
    QuantConfig()). Its method rotates the inputs of each linear on its own, or of all that read one
    tensor; nothing is folded into other modules. ignore: patterns of names of linears that stay, in
    addition to config.ignore; by default the output head of a transformers model stays.

    The model is put in evaluation mode. What save_pretrained of a transformers model writes then
    comes back by from_pretrained, with `singlequant.integrations.transformers`. An error leaves its
    modules as they were. ValueError names the argument or the linear.
    """
    config = config or QuantConfig()
    batches = None if calibration is None else list(calibration)
    _check(model, config, batches)
    linears, left = find_linears(model, config, ignore)
    model.eval()
    if batches is None:
        sites = [SharedInput((linear,)) for linear in linears]
    else:
        sites = find_sites(model, batches, linears)
        left += [Left(linear.name, linear.shape, "no batch of the calibration reaches it")
                 for linear in linears if not linear.rows]
    bits = _bits(sites, config)
    made: dict[Found, Linear] = {}
    for group in passes(sites, config.calibration_tokens):
        inputs: list[NDArray[np.float32] | None] = [None] * len(group)
        if batches is not None:
            inputs[:] = record_inputs(model, batches, group, config.calibration_tokens)
        for i, site in enumerate(group):
            made.update(_site_linears(site, inputs[i], config, bits))
            inputs[i] = None
    for linear, module in made.items():
        for name in linear.names:
            replace_module(model, name, module)
    if made:
        keep_savable(model, config)
    done = {linear.name: Quantized(linear.name, linear.shape, module.packed.bits, module.nbytes)
            for linear, module in made.items()}
    order = [name for name, _ in model.named_modules() if name in done]
    return Report(config, tuple(done[name] for name in order), tuple(left))


def load_(model: torch.nn.Module, state: Mapping[str, Any]) -> None:
    """Load the state_dict of a model that `quantize_` changed into one that it has not changed.

    RuntimeError, as of load_state_dict, when they do not go together.
    """
    end = f".{REQUIRED[0]}"
    for name in [key.removesuffix(end) for key in state if key.endswith(end)]:
        n, k = (int(x) for x in state[f"{name}.{REQUIRED[2]}"][:2])
        try:
            replace_module(model, name, Linear(k, n, f"{name}.bias" in state))
        except AttributeError:
            raise RuntimeError(f"{name}: expected a module of that name in the model, found "
                               f"none") from None
    model.load_state_dict(state)
    keep_savable(model, None)
    model.eval()


def replace_module(model: torch.nn.Module, name: str, module: torch.nn.Module) -> None:
    """Put a module in the place of the one of that name; AttributeError where there is none."""
    parent, _, last = name.rpartition(".")
    owner = model.get_submodule(parent)
    owner.get_submodule(last)
    setattr(owner, last, module)


# ---- what is asked ------------------------------------------------------------------------------


def _check(model: Any, config: QuantConfig, batches: Sequence[Any] | None) -> None:
    """ValueError or TypeError for a config or a calibration that a model in memory cannot take."""
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, found {type(model).__name__}")
    row = find_method(config.method)
    if row.residual or row.trains:
        names = ", ".join(m.name for m in METHODS.values() if not m.residual and not m.trains)
        raise ValueError(f"method: expected one that works on each linear's inputs alone ({names}),"
                         f" found {config.method!r}")
    defaults = QuantConfig()
    for name in FOLDER_FIELDS:
        value, default = getattr(config, name), getattr(defaults, name)
        if value != default:
            raise ValueError(f"{name}: expected {default!r}, as only folders of decoders have it, "
                             f"found {value!r}")
    if batches is None and (row.looks or config.weights == "gptq"):
        blind = ", ".join(repr(m.name) for m in METHODS.values() if not m.looks)
        raise ValueError(f"calibration: expected batches for method {config.method!r} and weights "
                         f"{config.weights!r}, found none; without them: method {blind}, and "
                         f"weights 'rtn' or 'mse'")
    if batches is not None and not batches:
        raise ValueError("calibration: expected at least one batch, found none")


def find_linears(
    model: torch.nn.Module, config: QuantConfig, ignore: Sequence[str] | None
) -> tuple[list[Found], list[Left]]:
    """The linears that can be quantized, and those that cannot, each once."""
    head = getattr(model, "get_output_embeddings", lambda: None)() if ignore is None else None
    places: dict[torch.nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, torch.nn.Linear) or is_conv1d(module):
            places.setdefault(module, []).append(name)
    if any("" in names for names in places.values()):
        raise ValueError("model: expected a model that contains linears, found a linear")
    owners: dict[torch.Tensor, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(parameter, set()).add(name)
    linears, left = [], []
    for module, names in places.items():
        linear = Found(tuple(names), module, is_conv1d(module))
        patterns = (*config.ignore, *(ignore or ()))
        if any(fnmatch.fnmatchcase(name, p) for name in names for p in patterns):
            reason: str | None = "ignored"
        elif module is head:
            reason = "it is the model's output head"
        else:
            others = owners.get(module.weight, set()) - {f"{name}.weight" for name in names}
            reason = _problem(model, linear, config, sorted(others))
        if reason is None:
            linears.append(linear)
        else:
            left.append(Left(linear.name, linear.shape, reason))
    return linears, left


def is_conv1d(module: torch.nn.Module) -> bool:
    """Whether it is transformers' Conv1D, whose weight is [k, n]."""
    kind = type(module)
    return (kind.__module__, kind.__name__) == ("transformers.pytorch_utils", "Conv1D")


def _problem(
    model: torch.nn.Module, linear: Found, config: QuantConfig, others: Sequence[str]
) -> str | None:
    """Why a linear stays as it is, or None. others: parameters that are its weight as well."""
    module, (n, k) = linear.module, linear.shape
    kind = type(module)
    if kind is not torch.nn.Linear and not linear.transposed:
        return f"it is a {kind.__name__}, not a plain Linear"
    if module.weight.device.type != "cpu":
        return f"its weight is on {module.weight.device}, not on the CPU"
    if others:
        return f"its weight is also {others[0]}"
    if module._forward_hooks or module._forward_pre_hooks:
        return "it has hooks of its own"
    for name in linear.names:
        parts = name.split(".")
        for end in range(len(parts)):
            reader = model.get_submodule(".".join(parts[:end]))
            if isinstance(reader, READERS):
                return f"torch's {type(reader).__name__} reads its weight"
    if n < 1 or k < 1:
        return "it has no weights"
    limit = _C.PACKED_K_MAX_W8
    if k > limit:
        return f"the kernels take {limit} inputs at most, and it has {k}"
    return packing_problem(linear.name, k, config)


# ---- how they are quantized ---------------------------------------------------------------------


def _bits(sites: Sequence[SharedInput], config: QuantConfig) -> dict[str, int]:
    """Bits by linear, those with more than 4 alone: as `assign_bits`, but each linear counts by the
    relative error of its own output."""
    return spend({linear.name: Share(linear.noise, linear.shape[0] * linear.shape[1])
                  for site in sites for linear in site.linears}, config.bits)


def _site_linears(
    site: SharedInput, inputs: NDArray[np.float32] | None, config: QuantConfig,
    bits: Mapping[str, int],
) -> Iterator[tuple[Found, Linear]]:
    """The linears of a site with the modules that take their places. inputs: [rows, k]."""
    name = site.linears[0].name
    try:
        statistics = _statistics(site, inputs)
        rotation = solve_site(statistics, config.method, config.seed, config_int8_step(config))
        if rotation.is_identity:  # whatever else it says, there is nothing to take it
            rotation = None
        gptq = gptq_factor(statistics, rotation, config) if config.weights == "gptq" else None
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    del statistics
    for linear in site.linears:
        packed = quantize_linear(linear.weight(), rotation, config, linear.name, gptq,
                                 bits=bits.get(linear.name, 4))
        yield linear, _module(packed, linear, rotation, config)


def _statistics(site: SharedInput, inputs: NDArray[np.float32] | None) -> SiteStatistics:
    """What the method solves from. Without inputs a row of zeros stands there: nothing looks."""
    if inputs is None:
        inputs = np.zeros((1, site.k), np.float32)
    elif not np.isfinite(inputs).all():
        raise ValueError("inputs: expected finite numbers, found NaN or Inf")
    weights = [linear.weight() for linear in site.linears]
    return site_statistics(inputs, weights, keep_inputs=True, foldable=False)


def _module(
    packed: Any, linear: Found, rotation: SiteRotation | BlockRotation | None, config: QuantConfig
) -> Linear:
    core = None if rotation is None else rotation.core
    int8 = 0 if rotation is None else int8_inputs_of(rotation, config)
    return Linear.of(packed, linear.bias(), core, config.activation_bits, config.activation_clip,
                     int8)

