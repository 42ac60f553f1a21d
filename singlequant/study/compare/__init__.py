# SPDX-License-Identifier: Apache-2.0
"""Methods x schemes on one model: quality, seconds, memory and size, in one resumable run."""

from .options import CompareOptions, default_methods
from .rows import ROWS_FILE, Row, RowsFile
from .run import compare
from .table import Comparison

__all__ = [
    "ROWS_FILE",
    "CompareOptions",
    "Comparison",
    "Row",
    "RowsFile",
    "compare",
    "default_methods",
]
