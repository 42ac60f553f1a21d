# SPDX-License-Identifier: Apache-2.0
"""The compiled extension runs on manylinux_2_28: what it asks of the C library is not newer, and no
folder of the machine that built it is searched."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from singlequant import _C

OLDEST = (2, 28)
EXTENSION = Path(_C.__file__)
LIBRARIES = [EXTENSION, *sorted((EXTENSION.parent / "libs").glob("*.so*"))]

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not shutil.which("objdump") or not shutil.which("readelf"),
    reason="needs Linux, objdump and readelf")


def output(*command: object) -> str:
    return subprocess.run([*map(str, command)], check=True, capture_output=True, text=True).stdout


def is_for_developers() -> bool:
    """Whether the build is one of setup.py's SANITIZE or DEBUG, which no wheel is made of."""
    return "libasan" in output("readelf", "-d", EXTENSION) or ".debug_info" in output(
        "readelf", "-SW", EXTENSION)


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda path: path.name.partition(".")[0])
def test_no_symbol_is_newer_than_the_oldest_glibc(library):
    if library == EXTENSION and is_for_developers():
        pytest.skip("built with SINGLEQUANT_SANITIZE or SINGLEQUANT_DEBUG")
    asked = re.findall(r"\(?GLIBC_([\d.]+)\)? +(\w+)$", output("objdump", "-T", library), re.M)
    assert len(asked) > 20
    newer = {name: version for version, name in asked
             if tuple(map(int, version.split("."))) > OLDEST}
    assert not newer, f"{library}: add these to csrc/core/sq_old_glibc.h"


def test_only_folders_beside_the_extension_are_searched():
    found = re.findall(r"\((?:RUNPATH|RPATH)\).*\[(.*)\]", output("readelf", "-d", EXTENSION))
    assert found == ["$ORIGIN/libs"]


def test_threads_come_from_a_library_that_is_there():
    """Before 2.34 pthread_create is in libpthread, which OpenBLAS brings into the process."""
    needed = "".join(output("readelf", "-d", library) for library in LIBRARIES)
    assert "libpthread.so.0" in needed
