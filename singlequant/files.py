# SPDX-License-Identifier: Apache-2.0
"""Result files that appear under their names only when whole, and checks before the work."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = [
    "check_file",
    "check_picture",
    "require_matplotlib",
    "save_figure",
    "whole_file",
    "write_file",
]


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Any]:
    """A file to write that takes its name only after it was written and synced."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:  # write() knows no name
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise


def write_file(path: str | Path, data: bytes | str) -> Path:
    """Write bytes, or a text as UTF-8; the file appears, or is replaced, only when whole."""
    with whole_file(Path(path)) as file:
        file.write(data.encode() if isinstance(data, str) else data)
    return Path(path)


def save_figure(figure: Any, path: str | Path, dpi: int = 150) -> Path:
    """Write a matplotlib Figure in the format of the name's suffix, only when whole."""
    whole = io.BytesIO()
    figure.savefig(whole, dpi=dpi, format=Path(path).suffix[1:].lower())
    return write_file(path, whole.getvalue())


def check_file(path: str | Path) -> None:
    """ValueError, before long work is done for nothing, unless path can name a file."""
    path = Path(path)
    if not path.parent.is_dir():
        raise ValueError(f"{path}: expected a file in an existing folder, found no {path.parent}")
    if path.is_dir():
        raise ValueError(f"{path}: expected the name of a file, found a folder")


def check_picture(path: str | Path) -> None:
    """The same for a picture: ImportError without matplotlib, ValueError for a strange suffix."""
    check_file(path)
    require_matplotlib()
    from matplotlib.figure import Figure

    known, suffix = Figure().canvas.get_supported_filetypes(), Path(path).suffix
    if suffix[1:].lower() not in known:
        raise ValueError(f"{path}: expected a name that ends in one of {', '.join(sorted(known))}, "
                         f"found {suffix or 'none'}")


def require_matplotlib() -> None:
    """ImportError that says what to install."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ImportError("a picture needs matplotlib (pip install 'singlequant[plots]')") from None
