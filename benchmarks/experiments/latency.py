"""Prefill and decode in tokens per second, original against packed, with memory and size.

    python -m benchmarks.experiments.latency MODEL --out DIR [--prefill 512] [--batches 1,16]
        [--context 128] [--decode 8] [--repeats 15] [--schemes w4a4,w4a8,w4a16] [--threads N]

Any supported model. The original runs in its 16-bit path: weights as they are stored, float32
arithmetic through OpenBLAS. All models take turns in each repeat; ratios are of medians to the
original's. Token ids are random: the arithmetic does not depend on them. The online transform
(rotate and quantize the inputs of every site) is also timed alone, on rows of the same shapes.
Writes DIR/latency.json and DIR/latency.png.
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

import singlequant as sq
from singlequant import _C
from singlequant.config import SCHEMES
from singlequant.files import folder_bytes
from singlequant.models.spec import ModelSpec

from .. import common
from . import command, report
from .command import names

NAME = "latency"
NOTES = (
    "The online transform is what a site does to its inputs before the integer product: rotation "
    "and quantization to codes. It is timed alone, on rows of the same shapes. Its share is that "
    "time divided by the time of the whole step. QuaRot and SpinQuant fuse the rotation in front "
    "of q, k, v, gate and up into the weights. At these sites they quantize only.",
    "Peak memory is the largest resident size of a fresh process that loads the model and runs the "
    "prefill, minus what the process held before. Mapped weights count once they are touched.",
)


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    p = command.bare_parser(__doc__, NAME)
    p.add_argument("model", metavar="MODEL", type=Path)
    p.add_argument("--out", metavar="DIR", type=Path, required=True)
    p.add_argument("--prefill", type=int, default=512, metavar="N", help="tokens of the prompt")
    p.add_argument("--batches", type=common.integers, default=[1, 16],
                   metavar="A,B", help="sequences decoded together (default 1,16)")
    p.add_argument("--context", type=int, default=128, metavar="N",
                   help="tokens that a sequence holds before it is decoded")
    p.add_argument("--decode", type=int, default=8, metavar="N", help="steps of one measurement")
    p.add_argument("--repeats", type=int, default=15, metavar="N")
    p.add_argument("--schemes", type=names, default=list(SCHEMES), metavar="A,B")
    p.add_argument("--methods", type=names, metavar="A,B",
                   default=list(dict.fromkeys(("none", "hadamard", sq.QuantConfig().method))),
                   help="(default: %(default)s)")
    p.add_argument("--calibration", type=Path, metavar="FILE", help="default: the bundled text")
    p.add_argument("--threads", type=int, metavar="N", help="default: one per CPU")
    return p


# ---- what is timed ------------------------------------------------------------------------------


class Decoder:
    """A batch of sequences that hold a context; each call decodes some steps more."""

    def __init__(self, model: sq.Model, prompts: np.ndarray, steps: int, calls: int) -> None:
        self.model, self.steps = model, steps
        count, context = prompts.shape
        self.session = model.new_session(count, context + steps * calls)
        hidden = self.session.append(list(prompts)).reshape(count, context, -1)
        self.last = hidden[:, -1]

    def __call__(self) -> None:
        for _ in range(self.steps):
            tokens = self.model.logits(self.last).argmax(axis=1)
            self.last = self.session.append(list(tokens[:, None]))


def prefill(model: sq.Model, prompt: np.ndarray) -> np.ndarray:
    """Logits [vocab] of the token behind a prompt [length], from an empty cache."""
    return model.logits(model.new_session(1, len(prompt)).append([prompt])[-1:])[0]


def transform(model: sq.Model, m: int) -> Callable[[], None]:
    """A call that rotates and quantizes m rows for each site of each layer, and nothing else."""
    checkpoint, config = model.checkpoint, model.checkpoint.quant_config
    rng, work = np.random.default_rng(0), []
    widths: dict[int, np.ndarray] = {}
    for index in range(model.spec.layers):
        layer = checkpoint.layer(index)
        for name, site in model.spec.layer(index).sites.items():
            if site.k not in widths:
                widths[site.k] = rng.standard_normal((m, site.k)).astype(np.float32)
            work.append((widths[site.k], layer.rotations.get(name), layer.clips[name]))

    def run() -> None:
        for x, rotation, clip in work:
            if rotation is not None:
                x = _C.rotate(x, rotation)
            if config.activation_bits < 16:
                _C.quantize(x, config.activation_bits, 0, True, clip, False)

    return run


# ---- memory, in a process of its own ------------------------------------------------------------


def resident_peak(folder: str, length: int, threads: int) -> int:
    """Bytes by which loading a folder and a prefill raise this process's largest resident size."""
    sq.set_num_threads(threads)
    before = _high_water()
    prefill(sq.load(folder), np.zeros(length, np.int64))
    return _high_water() - before


def _high_water() -> int:
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def peak_memory(folder: Path, length: int) -> int:
    """`resident_peak` of a fresh process."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context) as pool:
        return pool.submit(resident_peak, str(folder), length, sq.get_num_threads()).result()


# ---- the experiment -----------------------------------------------------------------------------


def build(arguments: argparse.Namespace, folder: Path) -> dict[tuple[str, str], Path]:
    """(scheme, method) -> packed folder; the original's first."""
    folders = {("16-bit", "original"): arguments.model}
    for scheme in arguments.schemes:
        for method in arguments.methods:
            out = folder / f"{scheme}-{method}"
            config = sq.QuantConfig(scheme=scheme, method=method, bits=4.0)
            sq.quantize_folder(arguments.model, out, config, arguments.calibration)
            folders[scheme, method] = out
    return folders


def measure(
    models: Mapping[tuple[str, str], sq.Model], arguments: argparse.Namespace
) -> dict[tuple[str, str], dict[str, Any]]:
    """Tokens per second, ratios and the transform's share of each model, phase by phase."""
    vocab = next(iter(models.values())).spec.vocab
    ids = np.random.default_rng(0).integers(0, vocab, (max(arguments.batches), arguments.context))
    prompt = np.random.default_rng(1).integers(0, vocab, arguments.prefill)
    found: dict[tuple[str, str], dict[str, Any]] = {key: {} for key in models}

    def phase(name: str, tokens: int, steps: int, rows: int, calls: Mapping) -> None:
        transforms = {(*key, "transform"): transform(model, rows)
                      for key, model in models.items() if model.checkpoint.quantized}
        seconds = common.interleave({**calls, **transforms}, 0.0, arguments.repeats,
                                    arguments.repeats)
        first = next(iter(models))
        for key, values in found.items():
            median = seconds[key]["median"]
            values[f"{name}_seconds"] = seconds[key]
            values[f"{name}_tokens_per_second"] = tokens / median
            values[f"{name}_ratio"] = seconds[first]["median"] / median
            alone = seconds.get((*key, "transform"))
            values[f"{name}_transform_share"] = alone and steps * alone["median"] / median

    phase("prefill", len(prompt), 1, len(prompt),
          {key: lambda m=model: prefill(m, prompt) for key, model in models.items()})
    for batch in arguments.batches:
        # one call more than the repeats: the first is not timed
        calls = {key: Decoder(model, ids[:batch], arguments.decode, arguments.repeats + 1)
                 for key, model in models.items()}
        phase(f"decode_{batch}", batch * arguments.decode, arguments.decode, batch, calls)
    return found


def check(arguments: argparse.Namespace, spec: ModelSpec) -> None:
    """ValueError names the option that does not suit the model."""
    limit = spec.max_position_embeddings
    decoded = arguments.context + arguments.decode * (arguments.repeats + 1)
    for name, value in (("repeats", arguments.repeats), ("context", arguments.context),
                        ("decode", arguments.decode), ("prefill", arguments.prefill),
                        ("batches", min(arguments.batches))):
        if value < 1:
            raise ValueError(f"--{name}: expected at least 1, found {value}")
    for name, value in (("prefill", arguments.prefill),
                        ("context + decode * (repeats + 1)", decoded)):
        if value > limit:
            raise ValueError(f"--{name}: expected at most {limit} tokens, the model's maximum, "
                             f"found {value}")


def columns_of(batches: Sequence[int]) -> list[tuple[str, str, str]]:
    """(header, key of a row, format) of the table."""
    phases = [("prefill", "prefill")]
    phases += [(f"decode_{batch}", f"decode, batch {batch}") for batch in dict.fromkeys(batches)]
    columns = [("scheme", "scheme", ""), ("method", "method", "")]
    for key, name in phases:
        columns += [(f"{name}: tokens/s", f"{key}_tokens_per_second", ".0f"),
                    ("to 16-bit", f"{key}_ratio", ".2f"),
                    ("transform's share", f"{key}_transform_share", ".2f")]
    return [*columns, ("peak MB", "peak_memory_MB", ".1f"), ("disk MB", "disk_MB", ".1f")]


def draw(rows: Sequence[Mapping[str, Any]], title: str):
    """Ratios to the 16-bit path, a panel per phase."""
    phases = [key.removesuffix("_ratio") for key in rows[0] if key.endswith("_ratio")]
    figure = report.new_figure(figsize=(1 + 4 * len(phases), 1.2 + 0.35 * len(rows)))
    if figure is None:
        return None
    figure.suptitle(title, fontsize="medium")
    labels = [f"{row['scheme']} {row['method']}" for row in rows]
    for axis, phase in zip(np.atleast_1d(figure.subplots(1, len(phases), sharey=True)), phases,
                           strict=True):
        ratios = [row[f"{phase}_ratio"] for row in rows]
        axis.barh(range(len(rows)), ratios)
        axis.axvline(1, color="black", lw=0.8)
        for y, row in enumerate(rows):
            axis.annotate(f"{row[f'{phase}_tokens_per_second']:.0f}/s", (ratios[y], y),
                          xytext=(3, 0), textcoords="offset points", va="center", fontsize="small")
        axis.set_yticks(range(len(rows)), labels=labels)
        axis.set(title=phase.replace("_", ", batch "), xlabel="tokens/s, the 16-bit path's = 1")
        axis.margins(x=0.2)
    axis.invert_yaxis()
    return figure


def run_experiment(arguments: argparse.Namespace) -> None:
    """Build, load, measure, write."""
    checkpoint = sq.load_checkpoint(arguments.model)
    checkpoint.require_unquantized()
    check(arguments, checkpoint.spec)
    if arguments.threads is not None:
        sq.set_num_threads(arguments.threads)
    environment = common.environment(arguments.argv)
    common.print_environment(environment)
    rows = []
    with tempfile.TemporaryDirectory(prefix="latency-") as folder:
        folders = build(arguments, Path(folder))
        found = measure({key: sq.load(path) for key, path in folders.items()}, arguments)
        for (scheme, method), path in folders.items():
            rows.append({"scheme": scheme, "method": method, **found[scheme, method],
                         "peak_memory_MB": peak_memory(path, arguments.prefill) / 1e6,
                         "disk_MB": folder_bytes(path) / 1e6})
    model = checkpoint.path.resolve().name
    title = (f"{model}, prefill of {arguments.prefill} tokens, decode behind {arguments.context}, "
             f"threads: {environment['threads']}")
    report.Report(NAME, title, columns_of(arguments.batches), rows, NOTES, model).write(
        arguments, environment, draw(rows, title))


def main(argv: Sequence[str] | None = None) -> None:
    with command.errors_of(NAME):
        run_experiment(command.parse(parser(), argv))


if __name__ == "__main__":
    main()
