# SPDX-License-Identifier: Apache-2.0
"""The linears of a torch model and what they read, recorded by forward hooks."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..sweep.bits import SAMPLE_TOKENS, relative_noise

PASS_BYTES = 1 << 30  # of inputs that one pass of the batches records, unless one site has more


@dataclass(eq=False)
class Found:
    """A linear of a model. Two modules whose input is one tensor in every call form a site."""

    names: tuple[str, ...]  # where the module lies; the first one is its name
    module: torch.nn.Module
    transposed: bool  # [k, n], as transformers' Conv1D has it
    calls: list[int] = field(default_factory=list)  # numbers of the tensors that it read
    rows: int = 0  # of all its inputs
    noise: float = 1.0  # relative_noise of the first input; 1 for inputs of no direction

    @property
    def name(self) -> str:
        """The first of its names."""
        return self.names[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(n, k)."""
        n, k = self.module.weight.shape
        return (k, n) if self.transposed else (n, k)

    def weight(self) -> NDArray[np.float32]:
        """The weight [n, k]; in place where it is float32 and not transposed."""
        weight = self.module.weight.detach()
        return array(weight.T if self.transposed else weight)

    def bias(self) -> NDArray[np.float32] | None:
        """The bias [n]."""
        return None if self.module.bias is None else array(self.module.bias)


@dataclass(frozen=True, eq=False)
class SharedInput:
    """Linears that read one tensor in every call."""

    linears: tuple[Found, ...]

    @property
    def k(self) -> int:
        """Inputs of each linear."""
        return self.linears[0].shape[1]

    @property
    def rows(self) -> int:
        """Rows that the batches gave."""
        return self.linears[0].rows


def array(tensor: torch.Tensor) -> NDArray[np.float32]:
    """The tensor in float32, contiguous; in place where it is so already."""
    return np.ascontiguousarray(tensor.detach().float().numpy())


def run(model: torch.nn.Module, batches: Sequence[Any]) -> None:
    """The model's forward on each batch: of a mapping by name, of a tuple or list by position."""
    with torch.no_grad():
        for batch in batches:
            if isinstance(batch, Mapping):
                model(**batch)
            elif isinstance(batch, (tuple, list)):
                model(*batch)
            else:
                model(batch)


@contextmanager
def hooked(
    linears: Sequence[Found], record: Callable[[Found, torch.Tensor], None]
) -> Iterator[None]:
    """While it is open, record(linear, input) is called before each call of a linear."""
    def hook(linear: Found) -> Any:
        def before(module: Any, args: Any, kwargs: Any) -> None:
            record(linear, args[0] if args else kwargs["x" if linear.transposed else "input"])
        return before

    handles = [linear.module.register_forward_pre_hook(hook(linear), with_kwargs=True)
               for linear in linears]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def find_sites(
    model: torch.nn.Module, batches: Sequence[Any], linears: Sequence[Found]
) -> list[SharedInput]:
    """The linears that the batches reach, by what they read; fills in rows and noise."""
    known: dict[int, tuple[weakref.ref[torch.Tensor], int, int]] = {}
    numbers = iter(range(1 << 62))

    def record(linear: Found, x: torch.Tensor) -> None:
        version = 0 if x.is_inference() else x._version
        reference, before, number = known.get(id(x), (lambda: None, 0, 0))
        if reference() is not x or before != version:  # of another tensor, or changed since
            number = next(numbers)
            known[id(x)] = weakref.ref(x), version, number
        if not linear.calls and x.numel():
            rows = x.reshape(-1, x.shape[-1])
            few = array(rows[:: max(1, -(-len(rows) // SAMPLE_TOKENS))])
            linear.noise = float(relative_noise(few, linear.weight()).mean())
        linear.calls.append(number)
        linear.rows += x.numel() // x.shape[-1]

    with hooked(linears, record):
        run(model, batches)
    sites: dict[tuple[int, ...], list[Found]] = {}
    for linear in linears:
        if linear.rows:
            sites.setdefault(tuple(linear.calls), []).append(linear)
    return [SharedInput(tuple(members)) for members in sites.values()]


def passes(sites: Sequence[SharedInput], limit: int) -> Iterator[list[SharedInput]]:
    """The sites in groups whose recorded inputs, at most `limit` rows each, have PASS_BYTES."""
    group: list[SharedInput] = []
    size = 0
    for site in sites:
        own = 4 * site.k * min(site.rows, limit)
        if group and size + own > PASS_BYTES:
            yield group
            group, size = [], 0
        group.append(site)
        size += own
    if group:
        yield group


def record_inputs(
    model: torch.nn.Module, batches: Sequence[Any], sites: Sequence[SharedInput], limit: int
) -> list[NDArray[np.float32]]:
    """The inputs [rows, k] of each site: at most `limit` rows, evenly spaced."""
    steps = [-(-site.rows // limit) for site in sites]
    inputs = [np.empty((-(-site.rows // step), site.k), np.float32)
              for site, step in zip(sites, steps, strict=True)]
    places = {site.linears[0]: i for i, site in enumerate(sites)}
    seen, kept = [0] * len(sites), [0] * len(sites)

    def record(linear: Found, x: torch.Tensor) -> None:
        i = places[linear]
        rows = x.reshape(-1, x.shape[-1])
        few = array(rows[-seen[i] % steps[i] :: steps[i]])
        if kept[i] + len(few) > len(inputs[i]):
            raise ValueError(f"{linear.name}: calibration: expected {linear.rows} rows as in the "
                             f"pass before, found more: the model's forward is not repeatable")
        inputs[i][kept[i] : kept[i] + len(few)] = few
        seen[i], kept[i] = seen[i] + len(rows), kept[i] + len(few)

    with hooked(list(places), record):
        run(model, batches)
    return [x[:count] for x, count in zip(inputs, kept, strict=True)]
