#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Write tests/data/families: a small random folder per golden variant, and transformers' logits.

    python tools/make_family_goldens.py [--output FOLDER] [FAMILY ...]

It needs torch and transformers. Each folder NAME-VARIANT holds config.json, model.safetensors,
tokens.npy, and logits.npy, float32, at the tokens that positions.npy names. They share one
tokenizer. The same versions give the same files. Folders that are there are written anew.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import family_models  # noqa: E402
from conftest import write_tokenizer  # noqa: E402
from family_models import FAMILIES, VOCAB  # noqa: E402


def make(name: str, variant: str, folder: Path) -> None:
    """One golden folder."""
    import numpy as np
    import torch

    values = FAMILIES[name].variants[variant]
    model = family_models.random_model(name, variant)
    tokens = family_models.random_tokens(values.text)
    with torch.no_grad():
        logits = model(torch.from_numpy(tokens[None])).logits[0, values.positions].numpy()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as saved:
        family_models.save_model(model, Path(saved))
        for file in ("config.json", "model.safetensors"):
            shutil.copyfile(Path(saved) / file, folder / file)
    np.save(folder / "tokens.npy", tokens)
    np.save(folder / "positions.npy", values.positions)
    np.save(folder / "logits.npy", logits)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("families", nargs="*", metavar="FAMILY", help="all unless named")
    parser.add_argument("--output", type=Path, default=ROOT / "tests" / "data" / "families",
                        help="where the folders go")
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.families if name not in FAMILIES]:
        parser.error(f"FAMILY: expected one of {', '.join(FAMILIES)}, found {unknown[0]!r}")
    arguments.output.mkdir(parents=True, exist_ok=True)
    if not arguments.families:
        write_tokenizer(arguments.output, VOCAB)
    for name, variant in family_models.variants(golden=True):
        if not arguments.families or name in arguments.families:
            make(name, variant, arguments.output / f"{name}-{variant}")


if __name__ == "__main__":
    main()
