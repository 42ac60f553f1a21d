# SPDX-License-Identifier: Apache-2.0
"""The original model with other inputs for its sites, so that any transform and range can be tried.

Weights and activations are rounded to their grids, kept as float32 and multiplied in float32. The
rest of the model (norms, rotary embedding, attention, residual sums) is the package's NumPy twin of
a decoder layer, whose linears may be functions of their input: a function here transforms the
input, rounds it and multiplies it by rounded weights. So no decoder stands here, and every row of a
table goes the same way, whether the kernels have its options or not. What they have, this
reproduces: tests/test_experiments_simulation.py compares it with packed models. It is for small
models: all weights lie in memory in float32, several times.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import singlequant as sq
from singlequant import _C, methods
from singlequant._reference import runtime as twin
from singlequant.models.spec import NormSpec
from singlequant.runtime.layers import flat_positions, layer_blocks
from singlequant.weights import Norm

from .laboratory import Laboratory
from .rounding import Float32, Range, round_transformed
from .transforms import Site, Solver, Transform

Key = tuple[int, str]  # layer and site
HELDOUT_TOKENS = 256  # of the evaluated text, for peaks and output errors of each site
ROUNDINGS = ("rtn", "mse", "gptq")
Ranges = Range | Callable[["Transformed"], Mapping[Key, Range]]


@dataclass(frozen=True)
class Recipe:
    """One row: a transformation (of that name, for the cache), a rounding of weights, a range."""

    name: str
    transformation: str
    solver: Solver
    rounding: str
    ranges: Ranges


class Transformed:
    """A model's sites under one transformation; rounded weights are made once per rounding."""

    def __init__(self, experiment: Experiment, solver: Solver) -> None:
        self.experiment = experiment
        self.transforms = {key: solver(site) for key, site in experiment.sites.items()}
        self._weights: dict[str, dict[Key, list[Float32]]] = {}

    def float_weights(self, key: Key) -> list[Float32]:
        """A site's weights [n, k] in the transformed basis, not rounded."""
        return [self.transforms[key].weights(w) for w in self.experiment.sites[key].weights]

    def weights(self, rounding: str) -> dict[Key, list[Float32]]:
        """Every site's weights, rounded to 4 bits with one scale per output channel."""
        if rounding not in ROUNDINGS:
            raise ValueError(f"rounding: expected one of {', '.join(ROUNDINGS)}, got {rounding!r}")
        if rounding not in self._weights:
            self._weights[rounding] = {key: self._rounded(key, rounding)
                                       for key in self.transforms}
        return self._weights[rounding]

    def _rounded(self, key: Key, rounding: str) -> list[Float32]:
        weights = self.float_weights(key)
        if rounding != "gptq":
            search = rounding == "mse"
            return [_C.dequantize(*_C.quantize(w, 4, 0, True, 1.0, search)) for w in weights]
        inputs = self.transforms[key].inputs(self.experiment.sites[key].statistics.inputs)
        damping = sq.QuantConfig().gptq_damping
        factor = _C.gptq_factor(_C.gram(inputs), damping, False, True)
        return [_C.dequantize(*_C.gptq_round(w, *factor, 4, 0, True)) for w in weights]


class Experiment:
    """A laboratory's model, the calibration statistics of its sites, and their held-out inputs."""

    def __init__(
        self, model: Path, text: str, calibration: Path | None, windows: int, seq_len: int,
        tokens: int = 2048,
    ) -> None:
        self.laboratory = Laboratory(model, text, calibration, seq_len=seq_len, windows=windows)
        self.checkpoint, self.windows = self.laboratory.checkpoint, self.laboratory.windows
        if len(self.windows) < windows:
            raise ValueError(f"text: expected {windows} windows of {seq_len} tokens, found "
                             f"{len(self.windows)}")
        config = sq.QuantConfig(calibration_tokens=tokens)
        self.calibration = self.laboratory.calibration_windows(config)
        self._transformed: tuple[str, Transformed] | None = None

    def digest(self) -> str:
        """Of all that a row depends on: model, tokens, the code itself."""
        state = hashlib.sha256(self.checkpoint.fingerprint.encode())
        for array in (self.calibration, self.windows):
            state.update(str(array.shape).encode() + np.ascontiguousarray(array).tobytes())
        for folder in (Path(__file__).parent, Path(methods.__file__).parent):
            for source in sorted(folder.glob("*.py")):
                state.update(source.read_bytes())
        return state.hexdigest()[:16]

    @cached_property
    def norms(self) -> list[dict[str, Norm]]:
        """Each layer's norms by place, in float32."""
        return [{place: _widened(norm) for place, norm in self.checkpoint.layer(i).norms.items()}
                for i in range(self.checkpoint.spec.layers)]

    @cached_property
    def final_norm(self) -> Norm:
        """The norm in front of the head, in float32."""
        return _widened(self.checkpoint.final_norm)

    @cached_property
    def sites(self) -> dict[Key, Site]:
        """All sites by layer and name, from one run over each text."""
        found = {}
        runs = zip(sq.calibrate(self.checkpoint, self.calibration, keep_inputs=True),
                   sq.calibrate(self.checkpoint, self.windows, HELDOUT_TOKENS), strict=True)
        for known, held in runs:
            linears = self.checkpoint.layer(known.index).linears
            for name, site in self.checkpoint.spec.layer(known.index).sites.items():
                own = [linears[role] for role in site.roles]
                found[known.index, name] = Site(
                    known.index, name, known.sites[name],
                    tuple(_C.to_float32(np.ascontiguousarray(w.weight)) for w in own),
                    tuple(None if w.bias is None else _C.to_float32(w.bias) for w in own),
                    held.sites[name].sample,
                )
        return found

    def transformed(self, recipe: Recipe) -> Transformed:
        """The model under the recipe's transformation; the last one is kept."""
        if self._transformed is None or self._transformed[0] != recipe.transformation:
            self._transformed = None  # before its successor takes memory
            self._transformed = recipe.transformation, Transformed(self, recipe.solver)
        return self._transformed[1]

    def ranges(self, recipe: Recipe) -> Mapping[Key, Range]:
        """The recipe's range of each site."""
        if isinstance(recipe.ranges, Range):
            return dict.fromkeys(self.sites, recipe.ranges)
        return recipe.ranges(self.transformed(recipe))

    def divergence(self, recipe: Recipe) -> sq.Evaluation:
        """KL to the original and agreement on the windows."""
        found = self.transformed(recipe)
        model = RoundedModel(self, found.transforms, found.weights(recipe.rounding),
                          self.ranges(recipe))
        return self.laboratory.judge(model)


def _widened(norm: Norm) -> Norm:
    bias = None if norm.bias is None else _C.to_float32(norm.bias)
    return Norm(norm.name, _C.to_float32(norm.weight), bias)


# ---- the model ----------------------------------------------------------------------------------


class RoundedModel:
    """The original with every site's inputs and weights transformed and rounded; a `Scorer`.

    weights: of each site, rounded in the transformed basis, [n, k] float32 each.
    """

    def __init__(
        self, experiment: Experiment, transforms: Mapping[Key, Transform],
        weights: Mapping[Key, Sequence[Float32]], ranges: Mapping[Key, Range],
    ) -> None:
        self.experiment, self.spec = experiment, experiment.checkpoint.spec
        self.transforms, self.weights, self.ranges = transforms, weights, ranges

    def hidden_states(self, windows: NDArray[np.int64]) -> Float32:
        """Final hidden states [count, length, hidden], after the last norm."""
        spec, e = self.spec, self.experiment
        count, length = windows.shape
        sequence, position = flat_positions(np.full(count, length))
        hidden = _C.gather_rows(e.checkpoint.embedding, windows.reshape(-1)).astype(np.float64)
        for i, norms in enumerate(e.norms):
            layer = twin.DecoderLayer(**layer_blocks(spec.layer(i), norms, self._linears(i), {}))
            heads = spec.layer(i).attention
            cache = twin.KVCache(1, count, heads.kv_heads, heads.head_dim, length)
            layer.forward(hidden, sequence, position, cache, 0)
        final = twin.norm(hidden, _rule(spec.final_norm, e.final_norm))
        return final.astype(np.float32).reshape(count, length, spec.hidden)

    def logits(self, hidden: Float32) -> Float32:
        """Logits [..., vocab] of hidden states [..., hidden]; the head is the original's."""
        return _C.linear_dense(hidden, self.experiment.checkpoint.head)

    def site_inputs(self, key: Key, x: Float32) -> Float32:
        """A site's inputs [m, k], transformed and rounded; what a test may replace."""
        transform = self.transforms[key]
        return round_transformed(transform.inputs(x), transform.int8_inputs, self.ranges[key])

    def _linears(self, layer: int) -> dict[str, tuple[str, Callable[[NDArray], NDArray], Any]]:
        """The layer's linears as the twin takes them: (site, weight, bias) by role.

        A weight is a function of its site's float64 inputs [m, k]. The first one of a site rounds.
        """
        found = {}
        for name, site in self.spec.layer(layer).sites.items():
            products = self._products((layer, name))
            biases = self.experiment.sites[layer, name].biases
            for role, product, bias in zip(site.roles, products, biases, strict=True):
                found[role] = name, product, bias
        return found

    def _products(self, key: Key) -> list[Callable[[NDArray], NDArray]]:
        """A site's linears without their biases, as functions of its float64 inputs [m, k]."""
        last: dict[str, NDArray] = {}

        def product(x: NDArray, weight: Float32) -> NDArray:
            if last.get("x") is not x:  # the linears of a site read one array
                last.update(x=x, rounded=self.site_inputs(key, x.astype(np.float32)))
            return _C.linear_dense(last["rounded"], weight)

        return [partial(product, weight=weight) for weight in self.weights[key]]


def _rule(spec: NormSpec, norm: Norm) -> tuple[str, float, float, Float32, Float32 | None]:
    """A norm as the twin takes it."""
    return spec.kind, spec.eps, spec.offset, norm.weight, norm.bias


# ---- what a recipe costs ------------------------------------------------------------------------


def site_measures(experiment: Experiment, recipe: Recipe) -> dict[str, float | None]:
    """On held-out inputs of the original: peak and output_error, means over sites and linears.

    peak: mean over tokens of (max / rms)^2 of the inputs that get 4 bits.
    output_error: |Q(x) Q(W)^T - x W^T|^2 / |x W^T|^2.
    """
    found, ranges = experiment.transformed(recipe), experiment.ranges(recipe)
    weights, peaks, errors = found.weights(recipe.rounding), [], []
    for key, site in experiment.sites.items():
        transform = found.transforms[key]
        y = transform.inputs(site.heldout)
        if ranges[key].bits == 4:
            rest = y[:, transform.int8_inputs :]
            square = np.mean(rest**2, axis=1)
            live = square > 0
            peaks.append(np.mean(np.max(rest**2, axis=1)[live] / square[live]))
        y = round_transformed(y, transform.int8_inputs, ranges[key])
        for w, exact in zip(weights[key], site.outputs, strict=True):
            error = np.sum((_C.linear_dense(y, w) - exact) ** 2)
            errors.append(float(error / np.sum(exact**2)))
    return {"peak": float(np.mean(peaks)) if peaks else None,
            "output_error": float(np.mean(errors))}


def cost(experiment: Experiment, recipe: Recipe) -> dict[str, float]:
    """What the recipe asks of the inner loop and of the quantizer, from the model's shapes.

    passes, roundings: reads of a token's inputs by the quantizer, and roundings of each.
    accumulations: scaled sums per output, mean over all outputs (1: one integer sum, scaled
    once). products_8bit: share of the products that have an 8-bit activation. corrections:
    zero points that each sum needs, times the channel's code sums.
    bits: mean of the activations' bits over all inputs.
    """
    found, ranges = experiment.transformed(recipe), experiment.ranges(recipe)
    outputs = sums = products = int8_products = inputs = bits = 0
    for key, site in experiment.sites.items():
        r, leading, k = ranges[key], found.transforms[key].int8_inputs, site.heldout.shape[1]
        n = sum(len(w) for w in site.weights)
        at8 = k if r.bits == 8 else leading
        outputs, sums = outputs + n, sums + n * (bool(leading) + r.segments(k - leading))
        products, int8_products = products + n * k, int8_products + n * at8
        inputs, bits = inputs + k, bits + 4 * k + 4 * at8
    used = ranges.values()
    return {
        "passes": float(np.mean([r.passes for r in used])),
        "roundings": float(np.mean([r.roundings for r in used])),
        "accumulations": sums / outputs,
        "products_8bit": int8_products / products,
        "corrections": float(np.mean([r.asymmetric for r in used])),
        "bits": bits / inputs,
    }
