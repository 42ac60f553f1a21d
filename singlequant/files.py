# SPDX-License-Identifier: Apache-2.0
"""Writing result files whole or not at all, and checks of file names before long work."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ._C import FormatError

# What a file may hold that is read whole. Published settings have 2 MB at most. A list of tensors
# takes about 100 bytes for each: DeepSeek-V3's index has 92,000 of them, packed folders up to three
# times as many as their sources.
MAX_JSON_BYTES = 4 << 20
MAX_LISTING_BYTES = 32 << 20  # indices, headers, recipes: an entry for every tensor
MAX_TEMPLATE_BYTES = 1 << 20
MAX_TOKENIZER_BYTES = 128 << 20  # the largest that are published, of 262,144 tokens, have 33 MB
REASON = "_reason"  # appended to the name of a number that JSON cannot hold
MAX_POINTER_BYTES = 1024  # the specification's own limit
TEMPORARY = ".singlequant.tmp"  # appended to the name of a file that is not whole; ours alone
POINTER = b"version https://git-lfs.github.com/spec/"

__all__ = [
    "check_file",
    "check_page",
    "check_picture",
    "errors_name",
    "folder_bytes",
    "is_present",
    "json_text",
    "json_values",
    "not_finite",
    "numbers_back",
    "read_json",
    "require_matplotlib",
    "require_size",
    "save_figure",
    "sync_folder",
    "unique_keys",
    "whole_file",
    "write_file",
]


@contextlib.contextmanager
def errors_name(path: Path, *instead: Path) -> Iterator[None]:
    """An OSError within names path where it names no file, or one of those instead."""
    try:
        yield
    except OSError as error:
        if error.filename not in (None, *map(str, instead)):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Any]:
    """A binary file to write; it gets the name path only after it was written and synced.

    The folder is synced as well: the new name is durable. Until then the file is named
    PATH.singlequant.tmp. If an error occurs, path stays as it was, and an OSError names path.
    """
    temporary = path.with_name(path.name + TEMPORARY)
    with errors_name(path, temporary):  # write() knows no name; nobody asked for the temporary one
        try:
            with temporary.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            sync_folder(path.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def sync_folder(path: Path) -> None:
    """Makes the names in a folder durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with errors_name(path):
            os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that cannot
            raise
    finally:
        os.close(descriptor)


def write_file(path: str | Path, data: bytes | str) -> Path:
    """Write bytes, or a text as UTF-8. The file appears, or is replaced, only when it is whole."""
    with whole_file(Path(path)) as file:
        file.write(data.encode() if isinstance(data, str) else data)
    return Path(path)


def save_figure(figure: Any, path: str | Path, dpi: int = 150) -> Path:
    """Write a matplotlib Figure whole or not at all. The suffix of the name says the format."""
    whole = io.BytesIO()
    figure.savefig(whole, dpi=dpi, format=Path(path).suffix[1:].lower())
    return write_file(path, whole.getvalue())


def is_present(path: Path) -> bool:
    """Whether a file of a model is there.

    FormatError for what an unfinished download leaves in its place: a link to nothing, as in the
    cache of the Hub, or a pointer of Git LFS.
    """
    if not path.is_file():
        if path.is_symlink() and not path.exists():
            raise FormatError(f"{path}: a link to {os.readlink(path)}, which does not exist: "
                              f"download the model again")
        return False
    if path.stat().st_size <= MAX_POINTER_BYTES:
        with errors_name(path), path.open("rb") as file:
            if file.read(len(POINTER)) == POINTER:
                raise FormatError(f"{path}: a Git LFS pointer stands in place of the file: fetch "
                                  f"the files by `git lfs pull`")
    return True


def folder_bytes(folder: str | Path) -> int:
    """Bytes of the files that lie in a folder, those of its subfolders left out."""
    return sum(f.stat().st_size for f in Path(folder).iterdir() if f.is_file())


def check_file(path: str | Path) -> None:
    """Check that path can name a file, before long work whose result goes there.

    ValueError if its folder does not exist, or if path is a folder.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise ValueError(f"{path}: expected a file in an existing folder, found no {path.parent}")
    if path.is_dir():
        raise ValueError(f"{path}: expected the name of a file, found a folder")


def check_picture(path: str | Path) -> None:
    """Check that path can name a picture.

    ValueError if `check_file` fails or matplotlib cannot write the suffix. ImportError without
    matplotlib.
    """
    check_file(path)
    require_matplotlib()
    from matplotlib.figure import Figure

    known, suffix = Figure().canvas.get_supported_filetypes(), Path(path).suffix
    if suffix[1:].lower() not in known:
        raise ValueError(f"{path}: expected a name that ends in one of {', '.join(sorted(known))}, "
                         f"found {suffix or 'none'}")


def check_page(path: str | Path) -> None:
    """Check that path can name a web page with pictures: `check_file`, and matplotlib is there."""
    check_file(path)
    require_matplotlib()


def require_matplotlib() -> None:
    """Raise an ImportError that says what to install, if matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ImportError("a picture needs matplotlib (pip install 'singlequant[plots]')") from None


def require_size(path: Path, most: int, what: str) -> None:
    """FormatError if a file is larger than a file of its kind is."""
    size = path.stat().st_size
    if size > most:
        raise FormatError(f"{path}: expected {what} of at most {most} bytes, found {size}")


def read_json(path: Path, most: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """The JSON object in path, of at most so many bytes.

    FormatError names the file if it is missing, too large, or holds anything but one JSON object.
    """
    if not is_present(path):
        raise FormatError(f"{path}: no such file")
    require_size(path, most, "JSON")
    try:
        value = json.loads(path.read_bytes(), object_pairs_hook=unique_keys)
        lost = next(_lost_numbers(value), None)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: expected a JSON object, found: {error}") from None
    if not isinstance(value, dict):
        raise FormatError(f"{path}: expected a JSON object, found {type(value).__name__}")
    if lost:
        raise FormatError(f"{path}: {lost[0]}: expected a number that is finite, found {lost[1]}")
    return value


def _lost_numbers(values: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """Name and value of each number that JSON does not have, though json reads it."""
    if isinstance(values, float) and not math.isfinite(values):
        yield name, values
    elif isinstance(values, dict):
        for key, value in values.items():
            yield from _lost_numbers(value, f"{name}.{key}" if name else key)
    elif isinstance(values, list):
        for i, value in enumerate(values):
            yield from _lost_numbers(value, f"{name}[{i}]")


def not_finite(value: Any) -> str | None:
    """What a number is that JSON cannot hold, in words; None for every other value."""
    if not isinstance(value, float) or math.isfinite(value):
        return None
    return "not a number" if math.isnan(value) else "infinite"


def json_values(values: Any) -> Any:
    """Values of mappings and lists as JSON has them: a number that is not finite becomes null.

    In a mapping, NAME_reason says beside the null NAME what the number was.
    """
    if isinstance(values, Mapping):
        found: dict[str, Any] = {}
        for key, value in values.items():
            reason = not_finite(value)
            found |= {key: json_values(value)} if reason is None else {
                key: None, f"{key}{REASON}": reason}
        return found
    if isinstance(values, (list, tuple)):
        return [json_values(value) for value in values]
    return values if not_finite(values) is None else None


def numbers_back(values: Any) -> Any:
    """What `json_values` was given, where its nulls stand in mappings."""
    if isinstance(values, Mapping):
        lost = {key: f"{key}{REASON}" for key, value in values.items()
                if value is None and f"{key}{REASON}" in values}
        found = {key: numbers_back(value) for key, value in values.items()
                 if key not in lost.values()}
        return found | {key: math.inf if str(values[reason]).startswith("infinite") else math.nan
                        for key, reason in lost.items()}
    return [numbers_back(value) for value in values] if isinstance(values, list) else values


def json_text(values: Any, indent: int | None = None) -> str:
    """The `json_values` of values as text."""
    return json.dumps(json_values(values), indent=indent, allow_nan=False)


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A dict of pairs, for json's object_pairs_hook. ValueError if a key occurs twice."""
    unique = dict(pairs)
    if len(unique) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"key {key!r} stands twice")
            seen.add(key)
    return unique
