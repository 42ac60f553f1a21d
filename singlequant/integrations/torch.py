# SPDX-License-Identifier: Apache-2.0
"""PyTorch: modules on the packed kernels. Importing this file imports torch."""

from . import needs_torch  # noqa: F401
from .in_place import Left, Quantized, Report, load_, quantize_
from .linear import Linear

__all__ = ["Left", "Linear", "Quantized", "Report", "load_", "quantize_"]
