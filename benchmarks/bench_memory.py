"""Quantizing a made model of any size: peak anonymous memory beside its bound, time and disk.

    python -m benchmarks.bench_memory --widths llama-2-13b --layers 40 --work DIR [--keep]
    python -m benchmarks.bench_memory --page docs/scale.md    the table of that page, anew

The command `singlequant quantize` runs on the made model with the default recipe, as a process of
its own. Ten times a second the anonymous memory of that process and of its children is read. The
bound is the sum of the parts of docs/scale.md, and 1 GiB. The disk's speed is that of reading the
files of the model once, with a cold cache, before the run. The run begins with a cold cache too.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from singlequant import _C, QuantConfig
from singlequant.sweep.measure import anonymous_bytes
from singlequant.sweep.states import states_limit

from . import common
from .bench_quantize import drop_cache, read_speed
from .machines import read_machines
from .made_model import NAMED, Widths, write_checkpoint
from .tables import between, number, percent, table

KIND = "memory"
SHOWN = ("llama-2-13b", "llama-2-70b", "qwen3-30b-a3b")  # whose bounds the page has
RESULTS = Path(__file__).parent / "results"
MARKS = ("<!-- table of benchmarks.bench_memory -->", "<!-- end of it -->")
INTERVAL_SECONDS = 0.1
BLOCK_BYTES = 512  # of what getrusage counts


# ---- the bound ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """What a sweep holds of a layer: in words, how many bytes in words, and how many."""

    what: str
    formula: str
    count: Callable[[Widths, int], float]  # of widths and tokens


def _inputs(w: Widths, tokens: int) -> float:
    """Bytes of the inputs of a layer's sites that are not in files. An expert has a record of its
    own."""
    met = tokens * w.chosen / w.experts if w.experts else tokens
    sites = [(tokens, w.hidden), (tokens, w.q_width)]
    sites += [(met, w.hidden), (met, w.intermediate)] * max(1, w.experts)
    return sum(4 * rows * k for rows, k in sites if 4 * rows * k <= states_limit())


def _codes(w: Widths, tokens: int) -> float:
    """Bytes of a layer in 8 bits, and of its largest linear once more while its panels are made."""
    return w.layer_weights + w.hidden * max(w.intermediate, w.q_width)


def _gram(w: Widths, tokens: int) -> float:
    """Bytes of the widest site's Gram matrix, which its factor takes the place of."""
    return 4.5 * max(w.hidden, w.intermediate, w.q_width) ** 2


def _rotations(w: Widths, tokens: int) -> float:
    """Bytes of the alignment of each site's blocks of k2 inputs, and of its inverse, in float64."""
    sites = [w.hidden, w.q_width, *[w.hidden, w.intermediate] * max(1, w.experts)]
    return sum(16 * k * _C.factor_sizes(k)[1] for k in sites)


PARTS = (
    Part("the residual stream", "4 t hidden", lambda w, t: 4 * t * w.hidden),
    Part("the inputs of the layer's sites, but those in files", "4 t (sum of their k)", _inputs),
    Part("the layer in 8 bits, while it carries the tokens", "a byte a weight; the largest linear "
         "twice", _codes),
    Part("its keys and values, while it carries the tokens", "8 t (outputs of k)",
         lambda w, t: 8 * t * w.kv_width),
    Part("the rotations of the sites", "16 k k2 of each site, k = k1 k2", _rotations),
    Part("a Gram matrix, its factor in its place, and that in 8 bits, under gptq",
         "4.5 k^2 of the widest site", _gram),
    Part("the packed layer, until it is written", "0.6 a weight",
         lambda w, t: 0.6 * w.layer_weights),
    Part("the rest: Python, embedding and head, scratch of a step", "1 GiB", lambda w, t: 1 << 30),
)


def bound(w: Widths, tokens: int) -> float:
    """Bytes of anonymous memory that a sweep of the default recipe may take."""
    return sum(part.count(w, tokens) for part in PARTS)


# ---- the run ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """What was seen at a moment of a run: shards is how many layers were written."""

    seconds: float
    anonymous: int
    shards: int


def descendants(pid: int) -> list[int]:
    """A process and all its children."""
    found = [pid]
    for parent in found:
        try:
            threads = os.listdir(f"/proc/{parent}/task")
            texts = [Path(f"/proc/{parent}/task/{t}/children").read_text() for t in threads]
        except OSError:  # it ended
            continue
        found += [int(child) for text in texts for child in text.split()]
    return found


def count_shards(out: Path) -> int:
    """Files of layers in OUT, or in OUT.partial: the first one has what is outside the layers."""
    folder = out if out.is_dir() else out.with_name(out.name + ".partial")
    return max(0, len([*folder.glob("model-*.safetensors")]) - 1)


def watch(process: subprocess.Popen, out: Path) -> list[Sample]:
    """Samples until a process ends, and one of that moment."""
    samples, start = [], time.perf_counter()
    while not samples or samples[-1].anonymous:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(INTERVAL_SECONDS)
        memory = sum(map(anonymous_bytes, descendants(process.pid)))
        samples.append(Sample(time.perf_counter() - start, memory, count_shards(out)))
    process.wait()
    return samples


def quantize(model: Path, out: Path) -> tuple[list[Sample], dict[str, float], str]:
    """Run the command on a model: samples, what the process used, and what it printed."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "singlequant", "quantize", str(model), str(out)],
            stdout=output, stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(common.ROOT), *sys.path[1:]])})
        try:
            samples = watch(process, out)
        finally:
            process.kill()
            process.wait()
        output.seek(0)
        printed = output.read()
    if process.returncode:
        raise RuntimeError(f"singlequant quantize ended with status {process.returncode}: "
                           f"{printed[-2000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return samples, {
        "wall, s": time.perf_counter() - start,
        "CPU, s": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "read, GB": (after.ru_inblock - before.ru_inblock) * BLOCK_BYTES / 1e9,
        "written, GB": (after.ru_oublock - before.ru_oublock) * BLOCK_BYTES / 1e9,
    }, printed


def peaks_by_layer(samples: Sequence[Sample], layers: int) -> list[float]:
    """GB of anonymous memory, the most between a layer's shard and the one before; the first one
    has the choice of bits as well."""
    return [max((s.anonymous for s in samples if s.shards == i), default=0) / 1e9
            for i in range(layers)]


def weights_bytes(folder: Path) -> int:
    """Bytes of a folder's weights."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def disk_speed(model: Path) -> float:
    """GB/s of reading all files of weights once, with a cold cache. It is cold behind that, too."""
    seconds = 0.0
    for file in sorted(model.glob("*.safetensors")):
        drop_cache(file)
        seconds += file.stat().st_size / 1e9 / read_speed(file)
        drop_cache(file)
    return weights_bytes(model) / 1e9 / seconds


def measure(name: str, layers: int, work: Path) -> dict[str, Any]:
    """The row of a made model. The model and what is made of it lie in `work` for the run; a model
    that is there already is taken, and stays."""
    model, out = work / f"made-{name}-{layers}", work / "out"
    own = not model.exists()
    if own:
        write_checkpoint(model, layers, NAMED[name], "bfloat16")
    disk = disk_speed(model)
    samples, used, printed = quantize(model, out)
    print(printed)
    tokens = QuantConfig().calibration_tokens
    behind = [sample for sample in samples if sample.shards == layers]
    row = {
        "model": name, "layers": layers, "tokens": tokens,
        "peak, GB": max(sample.anonymous for sample in samples) / 1e9,
        "bound, GB": bound(NAMED[name], tokens) / 1e9,
        "peak by layer, GB": peaks_by_layer(samples, layers),
        "peak of the check, GB": max(s.anonymous for s in behind) / 1e9,
        **used, "check, s": behind[-1].seconds - behind[0].seconds,
        "layers per minute": 60 * layers / behind[0].seconds, "disk, GB/s": disk,
        "model, GB": weights_bytes(model) / 1e9, "result, GB": weights_bytes(out) / 1e9,
        "load behind it": os.getloadavg()[2],
        "share of the disk's speed": used["read, GB"] / used["wall, s"] / disk,
    }
    shutil.rmtree(out)
    if own:
        shutil.rmtree(model)
    return row


# ---- the page -----------------------------------------------------------------------------------


def results() -> list[Mapping[str, Any]]:
    """The newest kept result of each model and number of layers, the largest model first."""
    found = {name: result for machine in read_machines(RESULTS)
             for name, result in machine.of(KIND)}
    return sorted(found.values(), key=lambda result: -result["rows"][0]["model, GB"])


def text(kept: Sequence[Mapping[str, Any]]) -> str:
    """Parts and figures of kept results as Markdown."""
    tokens = QuantConfig().calibration_tokens
    lines = [[part.what, part.formula,
              *(number(part.count(NAMED[name], tokens) / 1e9) for name in SHOWN)]
             for part in PARTS]
    lines.append(["together, the bound", "",
                  *(number(bound(NAMED[name], tokens) / 1e9) for name in SHOWN)])
    parts = table(["part", f"bytes, t = {tokens} tokens", *(f"{name}, GB" for name in SHOWN)],
                  lines, 2)
    return "\n\n".join([parts, *runs(kept)])


def runs(kept: Sequence[Mapping[str, Any]]) -> list[str]:
    """Figures of kept results, if any, and what each is of."""
    if not kept:
        return []
    cells = [cells_of(result["rows"][0]) for result in kept]
    header = ["run", *(f"{result['rows'][0]['model']}, {result['rows'][0]['layers']} layers"
                       for result in kept)]
    rows = [[name, *(cell[name] for cell in cells)] for name in cells[0]]
    return [table(header, rows), "\n".join(f"- {source(result)}" for result in kept)]


def cells_of(row: Mapping[str, Any]) -> dict[str, str]:
    """A run's figures by name."""
    layers, third = row["peak by layer, GB"], -(-row["layers"] // 3)
    figures = {
        "peak of anonymous memory, GB": row["peak, GB"], "its bound, GB": row["bound, GB"],
        "peak of the first third of the layers, GB": max(layers[:third]),
        "peak of the last third, GB": max(layers[-third:]),
        "peak of the check, GB": row["peak of the check, GB"],
        "wall time, s": row["wall, s"], "of that, the check, s": row["check, s"],
        "CPU time, s": row["CPU, s"], "layers a minute": row["layers per minute"],
        "the model, GB": row["model, GB"], "the packed folder, GB": row["result, GB"],
        "read from disk, GB": row["read, GB"], "the disk's speed, GB/s": row["disk, GB/s"],
    }
    return {name: number(value) for name, value in figures.items()} | {
        "read over wall time, of the disk's speed": percent(row["share of the disk's speed"])}


def source(result: Mapping[str, Any]) -> str:
    """Of what command, machine and moment a result is."""
    facts = result["environment"]
    arguments = " ".join(common.shown_arguments(facts["argv"]))
    return (f"`python -m benchmarks.bench_memory {arguments}` of {facts['date']}, {facts['cpu']}, "
            f"{facts['threads']} threads, kernels {facts['kernels']['active']}, load "
            f"{facts['load'][0]:.0f} before the run and "
            f"{result['rows'][0]['load behind it']:.0f} in its last quarter of an hour")


# ---- the command --------------------------------------------------------------------------------


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", choices=NAMED, default="llama-2-13b")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--work", type=Path, help="where model and result lie for the run: twice "
                        "the model's size is enough")
    parser.add_argument("--page", type=Path, help="a page whose table is replaced")
    common.add_output(parser, KIND)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse(argv)
    if arguments.page:
        page = between(arguments.page.read_text(), MARKS, text(results()))
        arguments.page.write_text(page)
        return
    environment = common.environment(argv)
    common.print_environment(environment)
    with tempfile.TemporaryDirectory(dir=arguments.work) as own:
        row = measure(arguments.widths, arguments.layers, arguments.work or Path(own))
    for key, value in row.items():
        print(f"{key:<28} {value:.3f}" if isinstance(value, float) else f"{key:<28} {value}")
    common.write_result(
        {"what": KIND, "environment": environment, "rows": [row]}, arguments.json,
        arguments.keep and f"{KIND}-{arguments.widths}-{arguments.layers}-layers")


if __name__ == "__main__":
    main()
