"""Drives the C decoder: one call per layer, over dense weights (recording) or packed ones."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from . import _C
from .architectures import ModelShape, rope_frequencies
from .artifacts import SITES, BlockRotation, PackedLinear, SiteRotation

ROWS_PER_BLOCK = 1024  # rows of a weight in float32 at a time: the sweep's working memory


def architecture_row(shape: ModelShape) -> dict[str, object]:
    """What the C decoder needs to know of a model, from its config."""
    inv_freq, rope_scale = rope_frequencies(shape)
    return {
        "hidden": shape.hidden,
        "intermediate": shape.intermediate,
        "heads": shape.heads,
        "kv_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "rms_eps": shape.rms_eps,
        "sliding_window": shape.sliding_window or 0,
        "inv_freq": inv_freq,
        "rope_scale": rope_scale,
    }


def build_layer(checkpoint, index: int) -> _C.DecoderLayer:
    """The C layer `index` of a Checkpoint; packed weights go into the CPU's panel order."""
    weights = checkpoint.layer(index)
    linears = []
    site_of = {r: s for s, roles in checkpoint.architecture.sites.items() for r in roles}
    for role, linear in weights.linears.items():
        weight = linear.weight
        if isinstance(weight, PackedLinear):
            high = weights.high.get(site_of[role], 0)
            weight = _C.PackedWeight(weight.words, weight.scales, weight.shape[1], weight.group,
                                     high)
        linears.append((weight, linear.bias))
    sites: list[tuple | None] = [None] * len(SITES)
    if checkpoint.quant_config is not None:
        bits = checkpoint.quant_config.activation_bits
        for i, site in enumerate(SITES):
            rotation = weights.rotations.get(site, (None, None))
            if len(rotation) == 3:  # a BlockRotation's stand in place of left
                rotation = (rotation, None)
            sites[i] = (*rotation, bits, weights.clips[site])
    return _C.DecoderLayer(architecture_row(checkpoint.shape), weights.norms, linears, sites)


def rotate_rows(
    x: NDArray[np.floating], rotation: SiteRotation | BlockRotation
) -> NDArray[np.float32]:
    """Each row of x [..., k], a token or a weight's, as the site's rotation turns it."""
    if isinstance(rotation, BlockRotation):
        return _C.rotate_blocks(x, *rotation.arrays)
    return _C.rotate(x, *rotation.arrays)


def float32_blocks(array: NDArray, name: str) -> Iterator[tuple[slice, NDArray[np.float32]]]:
    """Yield (rows, block): a weight of any stored type, ROWS_PER_BLOCK rows at a time in float32.

    ValueError `name, rows a to b: ...` when a block holds NaN or Inf.
    """
    matrix = array.reshape(len(array), -1)
    for first in range(0, len(matrix), ROWS_PER_BLOCK):
        rows = slice(first, min(first + ROWS_PER_BLOCK, len(matrix)))
        try:
            block = _C.to_float32(matrix[rows], reject=True)
        except ValueError as error:
            raise ValueError(f"{name}, rows {first} to {rows.stop - 1}: {error}") from None
        yield rows, block


def require_finite(array: NDArray, name: str) -> None:
    """ValueError `name, rows a to b: ...` when a weight of any stored type holds NaN or Inf."""
    for _ in float32_blocks(array, name):
        pass


def flat_positions(lengths: NDArray[np.int64]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Sequence index and position of each token of concatenated sequences of these lengths."""
    lengths = np.asarray(lengths, np.int64)
    sequence = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    return sequence, np.arange(int(lengths.sum()), dtype=np.int64) - np.repeat(starts, lengths)
