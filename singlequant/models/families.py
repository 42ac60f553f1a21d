# SPDX-License-Identifier: Apache-2.0
"""All rows by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .._C import FormatError
from . import llama
from .family import Family

MODULES = (llama,)
FAMILIES = {row.name: row for module in MODULES for row in vars(module).values()
            if isinstance(row, Family)}


def find_family(config: Mapping[str, Any], source: str = "config.json") -> Family:
    """The row that config.json's `architectures` names. FormatError lists the supported ones."""
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and len(names) == 1 else names
    row = FAMILIES.get(name) if isinstance(name, str) else None
    if row is None:
        raise FormatError(
            f"{source}: architectures: expected one of {', '.join(FAMILIES)}, found {name!r:.200}"
        )
    return row
