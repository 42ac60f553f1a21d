# SPDX-License-Identifier: Apache-2.0
"""EfficientQAT's first stage, a baseline: Chen et al., arXiv 2407.11062, section 3.2 (Block-AP).

All weights and scales of one decoder layer at a time are trained so that the rounded layer, on what
the rounded layers before it give, gives what the original one gives on original inputs: the mean
squared error, straight through the rounding, by Adam. The second stage, end-to-end training of the
scales, is left out. The paper trains on 4,096 windows of 2,048 tokens, with zero points; here the
calibration windows are all there is, and scales are symmetric as the packed format has them.
Needs the `torch` extra. Activations are not rounded while it trains, as published.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..checkpoint.trained import TrainedCheckpoint
from ..config import QuantConfig
from ..models.spec import tensor_name
from .spinquant_network import load_network

if TYPE_CHECKING:
    import torch

__all__ = ["STEPS", "TrainedBlocks", "prepare", "train_blocks"]

STEPS = 60  # of a layer
BATCH = 2  # windows of a step, as published
WEIGHT_RATE = 3e-3  # of a linear's rms, Adam's step of its weights: few steps, so larger than 1e-5
RANGE_RATE = 1e-3  # Adam's step of a scale, as a share of the range of the weights
RANGE_LEAST = 0.3  # a scale is at least so much of the range of the weights
LARGEST = 7  # code: a row's largest weight has it, so that rounding to nearest finds the scale


@dataclass(frozen=True, eq=False, repr=False)
class TrainedBlocks:
    """Weights on their grids, and what training them did.

    errors[layer]: the mean squared error of the layer's output over that of zeros, on all windows,
    rounded to nearest before training and after it.
    """

    weights: Mapping[str, NDArray[np.float32]]  # by linear, without .weight: [n, k]
    errors: NDArray[np.float64]  # [layers, 2]
    seconds: float

    def __repr__(self) -> str:
        before, after = self.errors.mean(axis=0)
        return f"TrainedBlocks({len(self.errors)} layers, error {before:.3g} -> {after:.3g})"


def prepare(checkpoint, config: QuantConfig, windows: NDArray[np.int64]) -> TrainedCheckpoint:
    """The checkpoint with weights trained on the windows, which its rounding leaves as they are.

    ImportError without torch.
    """
    try:
        found = train_blocks(checkpoint, windows, config.group_size, seed=config.seed)
    except ModuleNotFoundError as error:
        raise ImportError(f"method efficientqat trains with torch: pip install "
                          f"'singlequant[torch]' ({error})") from None
    return TrainedCheckpoint(checkpoint, found.weights, found.seconds)


def train_blocks(
    checkpoint,
    windows: NDArray[np.integer],
    group_size: int = 0,
    steps: int = STEPS,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> TrainedBlocks:
    """Train layer after layer on windows [count, length] of token ids.

    group_size: inputs that share a scale, 0 for all of a row. steps: of each layer; the seed draws
    their windows. progress(layers done, layers). ValueError for a family with experts, for windows
    of another shape, and when group_size does not divide a linear's inputs.
    """
    import torch

    begin = time.perf_counter()
    checkpoint.require_unquantized()
    spec = checkpoint.spec
    if any(kind.experts for kind in spec.kinds):
        raise ValueError(f"checkpoint: expected a family without experts, as no other is trained, "
                         f"found {spec.family}")
    windows = np.ascontiguousarray(windows, np.int64)
    if windows.ndim != 2 or windows.size == 0:
        raise ValueError(f"windows: expected (count, length) with tokens, found {windows.shape}")
    for i in range(spec.layers):
        checkpoint.require_finite(i)
    model = load_network(checkpoint)
    calls = _layer_calls(model, torch.from_numpy(windows[:1]))
    with torch.no_grad():
        exact = _first_inputs(model, torch.from_numpy(windows))
    rounded, weights, errors = exact, {}, []
    for i, (layer, arguments) in enumerate(calls):
        block = _Block(checkpoint, model, layer, arguments, i, group_size)
        with torch.no_grad():
            target = block.outputs(exact)
        before = block.error(rounded, target)
        block.train(rounded, target, steps, np.random.default_rng([seed, i]))
        errors.append((before, block.error(rounded, target)))
        with torch.no_grad():
            rounded, exact = block.outputs(rounded, block.rounded()), target
        weights |= block.arrays()
        if progress:
            progress(i + 1, spec.layers)
    return TrainedBlocks(weights, np.array(errors), time.perf_counter() - begin)


# ---- one layer ----------------------------------------------------------------------------------


class _Block:
    """A decoder layer of transformers whose linears have weights and ranges that are trained.

    A linear's grid: scale = range * max|w| / 7 of its row or group (a group's as a bfloat16), range
    in (0, 1], codes of -7 to 7. The largest weight of each has code 7 or -7, so that rounding to
    nearest finds the scale.
    """

    def __init__(self, checkpoint, model, layer, arguments, index: int, group: int) -> None:
        import torch

        self.layer, self.arguments = layer, arguments
        self.rows = {}  # (module's name in the layer) -> [(linear, first row, rows)]
        names = {module: name for name, module in layer.named_modules()}
        for row in checkpoint.spec.layer(index).linears.values():
            if group and row.k % group:
                raise ValueError(f"group_size: expected a divisor of {row.at(index)}'s {row.k} "
                                 f"inputs, found {group}")
            stored = tensor_name(row.stored or row.name, index).removesuffix(".weight")
            key = f"{names[model.get_submodule(stored)]}.weight"
            self.rows.setdefault(key, []).append((row.at(index), row.first_row, row.n))
        parameters = dict(layer.named_parameters())
        self.weights = {key: parameters[key].detach().clone() for key in self.rows}
        self.group = group
        self.ranges = {key: torch.ones(w.shape[0], w.shape[1] // (group or w.shape[1]), 1)
                       for key, w in self.weights.items()}

    def outputs(
        self, hidden: torch.Tensor, weights: Mapping[str, torch.Tensor] | None = None
    ) -> torch.Tensor:
        """The layer's output [count, length, hidden]; weights: in place of its own."""
        import torch

        found = torch.func.functional_call(self.layer, weights or {}, (hidden,), self.arguments)
        return found if isinstance(found, torch.Tensor) else found[0]

    def rounded(self) -> dict[str, torch.Tensor]:
        """The weights on their grids; gradients pass the rounding unchanged."""
        return {key: self._rounded(weight, self.ranges[key])
                for key, weight in self.weights.items()}

    def _rounded(self, weight: torch.Tensor, ranges: torch.Tensor) -> torch.Tensor:
        grid = weight.reshape(len(weight), ranges.shape[1], -1)
        scale = ranges * (grid.detach().abs().amax(dim=-1, keepdim=True) / LARGEST)
        if self.group:  # as the packed format stores it
            scale = scale + (scale.bfloat16().float() - scale).detach()
        scale = scale + (scale == 0)  # rows of zeros
        steps = (grid / scale).clamp(-LARGEST, LARGEST)
        codes = steps + (steps.round() - steps).detach()
        return (codes * scale).reshape(weight.shape)

    def error(self, inputs: torch.Tensor, target: torch.Tensor) -> float:
        """Squared error of the rounded layer's output over that of zeros."""
        import torch

        with torch.no_grad():
            difference = self.outputs(inputs, self.rounded()) - target
        return float(difference.square().sum() / target.square().sum())

    def train(
        self, inputs: torch.Tensor, target: torch.Tensor, steps: int, rng: np.random.Generator
    ) -> None:
        """So many steps of Adam whose rates fall to 0; the best state of four probes is kept."""
        import torch

        rates = []
        for weight in self.weights.values():
            rate = WEIGHT_RATE * float(weight.square().mean().sqrt())
            rates.append({"params": [weight.requires_grad_()], "lr": rate})
        rates.append({"params": [r.requires_grad_() for r in self.ranges.values()],
                      "lr": RANGE_RATE})
        optimizer = torch.optim.Adam(rates, betas=(0.9, 0.95))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: 1 - s / max(1, steps))
        best = self.error(inputs, target), self._state()
        for number in range(steps):
            chosen = rng.choice(len(inputs), min(BATCH, len(inputs)), replace=False)
            loss = (self.outputs(inputs[chosen], self.rounded()) - target[chosen]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                for ranges in self.ranges.values():
                    ranges.clamp_(RANGE_LEAST, 1.0)
            if number % -(-steps // 4) == -(-steps // 4) - 1 or number + 1 == steps:
                best = min(best, (self.error(inputs, target), self._state()), key=lambda s: s[0])
        self.weights, self.ranges = best[1]

    def _state(self) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        return tuple({key: value.detach().clone() for key, value in part.items()}
                     for part in (self.weights, self.ranges))

    def arrays(self) -> dict[str, NDArray[np.float32]]:
        """The rounded weights by linear, without .weight."""
        found = {}
        for key, weight in self.rounded().items():
            array = weight.detach().numpy()
            for name, first, rows in self.rows[key]:
                found[name] = np.ascontiguousarray(array[first : first + rows])
        return found


# ---- the model around it ------------------------------------------------------------------------


def _layer_calls(model, tokens: torch.Tensor) -> list[tuple[Any, dict[str, Any]]]:
    """(layer, keyword arguments) of each decoder layer, as the model calls it on one window."""
    import torch

    calls, hooks = [], []
    for layer in model.base_model.layers:
        hooks.append(layer.register_forward_pre_hook(
            lambda module, args, kwargs: calls.append((module, dict(kwargs))), with_kwargs=True))
    try:
        with torch.no_grad():
            model.base_model(tokens, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return calls


class _Reached(Exception):
    """Ends a forward pass in front of the first layer."""


def _first_inputs(model, tokens: torch.Tensor) -> torch.Tensor:
    """What the first decoder layer reads, [count, length, hidden]."""
    found = []

    def stop(module, args, kwargs):
        found.append(args[0] if args else kwargs["hidden_states"])
        raise _Reached

    hook = model.base_model.layers[0].register_forward_pre_hook(stop, with_kwargs=True)
    try:
        model.base_model(tokens, use_cache=False)
    except _Reached:
        pass
    finally:
        hook.remove()
    return found[0]
