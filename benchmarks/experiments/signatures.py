"""The failures that readers of the paper report, looked for on any models and texts.

    python -m benchmarks.experiments.signatures [MODEL ...] [--domain CALIBRATION TEXT]
                       [--domain FILE] [--scheme w4a4] [--windows N] [--quick] [--out DIR]

Small models and a second domain: KL of every method over that of the Kronecker Hadamard rounded to
nearest, calibrated on the first domain and evaluated on all; the lines below the table say where
singlequant and the default recipe lose. Memory: the peak of each stage beside the model's size. A
model that cannot be quantized is a row with the reason. The run can be stopped and started again.
"""

from __future__ import annotations

import hashlib
import json
from argparse import Namespace
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from numpy.typing import NDArray

import singlequant as sq
from singlequant._C import FormatError
from singlequant.files import folder_bytes
from singlequant.study.evaluate import default_seq_len
from singlequant.sweep.measure import PeakMemory, anonymous_bytes, measure, reason
from singlequant.sweep.prepare import prepare
from singlequant.sweep.sweep import Job, sweep
from singlequant.sweep.text_file import read_text

from . import command, report
from .kept import KeptRows

NAME, YARDSTICK = "signatures", "hadamard"
STAGES = ("read", "calibrate", "solve", "quantize", "evaluate")
PROBLEMS = (ValueError, FormatError, OSError, MemoryError)


# ---- quality ------------------------------------------------------------------------------------


def quality(model: Path, kinds: Sequence[command.Domain], arguments: Namespace) -> list[dict]:
    """A row per text and recipe; one row with the error where the model cannot be quantized."""
    default = sq.QuantConfig(scheme=arguments.scheme).method
    methods = list(dict.fromkeys(["none", "paper", YARDSTICK, "singlequant", default]))
    try:
        with command.progress(model.name) as progress:
            found = sq.compare(
                model, methods=methods, texts=[kind.text for kind in kinds], progress=progress,
                calibration=kinds[0].calibration, defaults=True,
                **command.comparison_options(arguments),
            )
    except PROBLEMS as error:
        return [{"model": model.name, "error": reason(error)}]
    parameters = parameter_count(model)
    rows = []
    for t, text in enumerate(found.texts):
        by_name = {"default" if r.default else r.method: r for r in found.rows}
        yardstick = by_name[YARDSTICK]
        for name, row in by_name.items():
            line = {"model": found.model, "parameters": parameters, "text": text, "recipe": name}
            if row.error:
                line["error"] = row.error
            else:
                result = row.results[t]
                line |= {"perplexity": result.perplexity, "kl_mean": result.kl_mean,
                         "top1_agreement": result.top1_agreement}
                if row.config and yardstick.results and yardstick.results[t].kl_mean > 0:
                    line["kl_ratio"] = result.kl_mean / yardstick.results[t].kl_mean
            rows.append(line)
    return rows


def parameter_count(model: Path) -> int:
    """Numbers in the embedding, the head and the layers' linears."""
    checkpoint = sq.load_checkpoint(model)
    count = checkpoint.embedding.size
    if not checkpoint.spec.tied:
        count += checkpoint.head.size
    return int(count + checkpoint.spec.layers * layer_size(checkpoint))


def layer_size(checkpoint: sq.Checkpoint) -> int:
    return sum(linear.weight.size for linear in checkpoint.layer(0).linears.values())


def verdicts(rows: Sequence[dict]) -> list[str]:
    """Where singlequant and the default lose to the yardstick, and on how many they do not."""
    notes = []
    for name in ("singlequant", "default"):
        ratios = {(r["model"], r["text"]): r["kl_ratio"] for r in rows
                  if r.get("recipe") == name and "kl_ratio" in r}
        lost = [f"{model} on {text} ({ratio:.3f})" for (model, text), ratio in ratios.items()
                if ratio > 1]
        notes.append(f"{name} loses to {YARDSTICK} in {len(lost)} of {len(ratios)} cases"
                     + (f": {', '.join(lost)}." if lost else "."))
    return notes + [f"{r['model']}{', ' + r['recipe'] if 'recipe' in r else ''}: {r['error']}"
                    for r in rows if "error" in r]


def draw_quality(rows: Sequence[dict], title: str):
    """KL over the yardstick's: a line per model and text, a marker per recipe."""
    lines = list(dict.fromkeys((r["model"], r["text"]) for r in rows if "kl_ratio" in r))
    if not lines:
        return None
    figure, axes = report.figure(1, 1, 7.0, 1.6 + 0.4 * len(lines))
    if figure is None:
        return None
    axis = axes[0, 0]
    recipes = dict.fromkeys(r["recipe"] for r in rows if "kl_ratio" in r)
    for number, recipe in enumerate(name for name in recipes if name != YARDSTICK):
        same = [r for r in rows if r.get("recipe") == recipe and "kl_ratio" in r]
        axis.plot([r["kl_ratio"] for r in same],
                  [lines.index((r["model"], r["text"])) for r in same],
                  linestyle="", label=recipe, **report.style(number))
    axis.axvline(1, color="0.3", linestyle=":")
    axis.set_yticks(range(len(lines)), labels=[f"{model}\n{text}" for model, text in lines])
    axis.set(ylim=(len(lines) - 0.5, -0.5), xscale="log",
             xlabel="KL / that of the Kronecker Hadamard, to nearest (left is better)")
    report.plain_ticks(axis, "x")
    axis.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    figure.suptitle(title, fontsize="medium")
    return figure


# ---- memory -------------------------------------------------------------------------------------


def quantize_peaks(model: Path, out: Path, scheme: str, tokens: int | None,
                   calibration: Path) -> dict[str, Any]:
    """Quantize by the default recipe; the peak of each stage above this process's start, bytes."""
    options = {} if tokens is None else {"calibration_tokens": tokens}
    config = sq.QuantConfig(scheme=scheme, **options)
    start = anonymous_bytes()
    read = measure(_read, model, config, calibration)
    checkpoint, windows = read.value
    prepared = measure(prepare, checkpoint, config, windows)
    (outcome,) = sweep(prepared.value, windows, [Job(config, out)])
    peaks = {"read": read.peak_memory, **outcome.peaks}
    peaks["solve"] = max(peaks["solve"], prepared.peak_memory)
    # What the sweep promises: a layer in float32, half of it again, and the calibration states.
    states = windows.size * checkpoint.spec.hidden * 4
    return {**{stage: peak - start for stage, peak in peaks.items()},
            "bound": int(1.5 * 4 * layer_size(checkpoint)) + states,
            "calibration_tokens": int(windows.size)}


def _read(model: Path, config: sq.QuantConfig, calibration: Path) -> tuple[sq.Checkpoint, NDArray]:
    checkpoint = sq.load_checkpoint(model)
    return checkpoint, sq.calibration_windows(checkpoint, config, calibration)


def evaluate_peak(out: Path, text: Path, seq_len: int | None, windows: int | None) -> int:
    """The peak of loading and evaluating the packed model, bytes above this process's start."""
    with PeakMemory() as memory:
        model = sq.load(out)
        seq_len = seq_len or default_seq_len(model)
        tokens = model.encode(read_text(text))
        sq.perplexity(model, tokens[: None if windows is None else windows * seq_len], seq_len)
    return memory.peak - memory.start


def memory(model: Path, kind: command.Domain, arguments: Namespace) -> dict[str, Any]:
    """A row: the model's size, the peaks by stage, each also as a share of the size.

    Each half runs in a fresh process: what another left in the allocator does not count.
    """
    with TemporaryDirectory(prefix="singlequant-") as folder:
        out = Path(folder) / "out"
        peaks = _alone(quantize_peaks, model, out, arguments.scheme, arguments.calibration_tokens,
                       kind.calibration)
        peaks["evaluate"] = _alone(evaluate_peak, out, kind.text, arguments.seq_len,
                                   arguments.windows)
        packed = folder_bytes(out)
    row = {"model": model.name, "parameters": parameter_count(model),
           "bytes_on_disk": folder_bytes(model), "packed_bytes": packed,
           "calibration_tokens": peaks["calibration_tokens"], "bound_bytes": peaks["bound"]}
    for stage in STAGES:
        row |= {f"{stage}_bytes": peaks[stage],
                f"{stage}_share": peaks[stage] / row["bytes_on_disk"]}
    return row


def _alone(function: Callable[..., Any], *given: Any) -> Any:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *given).result()


def kept_memory(model: Path, kind: command.Domain, arguments: Namespace) -> dict[str, Any]:
    """`memory`, or the row of an earlier run with the same options."""
    kept = KeptRows(arguments.out / "memory-rows.jsonl")
    facts = [sq.load_checkpoint(model).fingerprint, sq.__version__, arguments.scheme,
             arguments.calibration_tokens, arguments.seq_len, arguments.windows,
             *(read_text(path) for path in (kind.calibration, kind.text))]
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    if key not in kept.rows:
        kept.add(key, memory(model, kind, arguments))
    return dict(kept.rows[key])


def draw_memory(rows: Sequence[dict], title: str):
    """A line per model: its size and the peak of each stage."""
    figure, axes = report.figure(1, 1, 7.0, 1.8 + 0.6 * len(rows))
    if figure is None:
        return None
    axis, places = axes[0, 0], range(len(rows))
    for number, stage in enumerate(STAGES):
        shift = (number - (len(STAGES) - 1) / 2) * 0.14
        axis.plot([row[f"{stage}_bytes"] / 1e6 for row in rows], [y + shift for y in places],
                  linestyle="", label=stage, **report.style(number))
    for key, line, label in (("bytes_on_disk", "-", "the model on disk"),
                             ("bound_bytes", ":", "1.5 layers in float32\nand states")):
        axis.vlines([row[key] / 1e6 for row in rows], [y - 0.4 for y in places],
                    [y + 0.4 for y in places], color="0.3", linestyle=line, label=label)
    axis.set_yticks(places, labels=[row["model"] for row in rows])
    axis.set(ylim=(len(rows) - 0.5, -0.5), xscale="log", xlabel="peak anonymous memory, MB")
    report.plain_ticks(axis, "x")
    axis.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    figure.suptitle(title, fontsize="medium")
    return figure


# ---- the command --------------------------------------------------------------------------------


def report_quality(rows: list[dict], kinds: Sequence[command.Domain], arguments: Namespace) -> None:
    config = sq.QuantConfig(scheme=arguments.scheme)
    title = f"Small models and a second domain, {arguments.scheme.upper()}"
    columns = [("model", "model", ""), ("M parameters", "millions", ".1f"), ("text", "text", ""),
               ("recipe", "recipe", ""), ("perplexity", "perplexity", ".3f"),
               ("KL", "kl_mean", ".5f"), ("KL / Hadamard's", "kl_ratio", ".3f"),
               ("top-1", "top1_agreement", ".3f")]
    for row in rows:
        if "parameters" in row:
            row["millions"] = row["parameters"] / 1e6
    notes = [*verdicts(rows),
             f"Every model was calibrated on {kinds[0].calibration.name} alone. The default is "
             f"{config.method}, weights {config.weights}, clip {config.activation_clip:g}. The "
             "others round weights and activations to nearest without a clip."]
    report.Report("signatures", title, columns, rows, notes).write(
        arguments, figure=draw_quality(rows, title))


def report_memory(rows: list[dict], arguments: Namespace) -> None:
    whole = [row for row in rows if "error" not in row]
    for row in whole:
        for key in ("bytes_on_disk", "packed_bytes", "bound_bytes",
                    *(f"{stage}_bytes" for stage in STAGES)):
            row[key.replace("bytes", "mb")] = row[key] / 1e6
    columns = [("model", "model", ""), ("disk MB", "mb_on_disk", ".1f"),
               ("packed MB", "packed_mb", ".1f")]
    for stage in STAGES:
        columns += [(f"{stage} MB", f"{stage}_mb", ".1f"), ("of disk", f"{stage}_share", ".2f")]
    columns.append(("1.5 layers + states, MB", "bound_mb", ".1f"))
    title = f"Peak anonymous memory by stage, default recipe, {arguments.scheme.upper()}"
    notes = ["The figures are what a process takes beyond one that has only loaded the package. "
             "Mapped files do not count. The stage read covers the checkpoint's header, the "
             "tokenizer and the calibration text. 1.5 layers + states (bound) is the size of a "
             "layer in float32, half of it again, and the calibration tokens' hidden states.",
             *(f"{row['model']}: {row['error']}" for row in rows if "error" in row)]
    report.Report("memory", title, columns, rows, notes).write(
        arguments, figure=draw_memory(whole, title) if whole else None)


def main(argv: Sequence[str] | None = None) -> None:
    options = command.parser(__doc__, NAME, models="*")
    command.add_domains(options)
    arguments = command.parse(options, argv)
    with command.errors_of(NAME), command.domains(arguments.domain) as kinds:
        rows, peaks = [], []
        for model in arguments.model:
            rows += quality(model, kinds, arguments)
            try:
                peaks.append(kept_memory(model, kinds[0], arguments))
            except PROBLEMS as error:
                peaks.append({"model": model.name, "error": reason(error)})
        report_quality(rows, kinds, arguments)
        report_memory(peaks, arguments)


if __name__ == "__main__":
    main()
