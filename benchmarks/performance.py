"""docs/performance.md and the summary's table of speed from the JSON in results/.

    python -m benchmarks.performance [--from benchmarks/results] [--out docs/performance.md] \
        [--summary docs/summary.md]

A folder of results is a machine; of several files of one name the newest counts. The text around
the figures is performance.template.md's, and a machine's notes.md (where an aim is out of reach:
the profile and the bound) follows its tables. No figure stands here: all come from the files.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from singlequant import files

from . import bench_peers, common
from .aims import aims
from .machines import (
    OURS,
    RIVALS,
    Machine,
    end_to_end_title,
    mean_share,
    peers_title,
    read_machines,
)
from .tables import number, percent, table, times

FOLDER = Path(__file__).resolve().parent
TEMPLATE = FOLDER / "performance.template.md"
GENERATED = "<!-- generated -->"
BEGIN, END = "<!-- performance:begin -->", "<!-- performance:end -->"


def describe(environment: Mapping[str, Any]) -> str:
    kernels = environment["kernels"]
    return (f"The machine is {environment['cpu']} with {environment['cpus']} CPUs. The kernel "
            f"tables that run on it are {', '.join(kernels['runnable'])}. System: "
            f"{environment['system']}. BLAS: {environment['blas']}.")


def command(script: str, environment: Mapping[str, Any]) -> str:
    """What was run, when, at which commit and how busy the machine was."""
    shown = " ".join([script, *common.shown_arguments(environment.get("argv", []))])
    return (f"`python -m benchmarks.{shown}`, {environment['date']}, commit "
            f"{environment['commit']}, load {environment['load'][0]} before the run.")


# ---- sections -----------------------------------------------------------------------------------


def peers_section(result: Mapping[str, Any]) -> str:
    """Speeds of every peer, ratios, shares, who was skipped and why."""
    rows = result["rows"]
    ms = sorted({r["m"] for r in rows if "gops" in r})
    shapes = ", ".join(f"{n}x{k}" for n, k in result["shapes"])
    text = [f"### {peers_title(result)}", command("bench_peers", result["environment"]),
            "The figures are GOP/s, as the geometric mean over the shapes. A cell is empty where "
            f"a peer has no figure for one of them. The shapes (outputs x inputs): {shapes}."]
    lines = []
    for name, about in result["peers"].items():
        cells = []
        for m in ms:
            gops = bench_peers.speeds(rows, m).get(name, {})
            whole = len(gops) == len(result["shapes"])
            cells.append(number(bench_peers.geometric_mean(list(gops.values()))) if whole else "")
        if any(cells):
            lines.append([name, about["kind"], about["activations"], *cells])
    text.append(table(["", "kind", "activations", *(f"m = {m}" for m in ms)], lines, 3))
    text.append("Our speed divided by that of the fastest peer of each kind. The ratio is taken "
                "shape by shape, and the table gives the geometric mean:")
    text.append(table(["", "against", *(f"m = {m}" for m in ms)], ratio_lines(rows, ms), 2))
    text.append(shares_table(result, ms))
    skipped = [f"{name}: {about['skipped']}" for name, about in result["peers"].items()
               if "skipped" in about]
    failed = sorted({f"{r['peer']}: {r['failed']}" for r in rows if "failed" in r})
    if skipped or failed:
        text.append("These peers were not measured, for the reason given:\n\n"
                    + "\n".join(f"- {line}" for line in [*skipped, *failed]))
    versions = [f"{name}: {about['version']}" for name, about in result["peers"].items()
                if "version" in about and about["kind"] in RIVALS]
    text.append("Versions of the peers:\n\n" + "\n".join(f"- {line}" for line in versions))
    return "\n\n".join(text)


def ratio_lines(rows: Sequence[Mapping[str, Any]], ms: Sequence[int]) -> list[list[str]]:
    lines = []
    for ours in bench_peers.of_kinds(rows, "ours"):
        for kind in RIVALS:
            rivals = bench_peers.of_kinds(rows, kind)
            found = [bench_peers.ratio_to(rows, ours, m, rivals) for m in ms]
            if any(found):
                cells = [times(f["ratio"]) if f else "" for f in found]
                lines.append([ours, f"best {kind}", *cells])
    return lines


def shares_table(result: Mapping[str, Any], ms: Sequence[int]) -> str:
    rows = result["rows"]
    names = [n for n in bench_peers.of_kinds(rows, "ours", "bound") if n != "read_loop"]
    lines = [[n, *(percent(mean_share(rows, n, m, "share_of_peak")) for m in ms),
              percent(mean_share(rows, n, 1, "share_of_read"))] for n in names]
    peaks = "\n".join(f"- {step} {rate:.0f}" for step, rate in result["peaks"].items())
    reads = [r["gbs"] for r in rows if r["peer"] == "read_loop" and r["m"] == 1 and "gbs" in r]
    text = f"The peaks of one thread in the same run, in GOP/s:\n\n{peaks}\n\n"
    if reads:
        text += (f"The read loop reads {number(bench_peers.geometric_mean(reads))} GB/s from the "
                 "same panels. ")
    return text + ("The table gives each speed as a share of the peak of its multiply step. The "
                   "last column gives it as a share of the read loop's:\n\n") + table(
        ["", *(f"of the peak, m = {m}" for m in ms), "of reading, m = 1"], lines)


def ladder_section(result: Mapping[str, Any]) -> str:
    n, k = result["shape"]
    lines = [[r["table"], r["scheme"], str(r["m"]), number(r["gops"]), number(r["bare_gops"]),
              percent(r["bare_share_of_peak"]), percent(r.get("share_of_read"))]
             for r in result["rows"]]
    text = ["### Kernel ladder", command("kernel_ladder", result["environment"]),
            f"The linear has {n} outputs and {k} inputs, and runs on one thread. The column GOP/s "
            "includes the quantization of the activations, the column bare leaves it out. The "
            "share of the measured peak is that of the bare kernel. The share of reading compares "
            "GOP/s, quantization included, with the speed of the read loop.",
            table(["table", "scheme", "m", "GOP/s", "bare", "of the peak", "of reading"], lines, 2)]
    if result["transform"]:
        text.append("The time to rotate and quantize the activations, as a share of the time of "
                    "the whole linear:")
        text.append(table(["table", "scheme", "m", "share"], [
            [r["table"], r["scheme"], str(r["m"]), f"{r['share']:.1%}"]
            for r in result["transform"]], 2))
    if result["threads"]:
        ratio = result["cores"]["ratio"]
        text.append("The speed of several threads divided by that of one. Two CPUs of this "
                    f"machine do {times(ratio)} the integer work of one:")
        schemes = [key for key in result["threads"][0] if key.startswith("w4")]
        text.append(table(["table", "threads", "m", *schemes], [
            [r["table"], str(r["threads"]), str(r["m"]), *(times(r[s]) for s in schemes)]
            for r in result["threads"]]))
    return "\n\n".join(text)


def end_to_end_section(name: str, result: Mapping[str, Any]) -> str:
    lines = []
    phases = list(dict.fromkeys((r["phase"], r["batch"]) for r in result["rows"]))
    for r in sorted(result["rows"], key=lambda r: (phases.index((r["phase"], r["batch"])),
                                                   -r["tokens_per_s"]["median"])):
        t = r["tokens_per_s"]
        note = ", ".join(filter(None, (part.strip() for part in (r.get("note") or "").split("|"))))
        lines.append([r["engine"], r["kind"], r["phase"], str(r["batch"]), number(t["median"]),
                      f"{number(t['low'])} - {number(t['high'])}", note])
    return "\n\n".join([
        f"### {end_to_end_title(name)}",
        command("end_to_end", result["environment"]), "Tokens per second, median and quartiles:",
        table(["engine", "kind", "phase", "batch", "tokens/s", "quartiles", "note"], lines, 3,
              last=True)])


def quantize_figures(result: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Name -> row of what is no stage; an indented name belongs to the one above it."""
    found, above = {}, ""
    for row in result["rows"]:
        if "figure" in row:
            name = row["figure"]
            above = above if name.startswith(" ") else name
            found[f"{above}: {name.strip()}" if name.startswith(" ") else name] = row
    return found


def quantize_section(result: Mapping[str, Any]) -> str:
    """Seconds per 10^9 weights, beside what bounds them."""
    rows = result["rows"]
    keys = ("cold, s per 10^9", "warm, s per 10^9", "CPU, s per 10^9", "whole, s per 10^9",
            "target, s per 10^9", "peak memory, MB", "bound, MB")
    text = ["### Quantizing", command("bench_quantize", result["environment"]),
            "One layer in the shapes of LLaMA-2-7B is read, rotated, rounded, packed and written. "
            "The times are seconds per 10^9 weights. The file is on disk (cold) or in the page "
            "cache (warm). The whole is that and the stages below, with a warm file. The target is "
            "the time that the paper reports.",
            table(["weights", *keys], [[r["weights"], *(number(r.get(k)) for k in keys)]
                                       for r in rows if keys[0] in r]),
            "The stages before these, and what the machine can do:",
            table(["", "", "unit"], [[name, number(r["value"]), r["unit"]]
                                     for name, r in quantize_figures(result).items()], last=True)]
    steps = [r for r in rows if "step" in r]
    if steps:
        text += ["Where the time goes, in CPU nanoseconds per weight:",
                 table(["weights", "step", "ns"], [
                     [r["weights"], r["step"], number(r["CPU ns per weight"])] for r in steps], 2)]
    return "\n\n".join(text)


def side_by_side_section(result: Mapping[str, Any]) -> str:
    """GPTQ of a whole model beside llm-compressor's."""
    runs = len(result["rows"]["ours"])
    lines = [[name, number(statistics.median(seconds)),
              f"{number(min(seconds))} - {number(max(seconds))}"]
             for name, seconds in result["rows"].items()]
    return "\n\n".join([
        "### Quantizing beside llm-compressor",
        command("quantize_side_by_side", result["environment"]),
        f"GPTQ of {result['model']} on {result['tokens']} tokens and {result['threads']} threads, "
        f"4 bits a weight, one scale for each output channel. Seconds, the median of {runs} "
        f"run{'s' * (runs > 1)}. Ours are from folder to folder, with the rotations. Theirs are of "
        f"`oneshot` alone: {result['peer']}.",
        table(["", "seconds", "least to most"], lines)])


def sharing_section(result: Mapping[str, Any]) -> str:
    """Two processes on the same CPUs beside one."""
    return "\n\n".join([
        "### Processes on the same CPUs", command("bench_sharing", result["environment"]),
        f"{result['model']} decodes one sequence, in one process and in {result['processes']} at "
        "once. Each has a thread for every CPU.",
        table(["tokens/s alone", "of all at once", "ratio", "CPU time of a token"],
              [[number(result["alone"]), number(result["together"]),
                times(result["sum_over_alone"]), times(result["cpu_time"])]])])


def task_section(result: Mapping[str, Any]) -> str:
    """Seconds of zero-shot tasks, ours beside transformers."""
    lines = [[r["task"], r["model"], str(r["questions"]), number(r["median"]),
              f"{number(r['low'])} - {number(r['high'])}", times(r["times_as_fast"])]
             for r in result["rows"]]
    versions = result["environment"]
    return "\n\n".join([
        "### Zero-shot tasks", command("task_seconds", versions),
        f"Seconds of all requests of a task through lm_eval {versions['lm_eval']}. The first row "
        f"of a task is transformers {versions['transformers']} with torch {versions['torch']}, and "
        "the others are times as fast. All use the same number of threads.",
        table(["task", "model", "questions", "seconds", "quartiles", "times as fast"], lines, 2)])


def torch_section(result: Mapping[str, Any]) -> str:
    """torch models with our linears beside torch's own dynamic int8."""
    lines = [[r["model"], r["variant"], number(1e3 * r["median"]),
              f"{number(1e3 * r['low'])} - {number(1e3 * r['high'])}", times(r["speed_of_int8"]),
              times(r["speed_of_float32"]), f"{r['error']:.3f}", number(r["bytes"] / 1e6)]
             for r in result["rows"]]
    versions = result["environment"]
    return "\n\n".join([
        "### Linears of torch models", command("torch_dynamic", versions),
        f"torch {versions['torch']}, int8 by {versions['quantized_engine']}, OMP_WAIT_POLICY "
        f"{versions['omp_wait_policy']}. The times are milliseconds of a call. The error is "
        "|y - y0| / |y0| of the model's output.",
        table(["model", "linears", "ms", "quartiles", "speed of int8", "speed of float32", "error",
               "MB"], lines, 2)])


def transform_section(result: Mapping[str, Any]) -> str:
    """Dense factors, Hadamards and chains, width by width."""
    forms = ("quantize", "dense", "hadamard", "chain")
    lines = [[str(r["k"]), f"{r['k1']} x {r['k2']}",
              *(number(r[f"{form}_us_per_token"]) for form in forms), number(r["dense_gflops"]),
              percent(r["share"])] for r in result["rows"]]
    return "\n\n".join([
        "### Online transform", command("bench_transform", result["environment"]),
        "The figures are microseconds per token on one thread. All forms include the 4-bit "
        "quantization, and the form quantize is that alone. The form dense multiplies by dense "
        "factors, as the runtime does. The form hadamard applies Hadamard transforms alone. The "
        "form chain applies these and then the Givens rotations of two sweeps. The share is the "
        "part of the dense form in the time of a W4A4 linear with k outputs.",
        table(["k", "factors", *forms, "dense GFLOP/s", "share"], lines, 2)])


def attention_section(result: Mapping[str, Any]) -> str:
    """Decode of a layer over a long context, by the bits of the KV cache."""
    lines = [[r["model"], str(r["batch"]), str(r["context"]), str(r["kv_bits"]),
              number(r["microseconds_per_token"]), number(r["without_context"]),
              number(r["gb_per_second"]), times(r["speedup"])] for r in result["rows"]]
    return "\n\n".join([
        "### Attention by the bits of the KV cache",
        command("bench_attention", result["environment"]),
        "The figures are microseconds per decoded token, of one layer with almost no linears. "
        "They are given at the context and at a context of a single token. GB/s count the stored "
        "cache. The speed is relative to that of a float32 cache.",
        table(["heads of", "batch", "context", "KV bits", "us", "us, context 1", "GB/s", "speed"],
              lines)])


# ---- the page and the summary --------------------------------------------------------------------


def machine_section(machine: Machine) -> str:
    environment = machine.environment
    text = [f"## {environment['cpu']}, {environment['cpus']} CPUs, "
            f"{environment['kernels']['runnable'][0]}", describe(environment)]
    lines = [aim.cells() for aim in aims(machine)]
    if lines:
        text += ["### Aims", table(["where", "what", "aim", "found", ""], lines, 2, last=True)]
    text += [peers_section(result) for _, result in machine.of("peers")]
    text += [ladder_section(result) for _, result in machine.of("ladder")]
    text += [end_to_end_section(name, result) for name, result in machine.of("end-to-end")]
    for kind, section in (("quantize", quantize_section), ("side-by-side", side_by_side_section),
                          ("transform", transform_section), ("attention", attention_section),
                          ("sharing", sharing_section), ("task-seconds", task_section),
                          ("torch-dynamic", torch_section)):
        text += [section(result) for _, result in machine.of(kind)]
    notes = machine.path / "notes.md"
    if notes.exists():
        text += ["### Where a figure is out of reach", notes.read_text("utf-8").strip()]
    return "\n\n".join(text)


def page(machines: Sequence[Machine]) -> str:
    """docs/performance.md."""
    template = TEMPLATE.read_text("utf-8")
    if template.count(GENERATED) != 1:
        raise ValueError(f"{TEMPLATE}: expected {GENERATED} once")
    return template.replace(GENERATED, "\n\n".join(machine_section(m) for m in machines))


def summary_part(machines: Sequence[Machine]) -> str:
    """Ours over the best of each kind at three numbers of rows, machine by machine; quantizing.

    ValueError when no machine has results of peers: nothing to put in place of the table.
    """
    if not any(machine.of("peers") for machine in machines):
        raise ValueError("the summary is left as it is: expected a file of peers among the results")
    text = []
    for machine in machines:
        for _, result in machine.of("peers"):
            rows = result["rows"]
            ms = sorted({r["m"] for r in rows if "gops" in r})
            ms = [m for m in (1, 16, 512) if m in ms] or ms
            lines = [line for line in ratio_lines(rows, ms) if line[0] in OURS]
            names = {"ours_w4a4": "W4A4", "ours_w4a8": "W4A8"}
            lines = [[names[line[0]], *line[1:]] for line in lines]
            count = len(result["shapes"])
            text.append(f"Linears on {machine.environment['cpu']}, {peers_title(result)[9:]}: "
                        "our speed divided by that of the fastest peer of each kind, as the "
                        f"geometric mean over {count} shape{'s' * (count > 1)}:")
            text.append(table(["", "against", *(f"m = {m}" for m in ms)], lines, 2))
        text += [quantize_sentence(result) for _, result in machine.of("quantize")]
    text.append("[Every figure, with the aims and the commands](performance.md).")
    return "\n\n".join(text)


def quantize_sentence(result: Mapping[str, Any]) -> str:
    """CPU seconds and memory that 10^9 weights take from the calibration to the file."""
    before = [f"{number(r['value'])} for {name.partition(', per')[0]}"
              for name, r in quantize_figures(result).items()
              if name.startswith(("calibration", "solving")) and name.endswith(": CPU")]
    stages = [f"{number(r['CPU, s per 10^9'])} CPU seconds and {r['peak memory, MB']:.0f} MB with "
              f"`--weights {r['weights']}`" for r in result["rows"] if "CPU, s per 10^9" in r]
    return (f"10^9 weights in the shapes of LLaMA-2-7B take these CPU seconds: "
            f"{' and '.join(before)}. To quantize and write them takes {', '.join(stages)}. The MB "
            "are anonymous memory.")


def replace_part(summary: str, part: str) -> str:
    """The summary with what stands between the marks replaced. ValueError without the marks."""
    if summary.count(BEGIN) != 1 or summary.count(END) != 1:
        raise ValueError(f"summary: expected {BEGIN} and {END} once each")
    before, rest = summary.split(BEGIN)
    return f"{before}{BEGIN}\n{part}\n{END}{rest.split(END)[1]}"


def main(argv: Sequence[str]) -> None:
    root = FOLDER.parent
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--from", dest="folder", type=Path, default=FOLDER / "results", metavar="DIR")
    p.add_argument("--out", type=Path, default=root / "docs" / "performance.md", metavar="FILE")
    p.add_argument("--summary", type=Path, default=root / "docs" / "summary.md", metavar="FILE")
    arguments = p.parse_args(argv)
    try:
        machines = read_machines(arguments.folder)
        summary = replace_part(arguments.summary.read_text("utf-8"), "")  # are there marks?
        files.write_file(arguments.out, page(machines).rstrip() + "\n")
        files.write_file(arguments.summary, replace_part(summary, summary_part(machines)))
    except (ValueError, OSError) as error:
        sys.exit(f"performance: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
