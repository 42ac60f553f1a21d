"""What a user writes with the package. A type checker accepts every line; nothing runs it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import singlequant as sq


def by_hand(folder: Path, out: str) -> sq.Model:
    checkpoint = sq.load_checkpoint(folder)
    config = sq.QuantConfig(scheme="w4a8", method="balanced", ignore=("lm_head",))
    windows = sq.calibration_windows(checkpoint, config, "text.txt")
    statistics: Iterator[sq.LayerStatistics] = sq.calibrate(checkpoint, windows)
    rotations: Iterator[sq.LayerRotations] = sq.solve_rotations(statistics, config)
    config, bits = sq.assign_bits(checkpoint, config, windows)
    layers: Iterator[sq.QuantizedLayer] = sq.quantize(checkpoint, rotations, config, bits)
    return sq.load(sq.save(layers, out, checkpoint, config), kv_bits=8)


def measure(model: sq.Model, original: sq.Model) -> float:
    found: sq.Evaluation = sq.perplexity(model, sq.bundled_text("heldout"), 256, original)
    ids: NDArray[np.int64] = model.encode("text")
    logits: NDArray[np.float32] = model.forward(ids[None])
    print(logits.shape, found.kl_mean, model.tokenizer.get_vocab_size())
    return found.perplexity if found.kl_mean is None else found.kl_mean


def study(folder: str) -> None:
    summary: sq.Summary = sq.quantize_folder(folder, "out", sq.QuantConfig(), resume=True)
    comparison: sq.Comparison = sq.compare(folder, methods=["none"], schemes=["w4a8"], windows=2)
    comparison.to_json("c.json")
    comparison.plot("c.png")
    inspection: sq.Inspection = sq.inspect_model(folder, ["hadamard"], layer=0)
    estimate: sq.Estimate = sq.dry_run(folder)
    print(summary, inspection.rows[0].peak, estimate, sq.get_num_threads())
    sq.set_num_threads(2)
    sq.show_runtime()


def cells(x: NDArray[np.float32]) -> None:
    turned: NDArray[np.float32] = sq.rotate(x, sq.hadamard(4), sq.hadamard(8))
    codes = sq.arrays.quantize(turned)
    print(codes, sq.givens_angle(3.0, 4.0), sq.bundled_model() / "config.json")


def session(model: sq.Model) -> None:
    found = model.new_session(1, 16)
    print(found.append([model.encode("a")]).shape)


def write(model: sq.Model) -> None:
    text: str = model.generate("a", max_new_tokens=2)
    texts: list[str] = model.generate(["a", "b"])
    ids: list[int] = model.generate([1, 2], stop_tokens=[3], on_token=lambda sequence, token: None)
    batch: list[list[int]] = model.generate([[1, 2], [3]])
    same: list[int] = model.generate(np.array([1, 2]))
    print(text, texts, ids, batch, same)
