# SPDX-License-Identifier: Apache-2.0
"""Steps of a transformation, as the solver recorded them, applied to inputs and weights."""

from __future__ import annotations

from typing import Any

from ... import _C
from ...sweep.layer import transform_inputs, transform_rows
from .measures import Sample


def transformation_steps(rotation: Any) -> list[tuple[str, Any]]:
    """(name, partial transformation) of each step in order; the first is ("original", None).

    rotation: a SiteRotation or a BlockRotation, whose recorded steps are shown; None; or what a
    packed folder has, where nothing is recorded: "original" and "final" alone. A partial
    transformation is what stands after the step, and goes to `transform`; the last one is
    `rotation` itself.
    """
    if rotation is None:
        return [("original", None)]
    partials = [("final", rotation)] if isinstance(rotation, _C.Rotation) else (
        rotation.partials())
    return [("original", None), *partials]


def transform(partial: Any, x: Sample) -> Sample:
    """Inputs x [tokens, k] after a partial transformation; None leaves them."""
    if partial is None:
        return x
    if isinstance(partial, _C.Rotation):
        return _C.rotate(x, partial)
    return transform_inputs(x, partial)


def transform_weights(partial: Any, weights: Sample) -> Sample:
    """Weight rows [n, k] after the same: x' W'^T = x W^T."""
    if isinstance(partial, _C.Rotation):
        return _C.rotate(weights, partial)
    return transform_rows(weights, partial)
