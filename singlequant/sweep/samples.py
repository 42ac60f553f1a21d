# SPDX-License-Identifier: Apache-2.0
"""Activations that methods find rotations of the residual stream from."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .. import _C
from ..checkpoint.views import require_commuting
from ..methods.stream import StreamSamples, unit_rows
from .calibrate import calibrate


def stream_samples(checkpoint, windows: NDArray[np.int64]) -> StreamSamples:
    """Evenly spaced tokens of every layer of the unquantized model on windows [count, length].

    ValueError where a norm does not commute with a rotation.
    """
    spec = checkpoint.spec
    require_commuting(spec)
    tokens = max(1, -(-StreamSamples.rows_wanted(spec.hidden) // (2 * spec.layers)))
    residual, values = [], []
    for layer in calibrate(checkpoint, windows, tokens, keep_inputs=False):
        of_layer = spec.layer(layer.index)
        norms = checkpoint.layer(layer.index).norms
        for name, site in layer.sites.items():
            place = of_layer.sites[name].norm
            if site.reads == "residual":
                offset = np.float32(of_layer.norms[place].offset)
                scale = _C.to_float32(norms[place].weight) + offset
                residual.append(np.divide(site.sample, scale, where=scale != 0,
                                          out=np.zeros_like(site.sample)))
            elif site.reads == "attention":
                values.append(unit_rows(site.sample.reshape(-1, spec.attention.head_dim)))
    return StreamSamples(unit_rows(np.concatenate(residual)), tuple(values))
