# SPDX-License-Identifier: Apache-2.0
"""What a process takes."""

from __future__ import annotations

from pathlib import Path

import pytest


def anonymous_bytes() -> int:
    """Memory of this process that is no file's."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    pytest.skip("needs RssAnon in /proc/self/status")
