# SPDX-License-Identifier: Apache-2.0
"""Which linears get 5, 6 or 8 bits a weight within a budget: a closed form of few tokens.

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
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .. import _C
from ..config import QuantConfig
from ..models.spec import LayerSpec, expert_of, role_row
from ..statistics import LayerStatistics
from ..weights import WEIGHT_BITS
from .calibrate import calibrate, energy
from .prepare import View

TOKENS = 1024  # that the noise is predicted on: whole windows, evenly spaced
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


def assign_bits(view: View, config: QuantConfig, windows: NDArray[np.int64]) -> dict[str, int]:
    """Bits by linear, those with more than 4 alone; config.bits is the mean over all weights.

    windows: [count, length] token ids of the calibration, of which TOKENS are looked at. {} when
    config.bits is 4: nothing is read then.
    """
    if config.bits == WEIGHT_BITS[0]:
        return {}
    shares: dict[str, Share] = {}
    few = windows[:: max(1, len(windows) * windows.shape[1] // TOKENS)]
    for layer in calibrate(view, few, keep_inputs=False, stream=True):
        for name, share in layer_shares(view, layer):
            if not config.ignores(name):
                shares[name] = share
    return spend(shares, config.bits)


def layer_shares(view: View, layer: LayerStatistics) -> Iterator[tuple[str, Share]]:
    """(name, share) of each linear of a layer, from its statistics and weights."""
    spec, weights = view.spec.layer(layer.index), view.layer(layer.index)
    added = _added(spec, weights, layer)
    for site in spec.sites.values():
        x = layer.sites[site.name].sample
        size = energy(x)
        for role in site.roles:
            w = weights.linears[role].weight
            square = float(_C.column_moments(w)[1].sum())
            own = energy(_C.linear_dense(x, w))
            relative = square / w.shape[1] * size / np.maximum(own, _tiny(own))
            out = _at(added[_writer(spec, role)], len(x))
            between = role_row(role).block == "attention" and not spec.parallel
            stream = _at(layer.entry, len(x)) + out if between else _at(layer.stream, len(x))
            noise = float(np.mean(relative * out / stream))
            yield weights.linears[role].name, Share(noise * _visited(spec, site.expert),
                                                    w.shape[0] * w.shape[1])


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


def _added(spec: LayerSpec, weights, layer: LayerStatistics) -> dict[str, NDArray[np.float64]]:
    """By role that writes the stream, the energy of what its block adds, [tokens] or [1].

    A norm behind the branch sets that energy, whatever the linear's own is: it is then taken to be
    half of the layer's change of the stream.
    """
    found = {}
    for site in spec.sites.values():
        for role in filter(_writes, site.roles):
            norm = "after_attention" if role_row(role).block == "attention" else "after_mlp"
            if norm in spec.norms and not spec.norm_sums:
                found[role] = layer.change / 2
            else:
                x = layer.sites[site.name].sample
                out = energy(_C.linear_dense(x, weights.linears[role].weight))
                found[role] = out * spec.residual_scale**2
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
