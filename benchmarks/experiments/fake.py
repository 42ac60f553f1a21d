# SPDX-License-Identifier: Apache-2.0
"""A fake-quantized forward, so that options which the kernels do not have can be measured too.

Weights and activations are rounded to their grids, kept as float32 and multiplied in float32; all
else (norms, rotary embedding, attention, head) is that of the original. What the kernels do have,
this reproduces: tests/test_experiments_fake.py compares it with packed models. For small models of
the LLaMA kind: all weights lie in memory in float32, several times.

Words: a *site* is the linears that share an input; a `Transform` is what happens to it before
rounding, a `Range` how the scale of its codes is chosen, a `Recipe` one row of a table.
"""

from __future__ import annotations

import argparse
import csv
import fnmatch
import hashlib
import importlib
import importlib.util
import io
import json
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import singlequant as sq
from singlequant import _C
from singlequant.config import INT8_STEP, SITES
from singlequant.files import write_file
from singlequant.methods import axes, balanced
from singlequant.methods.axes import SWEEP_ROUNDS, WEIGHT_SHARE
from singlequant.models.family import ModelShape, rope_frequencies
from singlequant.rotations import FACTOR_DENSE_MAX, SiteRotation
from singlequant.statistics import SiteStatistics
from singlequant.study.evaluate import CachedScorer, split_windows
from singlequant.sweep.texts import bundled_model, bundled_text, calibration_windows, read_text

# `singlequant.rotate` is a function once the package is imported whole; this is the stage.
rotate = importlib.import_module("singlequant.methods.solve")

Float32 = NDArray[np.float32]
Key = tuple[int, str]  # layer and site
QUERIES = 128  # of one head at a time: their scores stay in a cache
HELDOUT_TOKENS = 256  # of the evaluated text, for peaks and output errors of each site
ROUNDINGS = ("rtn", "mse", "gptq")


# ---- activations: the range of the quantizer ----------------------------------------------------


@dataclass(frozen=True)
class Range:
    """How a token's scale is chosen. Units of clip, rms and search: see `round_inputs`."""

    clip: float = 1.0
    asymmetric: bool = False
    rms: float = 0.0  # 0: the scale is the maximum's
    search: tuple[float, ...] = ()  # instead of clip, the ratio of least squared error
    group: int = 0  # inputs that share a scale; 0 = all
    bits: int = 4

    def segments(self, k: int) -> int:
        """Scales of k inputs."""
        return -(-k // self.group) if self.group else 1

    @property
    def passes(self) -> int:
        """Times that the quantizer reads a token: for its range, the search's errors, its codes."""
        return 3 if self.search else 2

    @property
    def roundings(self) -> int:
        """Times that an input is rounded."""
        return 1 + len(self.search)


HIGH = Range(bits=8)  # of the block of inputs that keep 8 bits, as in the kernels


def round_inputs(x: Float32, r: Range) -> Float32:
    """Transformed inputs x [m, k] after the quantizer, in float32.

    The largest code stands for clip * max|x| (asymmetric: the codes' span for clip * (max - min),
    zero included), for r.rms root mean squares of the row but max|x| at most, or for that one of
    r.search * max|x| with the least squared error. A last group may be shorter than the others.
    """
    if r.group:
        m, k = x.shape
        padded = np.pad(x, ((0, 0), (0, -k % r.group)))  # zeros widen no range
        rows = round_inputs(padded.reshape(-1, r.group), replace(r, group=0))
        return np.ascontiguousarray(rows.reshape(m, -1)[:, :k])
    if r.rms:
        return _round_to_rms(x, r)
    if not r.search:
        return _C.dequantize(*_C.quantize(x, r.bits, 0, not r.asymmetric, r.clip))
    best, least = None, None
    for ratio in r.search:
        y = _C.dequantize(*_C.quantize(x, r.bits, 0, not r.asymmetric, ratio))
        error = y - x
        error = np.einsum("mk,mk->m", error, error)
        if best is None:
            best, least = y, error
        else:
            better = error < least
            best[better] = y[better]
            least = np.minimum(error, least)
    return best


def _round_to_rms(x: Float32, r: Range) -> Float32:
    half = 2 ** (r.bits - 1)
    rms = np.sqrt(np.einsum("mk,mk->m", x, x) / x.shape[1])
    scale = np.minimum(r.rms * rms, np.abs(x).max(axis=1))[:, None] / np.float32(half - 1)
    scale = np.where(scale > 0, scale, 1).astype(np.float32)
    codes = x / scale
    np.clip(np.rint(codes, out=codes), -half, half - 1, out=codes)
    return codes * scale


# ---- transformations of a site ------------------------------------------------------------------


def kronecker(x: Float32, left: Float32, right: Float32) -> Float32:
    """x [m, k1 * k2] -> left X right^T row by row, for factors that need not be orthogonal."""
    tokens = x.reshape(-1, len(left), len(right))
    return (left @ tokens @ right.T).reshape(x.shape)


@dataclass(frozen=True, eq=False)
class Transform:
    """X [k1, k2] -> left (X / balance) right^T; a weight's rows go the inverse transposed way.

    left and right need not be orthogonal: left_w and right_w are their inverse transposes.
    """

    balance: Float32  # [k]
    left: Float32  # [k1, k1]
    right: Float32  # [k2, k2]
    left_w: Float32
    right_w: Float32
    high: int = 0  # leading inputs, after the transformation, that keep 8 bits

    def inputs(self, x: Float32) -> Float32:
        """Tokens x [m, k] as they meet the quantizer."""
        return kronecker(x / self.balance, self.left, self.right)

    def weights(self, w: Float32) -> Float32:
        """Weights w [n, k] as they are rounded."""
        return kronecker(w * self.balance, self.left_w, self.right_w)

    @staticmethod
    def of(rotation: SiteRotation, axes: AxisBalance | None = None) -> Transform:
        """A rotation of the package, behind a balance of whole axes where there is one.

        ValueError for a rotation that is no Kronecker product, or too large to be kept dense.
        """
        if not isinstance(rotation, SiteRotation) or max(rotation.sizes) > FACTOR_DENSE_MAX:
            raise ValueError(f"rotation: expected Kronecker factors of order {FACTOR_DENSE_MAX} "
                             f"at most, found {rotation!r}")
        left, right = rotation.left.matrix(), rotation.right.matrix()
        balance = np.ones(rotation.k) if rotation.balance is None else rotation.balance
        a = axes or AxisBalance(*(np.eye(n) for n in (*rotation.sizes, *rotation.sizes)))
        sides = (left @ a.left, right @ a.right, left @ a.left_w, right @ a.right_w)
        return Transform(np.asarray(balance, np.float32),
                         *(np.ascontiguousarray(s, np.float32) for s in sides),
                         rotation.int8_inputs)


@dataclass(frozen=True, eq=False)
class AxisBalance:
    """A matrix per axis for inputs, and its inverse transpose for weights."""

    left: NDArray[np.float64]
    right: NDArray[np.float64]
    left_w: NDArray[np.float64]
    right_w: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Site:
    """What is known of one site: its statistics with inputs, its weights, held-out inputs."""

    layer: int
    name: str
    statistics: SiteStatistics
    weights: tuple[Float32, ...]  # [n, k] each
    biases: tuple[Float32 | None, ...]
    heldout: Float32  # [tokens, k]

    @cached_property
    def outputs(self) -> list[Float32]:
        """The original's outputs, without bias, for the held-out inputs: [tokens, n] each."""
        return [_C.linear_dense(self.heldout, w) for w in self.weights]


Solver = Callable[[Site], Transform]


def named(method: str) -> Solver:
    """The transformation of one of the package's methods."""
    return lambda site: Transform.of(rotate.solve_site(site.statistics, method))


def balance_of(site: Site, power: float) -> Float32:
    """[k] (rms_x / rms_W)^power, geometric mean 1; 0.5 is method `balanced`'s."""
    half = balanced.balance(site.statistics)
    return (half ** (2 * power)).astype(np.float32)


def built(
    build: Callable[[Any], None],
    power: float = 0.0,
    axes: Callable[[SiteStatistics, Float32, Float32], AxisBalance] | None = None,
) -> Solver:
    """`build` of rotate's axes, behind a balance per channel and one per axis.

    axes(statistics, inputs, weights) gets both after the balance per channel.
    """

    def solve(site: Site) -> Transform:
        statistics, found = site.statistics, None
        balance = balance_of(site, power)
        if power:
            statistics = replace(statistics, sample=statistics.sample / balance,
                                 weights=statistics.weights * balance)
        if axes is not None:
            found = axes(statistics, site.statistics.inputs / balance,
                         np.concatenate(site.weights) * balance)
            sides = [np.ascontiguousarray(a, np.float32)
                     for a in (found.left, found.right, found.left_w, found.right_w)]
            statistics = replace(statistics, sample=kronecker(statistics.sample, *sides[:2]),
                                 weights=kronecker(statistics.weights, *sides[2:]))
        rotation = rotate.solve_site(statistics, build)
        return Transform.of(replace(rotation, balance=balance), found)

    return solve


def high_count(k1: int, k2: int, share: float) -> int:
    """Directions of the first axis in so large a block of 8 bits: whole ones of INT8_STEP inputs.

    ValueError when there is no such block in the first half.
    """
    step = int(np.lcm(k2, INT8_STEP)) // k2
    count = max(1, round(share * k1 / step)) * step
    if 2 * count > k1:
        raise ValueError(f"share: expected room for {count} of {k1} directions in the first half")
    return count


def principal(share: float, rounds: int = SWEEP_ROUNDS) -> Callable[[Any], None]:
    """Build of method `balanced` with another share of the directions at 8 bits."""

    def build(site: Any) -> None:
        count = high_count(site.k1, site.k2, share)
        gram = _C.axis_gram(site.statistics.sample, site.k1, site.k2)
        directions = _C.principal_directions(gram)
        parts = ((0, count), (count, site.k1))
        site.normalize(WEIGHT_SHARE)
        mixed = [_C.hadamard_transform(directions[a:b].T).T for a, b in parts]
        site.apply_matrix("principal directions", 0, np.concatenate(mixed))
        site.apply_hadamard(1)
        for _ in range(rounds):
            for part in parts:
                site.sweep(0, *part)
            site.sweep(1)
        site.int8_inputs = count * site.k2

    return build


# ---- the model ----------------------------------------------------------------------------------


class FakeModel:
    """A LLaMA decoder in NumPy whose sites are transformed and rounded; a `Scorer`.

    weights: of each site, rounded in the transformed basis, [n, k] each.
    """

    def __init__(
        self,
        experiment: Experiment,
        transforms: Mapping[Key, Transform],
        weights: Mapping[Key, Sequence[Float32]],
        ranges: Mapping[Key, Range],
    ) -> None:
        self.experiment, self.shape = experiment, experiment.checkpoint.shape
        self.transforms, self.weights, self.ranges = transforms, weights, ranges

    def hidden_states(self, windows: NDArray[np.int64]) -> Float32:
        """Final hidden states [count, length, hidden], after the last norm."""
        shape, e = self.shape, self.experiment
        count, length = windows.shape
        rope = rope_tables(shape, length)
        h = _C.gather_rows(e.checkpoint.embedding, windows.reshape(-1))
        for i, (norm1, norm2) in enumerate(e.norms):
            q, k, v = self._linears(i, "qkv", _C.rms_norm(h, norm1, shape.rms_eps))
            attended = attention(q, k, v, shape, count, rope)
            h = h + self._linears(i, "o", attended)[0]
            gate, up = self._linears(i, "gate_up", _C.rms_norm(h, norm2, shape.rms_eps))
            h = h + self._linears(i, "down", silu(gate) * up)[0]
        final = _C.rms_norm(h, e.final_norm, shape.rms_eps)
        return final.reshape(count, length, shape.hidden)

    def logits(self, hidden: Float32) -> Float32:
        """Logits [..., vocab] of hidden states [..., hidden]; the head is the original's."""
        return _C.linear_dense(hidden, self.experiment.checkpoint.head)

    def _linears(self, layer: int, site: str, x: Float32) -> list[Float32]:
        key = layer, site
        y = rounded_site(x, self.transforms[key], self.ranges[key])
        pairs = zip(self.weights[key], self.experiment.sites[key].biases, strict=True)
        outputs = ((_C.linear_dense(y, w), bias) for w, bias in pairs)
        return [out if bias is None else out + bias for out, bias in outputs]


def rounded_site(x: Float32, transform: Transform, r: Range) -> Float32:
    """A site's inputs x [m, k], transformed and rounded: the block of 8 bits and the rest."""
    return round_transformed(transform.inputs(x), transform.high, r)


def round_transformed(y: Float32, high: int, r: Range) -> Float32:
    """Transformed inputs y [m, k], the leading `high` at 8 bits and the others by r."""
    if not high:
        return round_inputs(y, r)
    head, rest = (np.ascontiguousarray(part) for part in (y[:, :high], y[:, high:]))
    return np.concatenate([round_inputs(head, HIGH), round_inputs(rest, r)], axis=1)


def silu(x: Float32) -> Float32:
    """x / (1 + e^-x), without overflow."""
    return x * (np.float32(0.5) * (np.tanh(np.float32(0.5) * x) + np.float32(1)))


def rope_tables(shape: ModelShape, length: int) -> tuple[Float32, Float32]:
    """(cos, sin) [length, head_dim / 2] of positions 0 .. length - 1."""
    frequencies, scale = rope_frequencies(shape)
    angle = np.arange(length)[:, None] * frequencies.astype(np.float64)
    return (scale * np.cos(angle)).astype(np.float32), (scale * np.sin(angle)).astype(np.float32)


def attention(
    q: Float32, k: Float32, v: Float32, shape: ModelShape, count: int,
    rope: tuple[Float32, Float32],
) -> Float32:
    """Causal attention of flat q [m, heads * d], k and v [m, kv_heads * d], m = count * length."""
    d, length = shape.head_dim, len(rope[0])
    shared = shape.heads // shape.kv_heads

    def heads(x: Float32) -> Float32:
        return np.ascontiguousarray(x.reshape(count, length, -1, d).transpose(0, 2, 1, 3))

    def turned(x: Float32) -> Float32:
        a, b = x[..., : d // 2], x[..., d // 2 :]
        cos, sin = rope
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)

    q, k, v = turned(heads(q)) * np.float32(d**-0.5), turned(heads(k)), heads(v)
    back = np.arange(length)[:, None] - np.arange(length)  # how far each key lies behind a query
    hidden = (back < 0) | ((back >= shape.sliding_window) if shape.sliding_window else False)
    mask = np.where(hidden, np.float32(-np.inf), np.float32(0))
    out = np.empty((count, length, shape.heads, d), np.float32)
    for c in range(count):
        for head in range(shape.heads):
            values = np.ascontiguousarray(v[c, head // shared].T)
            for first in range(0, length, QUERIES):
                last = min(first + QUERIES, length)  # and no key behind the last query
                scores = _C.linear_dense(q[c, head, first:last], k[c, head // shared, :last])
                scores += mask[first:last, :last]
                scores -= scores.max(axis=1, keepdims=True)
                np.exp(scores, out=scores)
                scores /= scores.sum(axis=1, keepdims=True)
                mixed = _C.linear_dense(scores, np.ascontiguousarray(values[:, :last]))
                out[c, first:last, head] = mixed
    return out.reshape(count * length, -1)


# ---- experiments --------------------------------------------------------------------------------


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
    """One model, its calibration statistics, and the windows of text that it is judged on."""

    def __init__(
        self, model: str | Path, text: str | Path | None, calibration: str | Path | None,
        windows: int, seq_len: int, tokens: int = 2048,
    ) -> None:
        config = sq.QuantConfig(calibration_tokens=tokens)
        self.checkpoint = sq.load_checkpoint(model)
        self.checkpoint.require_unquantized()
        self.calibration = calibration_windows(self.checkpoint, config, calibration)
        ids = self.checkpoint.encode(bundled_text("heldout") if text is None else read_text(text))
        self.windows = split_windows(ids, seq_len)[:windows]
        if len(self.windows) < windows:
            raise ValueError(f"text: expected {windows} windows of {seq_len} tokens, found "
                             f"{len(self.windows)}")
        self._transformed: tuple[str, Transformed] | None = None

    def digest(self, command: str | Path) -> str:
        """Of all that a row of that command's file depends on: model, tokens, the code itself."""
        state = hashlib.sha256(self.checkpoint.fingerprint.encode())
        for array in (self.calibration, self.windows):
            state.update(str(array.shape).encode() + np.ascontiguousarray(array).tobytes())
        for source in (__file__, command, rotate.__file__, axes.__file__, balanced.__file__):
            state.update(Path(source).read_bytes())
        return state.hexdigest()[:16]

    @cached_property
    def reference(self) -> CachedScorer:
        """The original, run by the package; its states are kept."""
        return CachedScorer(sq.load(self.checkpoint.path))

    @cached_property
    def norms(self) -> list[tuple[Float32, Float32]]:
        """Both norms' weights of each layer."""
        layers = range(self.checkpoint.spec.layers)
        return [tuple(_C.to_float32(n) for n in self.checkpoint.layer(i).norms) for i in layers]

    @cached_property
    def final_norm(self) -> Float32:
        return _C.to_float32(self.checkpoint.final_norm)

    @cached_property
    def sites(self) -> dict[Key, Site]:
        """All sites by layer and name, from one run over each text."""
        found, roles = {}, self.checkpoint.architecture.sites
        runs = zip(sq.calibrate(self.checkpoint, self.calibration, keep_inputs=True),
                   sq.calibrate(self.checkpoint, self.windows, HELDOUT_TOKENS), strict=True)
        for known, held in runs:
            linears = self.checkpoint.layer(known.index).linears
            for name in SITES:
                own = [linears[role] for role in roles[name]]
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
        model = FakeModel(self, found.transforms, found.weights(recipe.rounding),
                          self.ranges(recipe))
        return sq.evaluate(model, self.windows.reshape(-1), self.windows.shape[1], self.reference)

    def site_measures(self, recipe: Recipe) -> dict[str, float | None]:
        """On held-out inputs of the original: peak and output_error, means over sites and linears.

        peak: mean over tokens of (max / rms)^2 of the inputs that get 4 bits.
        output_error: |Q(x) Q(W)^T - x W^T|^2 / |x W^T|^2.
        """
        found, ranges = self.transformed(recipe), self.ranges(recipe)
        weights, peaks, errors = found.weights(recipe.rounding), [], []
        for key, site in self.sites.items():
            transform = found.transforms[key]
            y = transform.inputs(site.heldout)
            if ranges[key].bits == 4:
                rest = y[:, transform.high :]
                square = np.mean(rest**2, axis=1)
                live = square > 0
                peaks.append(np.mean(np.max(rest**2, axis=1)[live] / square[live]))
            y = round_transformed(y, transform.high, ranges[key])
            for w, exact in zip(weights[key], site.outputs, strict=True):
                error = np.sum((_C.linear_dense(y, w) - exact) ** 2)
                errors.append(float(error / np.sum(exact**2)))
        return {"peak": float(np.mean(peaks)) if peaks else None,
                "output_error": float(np.mean(errors))}

    def cost(self, recipe: Recipe) -> dict[str, float]:
        """What the recipe asks of the inner loop and of the quantizer, from the model's shapes.

        passes, roundings: reads of a token's inputs by the quantizer, and roundings of each.
        accumulations: scaled sums per output, mean over all outputs (1: one integer sum, scaled
        once). products_8bit: share of the products that have an 8-bit activation. corrections:
        zero points that each sum needs, times the channel's code sums.
        bits: mean of the activations' bits over all inputs.
        """
        found, ranges = self.transformed(recipe), self.ranges(recipe)
        outputs = sums = products = high_products = inputs = bits = 0
        for key, site in self.sites.items():
            r, high, k = ranges[key], found.transforms[key].high, site.heldout.shape[1]
            n = sum(len(w) for w in site.weights)
            at8 = k if r.bits == 8 else high
            outputs, sums = outputs + n, sums + n * (bool(high) + r.segments(k - high))
            products, high_products = products + n * k, high_products + n * at8
            inputs, bits = inputs + k, bits + 4 * k + 4 * at8
        used = ranges.values()
        return {
            "passes": float(np.mean([r.passes for r in used])),
            "roundings": float(np.mean([r.roundings for r in used])),
            "accumulations": sums / outputs,
            "products_8bit": high_products / products,
            "corrections": float(np.mean([r.asymmetric for r in used])),
            "bits": bits / inputs,
        }


# ---- commands -----------------------------------------------------------------------------------


BASELINE = Recipe("hadamard, rtn", "hadamard", named("hadamard"), "rtn", Range())


def parser(description: str) -> argparse.ArgumentParser:
    """The arguments that both commands take."""
    p = argparse.ArgumentParser(description=description,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model", nargs="?", type=Path, default=bundled_model(),
                   help="a save_pretrained folder (default: the bundled model)")
    p.add_argument("--text", type=Path, help="text to judge on (default: bundled)")
    p.add_argument("--calibration", type=Path, help="calibration text (default: bundled)")
    p.add_argument("--windows", type=int, default=6, help="windows of the text (default: 6)")
    p.add_argument("--seq-len", type=int, default=512, help="tokens of a window (default: 512)")
    p.add_argument("--only", metavar="PATTERN", help="rows whose name matches (fnmatch)")
    p.add_argument("--out", type=Path, metavar="DIR",
                   help="write DIR/NAME.json, .csv, .md; finished rows in NAME.jsonl are kept")
    p.add_argument("--quick", action="store_true", help="few tokens: does it run?")
    return p


def open_experiment(arguments: argparse.Namespace) -> Experiment:
    """The experiment of parsed arguments; --quick takes 2 windows of 64 and 512 tokens."""
    for name in ("windows", "seq_len"):
        if getattr(arguments, name) < 1:
            option = name.replace("_", "-")
            raise ValueError(f"--{option}: expected at least 1, got {getattr(arguments, name)}")
    windows, seq_len = (2, 64) if arguments.quick else (arguments.windows, arguments.seq_len)
    return Experiment(arguments.model, arguments.text, arguments.calibration, windows, seq_len,
                      512 if arguments.quick else 2048)


def choose(recipes: Sequence[Recipe], only: str | None) -> list[Recipe]:
    """The recipes whose name matches, the baseline first in any case."""
    chosen = [r for r in recipes if only is None or fnmatch.fnmatchcase(r.name, only)]
    if not chosen:
        raise ValueError(f"--only: expected a pattern that matches a row, got {only!r}")
    return [BASELINE, *(r for r in chosen if r != BASELINE and r.name != BASELINE.name)]


def run_rows(
    command: str | Path,
    title: str,
    recipes: Sequence[Recipe],
    measure: Callable[[Experiment, Recipe], dict[str, Any]],
    arguments: argparse.Namespace,
) -> list[dict[str, Any]]:
    """Measure the chosen recipes, print and write the table of a command's file; returns its rows.

    Each row is measure()'s, its KL and agreement, and `ratio`, its KL over the baseline's. Rows of
    the same model, tokens and code that DIR/NAME.jsonl holds are not measured again.
    """
    name = Path(command).stem
    common = _benchmarks_common()
    environment, experiment = common.environment(), open_experiment(arguments)
    common.print_environment(environment)
    chosen, log = choose(recipes, arguments.only), None
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        log = arguments.out / f"{name}.jsonl"
    digest = experiment.digest(command)
    done = _finished(log, digest)
    rows = []
    for recipe in chosen:
        row = done.get(recipe.name)
        if row is None:
            start, cpu = time.perf_counter(), time.process_time()
            result = experiment.divergence(recipe)
            row = {"name": recipe.name, "kl": result.kl_mean, "top1": result.top1_agreement,
                   **measure(experiment, recipe)}
            row |= {"seconds": time.perf_counter() - start,
                    "cpu_seconds": time.process_time() - cpu}
            if log is not None:
                with log.open("a") as file:
                    file.write(json.dumps({"digest": digest, **row}) + "\n")
        rows.append(row)
        print(f"{row['name']:<58} KL {row['kl']:.5f}  {row['kl'] / rows[0]['kl']:.3f}  "
              f"{row['cpu_seconds']:.1f} s", flush=True)
    rows = [{**row, "ratio": row["kl"] / rows[0]["kl"]} for row in rows]
    text = f"# {title}\n\n{experiment_line(experiment)}\n\n{markdown(rows)}"
    if arguments.out is None:
        print("\n" + text)
        return rows
    line = shlex.join(["python", f"benchmarks/experiments/{name}.py", *environment["argv"]])
    table = {"environment": environment, "rows": rows, "command": line, "title": title}
    write_file(arguments.out / f"{name}.json", json.dumps(table, indent=1) + "\n")
    write_file(arguments.out / f"{name}.md", text)
    lines = io.StringIO()
    writer = csv.DictWriter(lines, _columns(rows), restval="")
    writer.writeheader()
    writer.writerows(rows)
    write_file(arguments.out / f"{name}.csv", lines.getvalue())
    return rows


def experiment_line(experiment: Experiment) -> str:
    """One sentence: the model and the tokens behind a table."""
    return (f"{experiment.checkpoint.path.name}, {experiment.windows.size} tokens in windows of "
            f"{experiment.windows.shape[1]}, {experiment.calibration.size} calibration tokens; "
            f"fake-quantized in float32. ratio: KL over that of `{BASELINE.name}`.")


def _columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(key for row in rows for key in row))


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table of all columns but the times; cells that a row lacks stay empty."""
    columns = [c for c in _columns(rows) if c not in ("seconds", "cpu_seconds")]
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for row in rows:
        cells = (row.get(c) for c in columns)
        texts = (f"{c:.5g}" if isinstance(c, float) else "" if c is None else str(c) for c in cells)
        lines.append("| " + " | ".join(texts) + " |")
    return "\n".join(lines) + "\n"


def _finished(log: Path | None, digest: str) -> dict[str, dict[str, Any]]:
    """Rows by name that an earlier run with the same digest finished; a torn last line is none."""
    rows: dict[str, dict[str, Any]] = {}
    if log is None or not log.is_file():
        return rows
    text = log.read_text()
    if text and not text.endswith("\n"):
        with log.open("a") as file:
            file.write("\n")
    for line in text.splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if row.pop("digest", None) == digest:
            rows[row["name"]] = row
    return rows


def _benchmarks_common() -> Any:
    """benchmarks/common.py, whatever else here is called common."""
    path = Path(__file__).resolve().parents[1] / "common.py"
    spec = importlib.util.spec_from_file_location("benchmarks_common", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
