# SPDX-License-Identifier: Apache-2.0
"""The bundled model and texts, texts of files, and the calibration windows of a text."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..checkpoint.folder import Checkpoint
from ..config import QuantConfig

BUNDLED_MODEL = "stdlib-llama"
WINDOW = 512  # tokens of a calibration window


def bundled_model() -> Path:
    """Folder of the small model that travels with the package."""
    return Path(str(resources.files("singlequant") / "data" / BUNDLED_MODEL))


def bundled_text(name: str) -> str:
    """The bundled "calibration" or "heldout" text."""
    return (resources.files("singlequant") / "data" / f"{name}.txt").read_text("utf-8")


def read_text(path: str | Path) -> str:
    """A text file as UTF-8. ValueError that names the file when it is empty or not UTF-8."""
    path = Path(path)
    try:
        text = path.read_text("utf-8")
    except UnicodeDecodeError as error:
        found = f"byte 0x{error.object[error.start]:02x} at {error.start}"
        raise ValueError(f"{path}: expected UTF-8 text, found {found}") from None
    if not text.strip():
        raise ValueError(f"{path}: expected text, found an empty file")
    return text


def calibration_windows(
    checkpoint: Checkpoint, config: QuantConfig, text: str | Path | None = None
) -> NDArray[np.int64]:
    """Token ids [count, length] to calibrate on, from a text file or the bundled text.

    text: the file's path; None takes the bundled "calibration" text. config.calibration_tokens says
    how many tokens, config.seed which windows; see `choose_windows`. length is WINDOW, or less
    where the model's maximum is less. ValueError names the file when it is empty or too short.
    """
    whole = bundled_text("calibration") if text is None else read_text(text)
    ids = checkpoint.encode(whole)
    window = min(WINDOW, checkpoint.spec.max_position_embeddings)
    try:
        return choose_windows(ids, config.calibration_tokens, window, config.seed)
    except ValueError as error:
        raise ValueError(f"{text or 'bundled text'}: {error}") from None


def choose_windows(
    tokens: Sequence[int] | NDArray[np.integer], count: int, window: int = WINDOW, seed: int = 0
) -> NDArray[np.int64]:
    """Windows [count // window, window] of the tokens [any number] of a calibration text.

    seed 0 takes the first windows, any other draws windows without replacement. A text with fewer
    than `count` tokens gives the windows it has. ValueError when there is not even one.
    """
    tokens = np.asarray(tokens, np.int64)
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
