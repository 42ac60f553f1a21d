"""Which arrangement of Hadamard, ART and URT is best, and which activation clip, on given models.

    python -m benchmarks.bench_rotate MODEL [MODEL ...] --calibration FILE --text FILE
                                      [--table arrangements|clip] [--windows 16] [--seq-len 512]
                                      [--quick] [--json FILE]

error = mean over linears of |Q(x) Q(W)^T - x W^T|^2 / |x W^T|^2 on tokens of the text that took no
part in the calibration; KL = nats per token from the original model. --quick leaves KL out.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np

import singlequant as sq
from singlequant import arrays
from singlequant.methods import singlequant
from singlequant.methods.solve import solve_site
from singlequant.rotations import LayerRotations
from singlequant.rows import rotate_rows
from singlequant.sweep.texts import choose_windows

from . import common, tables

VARIANTS = {
    "none": "none",
    "paper": "paper",
    "paper without URT (art)": "art",
    "paper without ART (urt)": "urt",
    "hadamard": "hadamard",
}
ARRANGED = {
    "H, ART": {"art": "first", "rounds": 0},
    "H, 2 sweeps of tokens": {"art": "no", "rounds": 2, "weight_share": 0.0},
    "H, 1 sweep of both": {"art": "no", "rounds": 1},
    "H, 2 sweeps of both": {"art": "no", "rounds": 2},
    "H, 4 sweeps of both": {"art": "no", "rounds": 4},
    "H, ART, 2 sweeps of both": {"art": "first", "rounds": 2},
    "H, 2 sweeps of both, ART": {"art": "last", "rounds": 2},
    "2 sweeps of both, no H": {"art": "no", "rounds": 2, "hadamard": False},
}
for _name, _options in ARRANGED.items():
    VARIANTS[_name] = lambda site, options=_options: singlequant.build(site, **options)
CLIPS = (0.7, 0.75, 0.8, 0.85, 0.9, 1.0)
ROUNDINGS = {"rtn": {"weights": "rtn", "clip": 1.0}, "mse": {"weights": "mse"}}


class Bench:
    """One model, its calibration statistics and its text."""

    def __init__(self, folder: Path, arguments: argparse.Namespace) -> None:
        self.checkpoint = sq.load_checkpoint(folder)
        self.original = sq.load(folder)
        config = sq.QuantConfig()
        windows = sq.calibration_windows(self.checkpoint, config, arguments.calibration)
        self.statistics = list(sq.calibrate(self.checkpoint, windows, keep_inputs=False))
        tokens = self.original.encode(arguments.text.read_text())
        self.tokens = tokens[: arguments.windows * arguments.seq_len]
        self.seq_len = arguments.seq_len
        held = choose_windows(self.tokens, 1024)
        self.held = list(sq.calibrate(self.checkpoint, held, keep_inputs=False))

    def solve(self, variant) -> list[LayerRotations]:
        return [
            LayerRotations(layer.index, {n: solve_site(s, variant)
                                         for n, s in layer.sites.items()})
            for layer in self.statistics
        ]

    def error(self, rotations: list[LayerRotations], config: sq.QuantConfig) -> float:
        """Mean relative squared error of the linears' outputs."""
        errors = []
        for layer, held in zip(rotations, self.held, strict=True):
            weights = self.checkpoint.layer(layer.layer)
            for name, site in self.checkpoint.spec.layer(layer.layer).sites.items():
                x, rotation = held.sites[name].sample, layer.sites[name]
                x_q = rounded(rotate_rows(x, rotation), clip=config.activation_clip)
                for role in site.roles:
                    w = weights.linears[role].weight.astype(np.float32)
                    w_q = rounded(rotate_rows(w, rotation), search=config.weights == "mse")
                    y = x @ w.T
                    errors.append(((x_q @ w_q.T - y) ** 2).sum() / (y**2).sum())
        return float(np.mean(errors))

    def divergence(self, rotations: list[LayerRotations], config: sq.QuantConfig) -> float:
        with tempfile.TemporaryDirectory() as folder:
            layers = sq.quantize(self.checkpoint, rotations, config)
            model = sq.load(sq.save(layers, Path(folder) / "out", self.checkpoint, config))
            return sq.perplexity(model, self.tokens, self.seq_len, self.original).kl_mean


def print_arrangements(bench: Bench, quick: bool) -> list[dict[str, object]]:
    """W4A4, rounded plainly and with searched and fixed clips, one row per arrangement."""
    rows = []
    print(tables.table(["arrangement", "error rtn", "error mse", "KL rtn", "KL mse"], []))
    for name, variant in VARIANTS.items():
        rotations, row = bench.solve(variant), {"arrangement": name}
        for rounding, options in ROUNDINGS.items():
            config = sq.QuantConfig("w4a4", bits=4.0, **options)
            row[f"error {rounding}"] = bench.error(rotations, config)
            if not quick:
                row[f"kl {rounding}"] = bench.divergence(rotations, config)
        rows.append(row)
        kl = [f"{row[f'kl {r}']:.5f}" if f"kl {r}" in row else "" for r in ROUNDINGS]
        errors = [f"{row[f'error {r}']:.5f}" for r in ROUNDINGS]
        print(tables.line([name, *errors, *kl]), flush=True)
    return rows


def print_clips(bench: Bench) -> list[dict[str, object]]:
    """KL of `singlequant` with mse weights, a row per scheme and a column per activation clip."""
    rotations, rows = bench.solve("singlequant"), []
    print(tables.table(["scheme", *(f"{clip:g}" for clip in CLIPS)], []))
    for scheme in ("w4a4", "w4a8"):
        row = {"scheme": scheme}
        for clip in CLIPS:
            config = sq.QuantConfig(scheme, "singlequant", "mse", 4.0, clip=clip)
            row[f"clip {clip:g}"] = bench.divergence(rotations, config)
        rows.append(row)
        print(tables.line([scheme, *(f"{row[f'clip {c:g}']:.5f}" for c in CLIPS)]), flush=True)
    return rows


def rounded(x: np.ndarray, clip: float = 1.0, search: bool = False) -> np.ndarray:
    """x [m, k] through int4 and back, one scale per row."""
    codes, scales, _ = arrays.quantize(x, clip=clip, search=search)
    return arrays.dequantize(codes, scales)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--table", choices=("arrangements", "clip"), default="arrangements")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--quick", action="store_true")
    common.add_output(parser)
    arguments = parser.parse_args()
    environment, rows = common.environment(), []
    common.print_environment(environment)
    for folder in arguments.models:
        bench = Bench(folder, arguments)
        print(f"\n{folder.name}, {len(bench.tokens)} tokens of {arguments.text.name}\n")
        found = (print_clips(bench) if arguments.table == "clip"
                 else print_arrangements(bench, arguments.quick))
        rows += [{"model": folder.name, **row} for row in found]
    common.write_result({"environment": environment, "rows": rows}, arguments.json)


if __name__ == "__main__":
    main()
