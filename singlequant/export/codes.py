# SPDX-License-Identifier: Apache-2.0
"""What formats that keep the codes of a packed folder ask of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..methods.registry import METHODS

if TYPE_CHECKING:
    from ..checkpoint.folder import Checkpoint


def rotated_sites(checkpoint: Checkpoint) -> list[str]:
    """The sites of a packed folder that are rotated at inference: "model.layers.0.rotations.o"."""
    names = (name.rpartition(".")[0] for name in checkpoint.tensors if ".rotations." in name)
    return list(dict.fromkeys(names))


def require_own_inputs(checkpoint: Checkpoint, to: str) -> None:
    """ValueError unless every packed linear reads its inputs as the model makes them."""
    if not checkpoint.quantized:
        raise ValueError(f"{checkpoint.path}: {to}: expected a packed folder, whose codes it "
                         "keeps, found an unquantized model: quantize it first")
    rotated = rotated_sites(checkpoint)
    if rotated:
        plain = [row.name for row in METHODS.values() if not row.rotates and not row.aligns]
        raise ValueError(
            f"{checkpoint.path}: {to}: expected codes of weights that read their inputs as they "
            f"are, found a rotation that runs beside them ({rotated[0]}): quantize with --method "
            f"{' or '.join(plain)} (of a folder that --to rotated-hf made, for a rotation inside "
            f"the weights), or choose --to hf or gguf, which turn weights back")
