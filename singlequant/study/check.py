# SPDX-License-Identifier: Apache-2.0
"""What quantizing a model cost, measured at once on a little held-out text."""

from __future__ import annotations

from pathlib import Path

from ..checkpoint.folder import Checkpoint, load_checkpoint
from ..config import QuantConfig
from ..runtime.windows import WindowModel
from ..sweep.texts import bundled_text
from .evaluate import Evaluation, evaluate

CHECK_WINDOWS = 4  # of CHECK_LENGTH tokens, or of the model's maximum where that is less
CHECK_LENGTH = QuantConfig.calibration_window


def check(out: str | Path, original: Checkpoint) -> Evaluation:
    """The quantized folder `out` beside the model it was made of, on the first CHECK_WINDOWS
    windows of the bundled held-out text. Calibration never sees that text.

    One layer of either is in memory at a time, as quantizing has it: a model that is larger than
    memory can be checked. All windows are run at once."""
    length = min(CHECK_LENGTH, original.spec.max_position_embeddings)
    tokens = original.encode(bundled_text("heldout"))[: CHECK_WINDOWS * length]
    return evaluate(WindowModel(load_checkpoint(out)), tokens, min(length, len(tokens)),
                    WindowModel(original))
