# SPDX-License-Identifier: Apache-2.0
"""The bundled model and texts, texts of files, and the calibration windows of a text."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..checkpoint.folder import Checkpoint
from ..config import QuantConfig
from ..rows import token_ids
from .self_text import written_windows
from .text_file import drawn_windows, first_tokens, is_large, read_text

BUNDLED_MODEL = "stdlib-llama"
DEFAULT_TEXT = "broad"  # the bundled text that models are calibrated on
SELF, MIXED = "self", "mixed"  # words in place of a text: the model writes it, or half of it
WHOLE_BYTES = 1 << 20  # of a text that is read whole to draw windows from it
WHOLE_BYTES_PER_TOKEN = 16  # or when most of it would be drawn


def bundled_model() -> Path:
    """Folder of the small model that travels with the package."""
    return Path(str(resources.files("singlequant") / "data" / BUNDLED_MODEL))


def bundled_path(name: str) -> Path:
    """File of a bundled text; see `bundled_text`."""
    return Path(str(resources.files("singlequant") / "data" / f"{name}.txt"))


def bundled_text(name: str) -> str:
    """A bundled text.

    "broad" is the default to calibrate on: short documents of ten kinds, in many languages
    (docs/calibration.md). "calibration" and "heldout" are documentation of Python, which the
    bundled model was trained on the rest of.
    """
    return read_text(bundled_path(name))


def calibration_windows(
    checkpoint: Checkpoint, config: QuantConfig, text: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> NDArray[np.int64]:
    """Token ids [count, length] to calibrate on, from a text file, the bundled text or the model.

    text: the file's path; None takes the bundled "broad" text. The str "self" has the model write
    all windows (`written_windows`), "mixed" every second one, behind one of the bundled text's; a
    Path, or "./self", is a file in any case. config.calibration_tokens says how many tokens,
    config.seed which windows, config.calibration_window their length; it is less where the model's
    maximum is less. Seed 0 takes a text's first windows. Any other seed draws windows: of a file up
    to WHOLE_BYTES as `choose_windows` does, of a larger one as `drawn_windows` does. Only what the
    windows need is read. progress(tokens done, tokens) is called as the model writes.
    ValueError names the file when it is empty or too short.
    """
    window = min(config.calibration_window, config.calibration_tokens,
                 checkpoint.spec.max_position_embeddings)
    word, count = written_by_model(text), config.calibration_tokens // window
    if word == SELF:
        return written_windows(checkpoint, count, window, config.seed, progress)
    if word == MIXED:
        if count < 2:
            raise ValueError(f"calibration: expected at least 2 windows for {MIXED!r}, found "
                             f"calibration_tokens {config.calibration_tokens} in windows of "
                             f"{window}")
        broad = _text_windows(checkpoint, None, (count + 1) // 2 * window, window, config.seed)
        return _interleaved(broad, written_windows(checkpoint, min(count // 2, len(broad)), window,
                                                   config.seed, progress))
    return _text_windows(checkpoint, text, config.calibration_tokens, window, config.seed)


def written_by_model(text: str | Path | None) -> str | None:
    """The word of a `calibration` that has the model write, SELF or MIXED; None for a file."""
    return text if isinstance(text, str) and text in (SELF, MIXED) else None


def written_tokens(text: str | Path | None, windows: NDArray[np.int64]) -> int:
    """How many tokens of windows [count, length], made of `text`, the model wrote itself."""
    written = {SELF: len(windows), MIXED: len(windows) // 2}
    return written.get(written_by_model(text), 0) * windows.shape[1]


def _interleaved(first: NDArray[np.int64], second: NDArray[np.int64]) -> NDArray[np.int64]:
    """Windows [n, length] and [n or n - 1, length], one of each in turn."""
    windows = np.empty((len(first) + len(second), first.shape[1]), np.int64)
    windows[0::2], windows[1::2] = first, second
    return windows


def _text_windows(
    checkpoint: Checkpoint, text: str | Path | None, count: int, window: int, seed: int
) -> NDArray[np.int64]:
    """Windows [count // window, window] of a text file, or of the bundled text."""
    path = bundled_path(DEFAULT_TEXT) if text is None else text
    if seed and is_large(path, max(WHOLE_BYTES, WHOLE_BYTES_PER_TOKEN * count)):
        return drawn_windows(checkpoint.encode, path, count // window, window, seed)
    ids = first_tokens(checkpoint.encode, path, None if seed else count)
    try:
        return choose_windows(ids, count, window, seed)
    except ValueError as error:
        raise ValueError(f"{text or 'bundled text'}: {error}") from None


def choose_windows(
    tokens: Sequence[int] | NDArray[np.integer], count: int,
    window: int = QuantConfig.calibration_window, seed: int = 0,
) -> NDArray[np.int64]:
    """Windows [count // window, window] of the tokens [any number] of a calibration text.

    seed 0 takes the first windows, any other draws windows without replacement. A text with fewer
    than `count` tokens gives the windows it has. ValueError when there is not even one.
    """
    tokens = token_ids(tokens, "tokens")
    if count < 1:
        raise ValueError(f"calibration_tokens: expected at least 1, got {count}")
    if window < 1:
        raise ValueError(f"window: expected at least 1 token, got {window}")
    window = min(window, count)
    available = len(tokens) // window
    if available == 0:
        raise ValueError(
            f"calibration text: expected at least one window of {window} tokens, got {len(tokens)}"
        )
    wanted = min(count // window, available)
    windows = tokens[: available * window].reshape(available, window)
    if seed:
        chosen = np.random.default_rng(seed).permutation(available)[:wanted]
        return windows[np.sort(chosen)]
    return windows[:wanted]


def token_digest(tokens: NDArray[np.int64]) -> str:
    """sha256 of token ids, in hexadecimal: equal for equal tokens in the same order."""
    return hashlib.sha256(np.ascontiguousarray(tokens)).hexdigest()
