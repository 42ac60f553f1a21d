# SPDX-License-Identifier: Apache-2.0
"""What an expert is calibrated on: the tokens routed to it, or the layer's union of them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from .. import _C
from ..models.spec import LayerSpec
from ..weights import Linear

FEW_TOKENS = 128  # an expert that saw fewer is calibrated on the union
UNION_TOKENS = 1024  # rows of the union, evenly spaced

Inputs = Mapping[str, NDArray[np.float32]]  # [rows, k] by site


def borrow(layer: LayerSpec, linears: Mapping[str, Linear], inputs: Inputs) -> dict[str, NDArray]:
    """Inputs of the sites whose expert saw fewer than FEW_TOKENS tokens, in place of its own.

    The union is what all experts of the layer read, a token once for each expert that it chose.
    What the expert's last linear reads of it follows from its own weights. Sites of experts that
    saw enough are absent. When all experts together saw less, the union is all there is.
    """
    few = sorted({site.expert for site in layer.sites.values()
                  if site.expert is not None and len(inputs[site.name]) < FEW_TOKENS})
    if not few:
        return {}
    union = _union(layer, inputs)
    borrowed: dict[str, NDArray] = {}
    for expert in few:
        for site in (s for s in layer.sites.values() if s.expert == expert):
            first = site.reads == "residual"
            borrowed[site.name] = union if first else _inner(layer, linears, expert, union)
    return borrowed


def _union(layer: LayerSpec, inputs: Inputs) -> NDArray[np.float32]:
    """Evenly spaced rows of all that the experts read."""
    read = [inputs[site.name] for site in layer.sites.values()
            if site.expert is not None and site.reads == "residual"]
    step = max(1, -(-sum(map(len, read)) // UNION_TOKENS))
    return np.concatenate([rows[::step] for rows in read])


def _inner(
    layer: LayerSpec, linears: Mapping[str, Linear], expert: int, x: NDArray[np.float32]
) -> NDArray[np.float32]:
    """What the last linear of an expert reads of x [rows, hidden]."""
    outputs = {}
    for role in ("gate", "up"):
        linear = linears.get(f"{role}.{expert}")
        if linear is not None:
            bias = 0 if linear.bias is None else _C.to_float32(linear.bias)
            outputs[role] = _C.linear_dense(x, linear.weight) + bias
    experts = layer.experts
    return _C.activate(experts.activation, outputs.get("gate"), outputs["up"], experts.limit)
