# SPDX-License-Identifier: Apache-2.0
"""What the tests of the packed folder share: random layers written to one, and changes to it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from conftest import random_layer, write_json
from safetensors.numpy import load_file, save_file

from singlequant.checkpoint.folder import Checkpoint
from singlequant.config import QuantConfig
from singlequant.export.writer import ModelWriter

ORDERS = {"qkv": (8, 8), "o": (4, 16), "gate_up": (8, 8), "down": (12, 8)}
CONFIG = QuantConfig("w4a4", bits=4)
Q0 = "model.layers.0.self_attn.q_proj"


def write(source: Checkpoint, out: Path, config: QuantConfig = CONFIG, **options: Any) -> list[Any]:
    """Writes random layers to out; returns (QuantizedLayer, codes) of each."""
    layers = [random_layer(source, config, i, **options) for i in range(source.spec.layers)]
    with ModelWriter(out, source, config) as writer:
        for layer, _ in layers:
            writer.write_layer(layer)
        assert writer.finish() == out
    return layers


def partial(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


def edit_tensors(folder: Path, **changes: np.ndarray | None) -> None:
    """Replaces, adds or removes tensors of layer 0's shard and its index."""
    shard = folder / "model-00002-of-00003.safetensors"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    tensors = load_file(shard)
    for name, value in changes.items():
        tensors.pop(name, None)
        index["weight_map"].pop(name, None)
        if value is not None:
            tensors[name] = value
            index["weight_map"][name] = shard.name
    save_file(tensors, shard)
    write_json(folder / "model.safetensors.index.json", index)
