# SPDX-License-Identifier: Apache-2.0
"""Where what calibration keeps of a layer lies: in memory, or in files where it is large."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .. import _C

LIMIT_VARIABLE = "SINGLEQUANT_STATES_MB"
LIMIT_MB = 512  # of one array, where the variable says nothing
ON_DISK = Path("/var/tmp")  # /tmp is memory on many systems


def states_limit() -> int:
    """Bytes above which an array lies in a file. ValueError for a variable that is no number."""
    text = os.environ.get(LIMIT_VARIABLE, str(LIMIT_MB))
    if not text.isascii() or not text.isdigit() or int(text) >= 1 << 40:
        raise ValueError(f"{LIMIT_VARIABLE}: expected megabytes from 0, found {text!r:.80}")
    return int(text) << 20


def states_folder() -> Path:
    """The folder of those files: TMPDIR, or /var/tmp."""
    given = os.environ.get("TMPDIR")
    if given:
        return Path(given)
    return ON_DISK if os.access(ON_DISK, os.W_OK) else Path(tempfile.gettempdir())


def map_states() -> None:
    """Have the core keep large records in files, from now on."""
    _C.map_states(states_limit(), states_folder())


def kept(array: NDArray[np.float32]) -> NDArray[np.float32]:
    """The array itself, or its copy in a file without a name where it is large."""
    if array.nbytes <= states_limit():
        return array
    try:
        with tempfile.TemporaryFile(dir=states_folder()) as file:
            os.posix_fallocate(file.fileno(), 0, array.nbytes)
            copy = np.memmap(file, array.dtype, "r+", shape=array.shape)
    except OSError:  # no room, or no such files: as the core does
        return array
    copy[...] = array
    return np.asarray(copy)
