# SPDX-License-Identifier: Apache-2.0
"""What the tokenizers library raises, as an error that names tokenizer.json.

The library is written in Rust. Where it does not expect what a file says, it panics: Rust prints
the place on descriptor 2 by itself, and Python sees a PanicException, which is no Exception.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path

from .._C import FormatError

# The command sets it, as its errors are one line. Programs keep what Rust prints.
_quiet = False
_lock = threading.RLock()


def keep_panics_quiet(quiet: bool) -> bool:
    """Whether what Rust prints about a panic is dropped from now on; what was so before."""
    global _quiet
    before, _quiet = _quiet, quiet
    return before


@contextlib.contextmanager
def tokenizer_errors(folder: Path) -> Iterator[None]:
    """The library's errors within, panics included, are FormatErrors that name the file."""
    try:
        with _panics_dropped() if _quiet else contextlib.nullcontext():
            yield
    except (OSError, MemoryError):
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and not _is_panic(error):
            raise
        what = "the tokenizers library cannot use it: " if _is_panic(error) else ""
        raise FormatError(f"{folder / 'tokenizer.json'}: {what}{error}") from None


def _is_panic(error: BaseException | None) -> bool:
    return type(error).__name__ == "PanicException"


@contextlib.contextmanager
def _panics_dropped() -> Iterator[None]:
    """What comes on descriptor 2 within waits, and is dropped when there was a panic."""
    with _lock:
        try:
            errors = os.dup(2)
        except OSError:  # it is closed: nobody reads
            yield
            return
        held = os.memfd_create("held")
        os.dup2(held, 2)
        panicked = False
        try:
            yield
        except BaseException as error:
            panicked = _is_panic(error)
            raise
        finally:
            os.dup2(errors, 2)
            os.close(errors)
            size = os.fstat(held).st_size
            if size and not panicked:
                os.write(2, os.pread(held, size, 0))
            os.close(held)
