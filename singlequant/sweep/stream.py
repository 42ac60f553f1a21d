# SPDX-License-Identifier: Apache-2.0
"""The layers that carry the calibration tokens: in 8 bits by default, or as they are."""

from __future__ import annotations

import threading
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from .. import _C
from ..models.spec import LayerSpec, ModelSpec
from ..rotations import Factor
from ..rows import require_finite
from ..runtime.layers import assemble, build_layer

if TYPE_CHECKING:
    from .prepare import View

NO_STEPS = np.empty((0, 2), np.int32), np.empty(0)  # of a chain
BYTES_MAX = 1 << 31  # of a layer's weights in 8 bits: a larger layer is read where it lies


def stream_layer(checkpoint, index: int, bits: int) -> _C.DecoderLayer:
    """Layer `index` of an unquantized model, ready to run with weights and activations of so many
    bits: 32 is the model's own weights through BLAS.

    With 8 bits weight rows and tokens are rounded to nearest, one scale each, behind a Hadamard,
    which spreads what stands out. Sums are exact integers, so that the stream is the same on every
    BLAS. ValueError names a weight that holds NaN or Inf.
    """
    spec = checkpoint.spec.layer(index)
    if not _exact(spec, bits):
        return build_layer(checkpoint, index)
    linears, given = {}, checkpoint.layer(index).linears
    rotations = {name: _hadamard(site.k) for name, site in spec.sites.items()}
    for name, site in spec.sites.items():
        for role in site.roles:
            linear = given[role]
            try:
                words, scales = _C.quantize_weight(linear.weight, 0, False, rotations[name], bits=8)
            except ValueError as error:
                require_finite(linear.weight, f"{linear.name}.weight")
                raise ValueError(f"{linear.name}: rotated for 8 bits: {error}") from None
            linears[role] = name, _C.PackedWeight(words, scales, site.k, bits=8), linear.bias
    return assemble(checkpoint, index, linears, rotations, 8)


def _exact(spec: LayerSpec, bits: int) -> bool:
    """Whether a layer is run in 8 bits."""
    weights = sum(linear.n * linear.k for linear in spec.linears.values())
    widest = max(site.k for site in spec.sites.values())
    return bits != 32 and weights <= BYTES_MAX and widest <= _C.PACKED_K_MAX_W8


def in_parts(spec: ModelSpec, bits: int) -> bool:
    """Whether some of the windows give the same bits as all together. Sums of 8-bit codes do, and
    BLAS does not."""
    return all(_exact(kind, bits) for kind in spec.kinds)


@cache
def _hadamard(k: int) -> _C.Rotation | None:
    """A Hadamard of k inputs as the core takes it, for the power of two in k by its fast transform;
    None for one input."""
    power = k & -k
    if k == 1:
        return None
    odd = None if power == k else Factor(k // power, True, (), ()).runtime()
    return _C.Rotation(k, odd, (power, True, *NO_STEPS))


def read_ahead(checkpoint: View, index: int) -> threading.Thread | None:
    """Start reading layer `index` into the page cache, beside the work; None behind the last.

    Takes no memory of the process: the pages are the file's own, and the system's to drop.
    """
    if index >= checkpoint.spec.layers:
        return None
    source = getattr(checkpoint, "source", checkpoint)  # a view would compute the weights
    weights = [linear.weight for linear in source.layer(index).linears.values()]

    def advise() -> None:
        for weight in weights:
            if isinstance(weight, np.ndarray) and weight.flags.forc:  # else it is no run of a file
                _C.will_need(weight if weight.flags.c_contiguous else weight.T)

    thread = threading.Thread(target=advise, daemon=True)
    thread.start()
    return thread
