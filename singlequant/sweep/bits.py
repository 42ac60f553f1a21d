# SPDX-License-Identifier: Apache-2.0
"""Which linears get 5, 6 or 8 bits a weight within a budget, and whether embedding and head have 6.

Rounding a linear's weights to b bits adds noise to what it writes. Noise of 4-bit weights costs
four times that of 5-bit ones, so bits go where a bit saves most noise per weight (BAQ, arXiv
2506.05664, gives the same rule for a sum of c 4^-b). What counts is the noise that reaches the
residual stream, as a share of the stream's own energy:

    e(b) mean_t  |W|^2 |x_t|^2 / k  /  |W x_t|^2  *  |o_t|^2 / |h_t|^2

e(b) is the squared error of the best uniform quantizer of b bits for a Gaussian of variance 1, W is
[n, k], x_t its input at token t, o_t what the linear's block (attention or MLP) adds to the stream,
and h_t the stream that the next block reads: behind the layer, or between attention and MLP, where
its energy is taken to be the sum of the energies of what came in and of what attention added. The
first quotient is the relative error of the linear's own output; the formula says that a relative
error passes through the block as a relative error.

Embedding and head have 8 bits, or 6 when the linears can make more of the bits that this frees. The
noise that it adds is measured, at the head alone: the divergence of the logits when the head is
rounded. That of the linears is the sum of the above, as noise of the head's inputs: KL_PER_NOISE
times the energy of the logits that noise of the inputs' own energy would make.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
from numpy.typing import NDArray

from .. import _C
from ..config import DEFAULT_TABLE_BITS, QuantConfig
from ..models.spec import LayerSpec, expert_of, role_row
from ..runtime.outer import HEAD_ROWS, Outer
from ..weights import WEIGHT_BITS, PackedTable
from .calibrate import Passed, blame_weight, embedded, pass_layers
from .experts import borrow
from .prepare import View

TOKENS = 1024  # that the noise is predicted on: whole windows, evenly spaced
SAMPLE_TOKENS = 128  # of them, that each linear's noise is measured on
HEAD_TOKENS = 256  # of them, that the head's rounding is measured on
TABLE_BITS_LOW = 6  # of embedding and head when the linears can make more of the difference
# Measured divergence of whole models over the sum of their linears' noise, see docs/defaults.md. It
# decides between choices that differ by factors of several.
KL_PER_NOISE = 1 / 50
# J. Max, Quantizing for minimum distortion, IRE Trans. IT-6 (1960), table II, for 2^b levels
ERROR = {4: 0.01154, 5: 0.003495, 6: 0.001041, 8: 0.0000869}


@dataclass(frozen=True)
class Share:
    """What one linear adds to the noise: `noise` times ERROR[bits]."""

    noise: float
    weights: int  # n k

    @property
    def tempered(self) -> float:
        """The noise when its square root per weight is believed. The formula is off by factors of
        several either way, and what it is off by must not starve a linear."""
        return (self.noise * self.weights) ** 0.5


@dataclass(frozen=True)
class Noise:
    """What `predict_noise` found: what rounding would add to the noise of a model's logits."""

    shares: Mapping[str, Share]  # by linear
    logits: float  # KL_PER_NOISE times the energy of logits: divergence per noise of the linears
    tables: float  # divergence when embedding and head have TABLE_BITS_LOW bits, above that of 8

    def divergence(self, bits: Mapping[str, int]) -> float:
        """What rounding the linears costs, in nats per token: bits by linear, others have 4."""
        return self.logits * sum(share.noise * ERROR[bits.get(name, WEIGHT_BITS[0])]
                                 for name, share in self.shares.items())


def assign_bits(
    view: View, config: QuantConfig, windows: NDArray[np.int64]
) -> tuple[QuantConfig, dict[str, int]]:
    """The recipe with the bits of embedding and head settled, and bits by linear, those with more
    than 4 alone.

    windows: [count, length] token ids of the calibration, of which TOKENS are looked at.
    config.bits is the mean over the linears' weights. Where the recipe leaves embedding and head
    open, they may get 6 bits in place of 8, and the linears what that frees: config.bits of the
    result is then larger, at equal bytes. Nothing is read or changed when config.bits is 4.
    """
    noise = None
    if config.bits > WEIGHT_BITS[0]:
        noise = predict_noise(view, windows, config.calibration_bits)
    return settle_bits(view, config, noise)


def predict_noise(view: View, windows: NDArray[np.int64], calibration_bits: int = 32) -> Noise:
    """The noise that a model's rounding would add, from TOKENS of windows [count, length].

    calibration_bits: as `bits` of `calibrate`.
    """
    shares: dict[str, Share] = {}
    hidden = None
    for layer in noise_layers(view, windows, calibration_bits):
        shares |= layer_shares(view, layer)
        hidden = layer.hidden
    return Noise(shares, *head_noise(view, hidden))


@dataclass(frozen=True)
class NoiseLayer:
    """What a layer's shares are found from. Energies are sums of squares, [tokens]."""

    index: int
    samples: Mapping[str, NDArray[np.float32]]  # [tokens kept, k] by site, evenly spaced
    entry: NDArray[np.float64]  # energy of the residual stream before the layer
    stream: NDArray[np.float64]  # behind it
    change: NDArray[np.float64]  # of what the layer changed
    hidden: NDArray[np.float32]  # the stream behind it, until the next layer: [tokens, hidden]


def noise_layers(
    view: View, windows: NDArray[np.int64], calibration_bits: int
) -> Iterator[NoiseLayer]:
    """What `predict_noise` looks at, layer by layer."""
    few = windows[:: max(1, len(windows) * windows.shape[1] // TOKENS)]
    before = embedded(view, few)
    for layer in pass_layers(view, few, calibration_bits):
        yield noise_layer(view, layer, before)
        before = layer.hidden.copy()


def noise_layer(view: View, layer: Passed, before: NDArray[np.float32]) -> NoiseLayer:
    """What a layer's shares are found from. before: the stream that came into it."""
    linears, spec = view.layer(layer.index).linears, view.spec.layer(layer.index)
    inputs = {**layer.inputs, **borrow(spec, linears, layer.inputs)}
    samples = {name: x[:: max(1, -(-len(x) // SAMPLE_TOKENS))] for name, x in inputs.items()}
    energies = [*map(energy, (before, layer.hidden, layer.hidden - before))]
    if not np.isfinite(energies).all():
        blame_weight(view, layer.index)
        raise ValueError(f"layer {layer.index}: expected finite activations, found NaN or Inf")
    return NoiseLayer(layer.index, samples, *energies, layer.hidden)


def settle_bits(
    view: View, config: QuantConfig, noise: Noise | None
) -> tuple[QuantConfig, dict[str, int]]:
    """`assign_bits` from what `predict_noise` gave; None where config.bits is 4."""
    if noise is None:
        return config, {}
    shares = {name: share for name, share in noise.shares.items() if not config.ignores(name)}
    if config.leaves_tables_open:
        config = _settle_tables(view, config, replace(noise, shares=shares))
    return config, spend(shares, config.bits)


def _settle_tables(view: View, config: QuantConfig, noise: Noise) -> QuantConfig:
    """The recipe of equal bytes with less divergence: tables of 8 bits, or of TABLE_BITS_LOW."""
    spec = view.spec
    weights = sum(share.weights for share in noise.shares.values())
    tables = spec.vocab * spec.width * len(config.table_bits(spec))
    freed = (DEFAULT_TABLE_BITS - TABLE_BITS_LOW) * tables / max(1, weights)
    more = min(float(WEIGHT_BITS[-1]), int((config.bits + freed) * 1e4) / 1e4)
    now, then = (noise.divergence(spend(noise.shares, bits)) for bits in (config.bits, more))
    low = now - then > noise.tables
    count = TABLE_BITS_LOW if low else DEFAULT_TABLE_BITS
    return replace(config, bits=more if low else config.bits, head_bits=count, embedding_bits=count)


def head_noise(view: View, hidden: NDArray[np.float32]) -> tuple[float, float]:
    """`Noise.logits` and `Noise.tables`, for the stream behind the last layer [tokens, hidden].

    What the embedding's rounding adds is taken to be as much as what the head's does.
    """
    spec, outer = view.spec, Outer(view)
    x = outer.finish(hidden[:: max(1, len(hidden) // HEAD_TOKENS)])
    name = f"{spec.embed if spec.tied else spec.head}.weight"
    head = view.outer[name]
    square = float(_C.column_moments(head)[1].sum()) * spec.logit_scale**2
    per_noise = KL_PER_NOISE * float(energy(x).mean()) * square / head.size
    blocks = [x[i : i + HEAD_ROWS] for i in range(0, len(x), HEAD_ROWS)]
    exact = [*map(outer.logits, blocks)]

    def divergence(bits: int) -> float:
        table = PackedTable.of(head, bits, name)
        rounded = Outer(SimpleNamespace(spec=spec, outer={**view.outer, name: table}))
        parts = [_C.kl_divergence(logits, rounded.logits(block))[0]
                 for logits, block in zip(exact, blocks, strict=True)]
        return float(np.concatenate(parts).mean())

    return per_noise, 2 * (divergence(TABLE_BITS_LOW) - divergence(DEFAULT_TABLE_BITS))


def layer_shares(view: View, layer: NoiseLayer) -> Iterator[tuple[str, Share]]:
    """(name, share) of each linear of a layer."""
    spec, weights = view.spec.layer(layer.index), view.layer(layer.index)
    own = {role: energy(_C.linear_dense(layer.samples[site.name], weights.linears[role].weight))
           for site in spec.sites.values() for role in site.roles}
    added = _added(spec, own, layer)
    for site in spec.sites.values():
        x = layer.samples[site.name]
        for role in site.roles:
            w = weights.linears[role].weight
            relative = relative_noise(x, w, own[role])
            out = _at(added[_writer(spec, role)], len(x))
            between = role_row(role).block == "attention" and not spec.parallel
            stream = _at(layer.entry, len(x)) + out if between else _at(layer.stream, len(x))
            noise = float(np.mean(relative * out / stream))
            yield weights.linears[role].name, Share(noise * _visited(spec, site.expert),
                                                    w.shape[0] * w.shape[1])


def relative_noise(
    x: NDArray[np.float32], w: NDArray, own: NDArray[np.float64] | None = None
) -> NDArray[np.float64]:
    """[tokens] |W|^2 |x|^2 / k  /  |W x|^2: times e(b), the relative error of W's own output.

    own: |W x|^2 [tokens], where it is known.
    """
    own = energy(_C.linear_dense(x, w)) if own is None else own
    square = float(_C.column_moments(w)[1].sum())
    return square / w.shape[1] * energy(x) / np.maximum(own, _tiny(own))


def spend(shares: Mapping[str, Share], budget: float) -> dict[str, int]:
    """Bits by linear, those with more than 4 alone, of least tempered noise with a mean of `budget`
    bits.

    The step that saves most noise per bit comes first; one that no longer fits is passed over.
    """
    bits = dict.fromkeys(shares, WEIGHT_BITS[0])
    left = int((budget - WEIGHT_BITS[0]) * sum(share.weights for share in shares.values()))
    queue = [step for name in shares if (step := _best_step(name, shares[name], bits[name]))]
    heapq.heapify(queue)
    while queue:
        _, name, more = heapq.heappop(queue)
        cost = (more - bits[name]) * shares[name].weights
        if cost > left:
            continue
        left, bits[name] = left - cost, more
        step = _best_step(name, shares[name], more)
        if step:
            heapq.heappush(queue, step)
    return {name: b for name, b in bits.items() if b > WEIGHT_BITS[0]}


def _best_step(name: str, share: Share, bits: int) -> tuple[float, str, int] | None:
    """(-tempered noise saved per bit, name, bits) of the best next number of bits, or None."""
    steps = [(-share.tempered * (ERROR[bits] - ERROR[b]) / ((b - bits) * share.weights), name, b)
             for b in WEIGHT_BITS if b > bits]
    return min(steps, default=None)


# ---- the energies of a layer --------------------------------------------------------------------


def energy(x: NDArray[np.float32]) -> NDArray[np.float64]:
    """[rows] sum of squares of each row of x."""
    return np.einsum("ij,ij->i", x, x, dtype=np.float64)


def _tiny(x: NDArray[np.float64]) -> float:
    """What a token's energy is at least: a token of zeros must not divide."""
    return max(1e-6 * float(np.mean(x)), 1e-30)


def _writes(role: str) -> bool:
    """Whether the role's rows are added to the residual stream."""
    row = role_row(role)
    return row.outputs == "hidden" and row.block == row.reads


def _writer(spec: LayerSpec, role: str) -> str:
    """The role that writes what `role` takes part in, of the same expert."""
    block, expert = role_row(role).block, expert_of(role)
    return next(r for r in spec.linears if _writes(r) and role_row(r).block == block
                and expert_of(r) == expert)


def _added(
    spec: LayerSpec, own: Mapping[str, NDArray[np.float64]], layer: NoiseLayer
) -> dict[str, NDArray[np.float64]]:
    """By role that writes the stream, the energy of what its block adds, [tokens] or [1].

    own: the energy of each role's outputs. A norm behind the branch sets what it adds, whatever the
    linear's own energy is: it is then taken to be half of the layer's change of the stream.
    """
    found = {}
    for site in spec.sites.values():
        for role in filter(_writes, site.roles):
            norm = "after_attention" if role_row(role).block == "attention" else "after_mlp"
            if norm in spec.norms and not spec.norm_sums:
                found[role] = layer.change / 2
            else:
                found[role] = own[role] * spec.residual_scale**2
    return found


def _at(energy: NDArray[np.float64], rows: int) -> NDArray[np.float64]:
    """The energies at a sample of so many rows; their median where the rows are other tokens."""
    kept = energy[:: max(1, -(-len(energy) // rows))]
    if len(kept) != rows:
        kept = np.median(energy, keepdims=True)
    return np.maximum(kept, _tiny(kept))


def _visited(spec: LayerSpec, expert: int | None) -> float:
    """The share of tokens that an expert sees when all see as many; 1 for what all tokens meet."""
    return 1.0 if expert is None else spec.experts.chosen / spec.experts.count
