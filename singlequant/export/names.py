# SPDX-License-Identifier: Apache-2.0
"""Names of the packed format (docs/format.md)."""

from __future__ import annotations

QUANT_METHOD = "singlequant"  # quantization_config.quant_method

FORMAT_VERSION = 1  # quantization_config.format_version; docs/format.md


def rotation_name(layer: int, site: str, part: str) -> str:
    """Tensor of a site's rotation; part: left, right, or those with _chain, _pairs, _angles; or
    first, permutation, second."""
    return f"model.layers.{layer}.rotations.{site}.{part}"


def clip_name(layer: int, site: str) -> str:
    """Tensor of a site's own activation clip."""
    return f"model.layers.{layer}.activations.{site}.clip"


def high_name(layer: int, site: str) -> str:
    """Tensor of the number of a site's leading inputs that keep 8 bits."""
    return f"model.layers.{layer}.activations.{site}.high"

PACKED_PARTS = {"weight_packed": "I32", "weight_scale": "F32", "weight_shape": "I64"}

CHAIN_PARTS = {"chain": "I64", "pairs": "I32", "angles": "F64"}

FACTOR_PARTS = ("left", "right")
BLOCK_PARTS = {"first": "F32", "permutation": "I32", "second": "F32"}
