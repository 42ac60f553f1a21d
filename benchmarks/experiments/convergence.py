"""SpinQuant's learned rotations against closed forms: loss by step, KL, and seconds of each.

    python -m benchmarks.experiments.convergence MODEL --out DIR [--steps 1000]
        [--calibration FILE] [--calibration-tokens N] [--text FILE] [--windows N] [--seq-len N]
        [--learned FILE] [--time-limit SECONDS] [--repeats 3] [--threads 1]

One calibration text, one weight rounding (to nearest, per output channel) and one activation range
for all rows but the default's own. SpinQuant learns with torch; --learned takes a run's file and
goes on with it if it is not finished (the state is kept in DIR/learned.safetensors, where a later
call finds it); --time-limit 0 takes the run as it is, which needs no torch.
Writes DIR/convergence.json and DIR/convergence.png.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import math
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import singlequant as sq
from singlequant.methods import spinquant

from .. import common
from . import command, report
from .laboratory import Laboratory

NAME = "convergence"
SEQ_LEN = 512
CLOSED_FORMS = ("hadamard", "duquant", "singlequant")
TABLES = {"head_bits": 16, "embedding_bits": 16}  # SpinQuant learns without rounding them
COLUMNS = (  # header, key of a row, format
    ("method", "method", ""), ("weights", "weights", ""), ("clip", "clip", "g"),
    ("calibration loss", "calibration_loss", ".4f"), ("perplexity", "perplexity", ".3f"),
    ("KL", "kl_mean", ".5f"), ("top-1", "top1", ".3f"), ("CPU s", "cpu_seconds", ".4g"),
    ("CPU s without calibration", "cpu_seconds_without_calibration", ".4g"),
    ("CPU s with GPTQ", "cpu_seconds_with_gptq", ".4g"), ("wall s", "wall_seconds", ".4g"),
    ("SpinQuant's CPU s / these", "spinquant_cpu_ratio", ".4g"),
    ("wall", "spinquant_wall_ratio", ".4g"),
)


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    p = command.bare_parser(__doc__, NAME)
    p.add_argument("model", metavar="MODEL", type=Path)
    p.add_argument("--out", metavar="DIR", type=Path, required=True)
    p.add_argument("--steps", type=int, default=spinquant.STEPS, metavar="N",
                   help="of a new run, %(default)s as published")
    p.add_argument("--batch", type=int, default=1, metavar="N",
                   help="windows per step of a new run (default %(default)s)")
    p.add_argument("--learned", type=Path, metavar="FILE")
    p.add_argument("--time-limit", type=float, metavar="SECONDS")
    p.add_argument("--calibration-tokens", type=int, metavar="N",
                   default=sq.QuantConfig().calibration_tokens)
    command.add_texts(p)
    p.add_argument("--windows", type=int, metavar="N", help="of the text (default: all)")
    p.add_argument("--seq-len", type=int, metavar="N")
    p.add_argument("--repeats", type=int, default=3, metavar="N")
    p.add_argument("--threads", type=int, default=1, metavar="N",
                   help="of either side, so that wall times compare too (default %(default)s)")
    return p


# ---- SpinQuant's run ----------------------------------------------------------------------------


def learned_rotations(checkpoint, windows: NDArray, arguments) -> spinquant.Learned:
    """The run of --learned or of DIR/learned.safetensors, finished if it may be; or a new one.

    ValueError when a file is of another run or no step is done, ImportError when torch is missing.
    """
    save = arguments.out / "learned.safetensors"
    files = [f for f in (arguments.learned, save if save.exists() else None) if f is not None]
    runs = [check_run(spinquant.load_learned(f), f, checkpoint, windows) for f in files]
    run = max(runs, key=lambda r: r.steps, default=None)
    if run is None or not (run.finished or arguments.time_limit == 0):
        run = learn(checkpoint, windows, run, save, arguments)
    if not run.steps:
        raise ValueError("--time-limit: expected time for a step at least, found none was done")
    return run


def learn(checkpoint, windows: NDArray, run, save: Path, arguments) -> spinquant.Learned:
    """A new run, or the rest of one, as far as --time-limit allows; its state goes to save."""
    settings: dict[str, Any] = {"steps": arguments.steps, "batch": arguments.batch}
    if run is not None:
        names = ("steps", "learning_rate", "batch", "seed", "clip", "noise")
        settings = {name: run.settings[name] for name in names}
    start = time.monotonic()

    def progress(done: int, loss: float) -> None:
        if done % 50 == 0 or done == settings["steps"]:
            print(f"step {done} of {settings['steps']}: loss {loss:.4f}, "
                  f"{time.monotonic() - start:.0f} s", flush=True)

    try:
        return spinquant.learn_rotations(
            checkpoint, windows, threads=arguments.threads, time_limit=arguments.time_limit,
            resume=run, save=save, progress=progress, **settings,
        )
    except ImportError as error:
        state = "a new run" if run is None else f"{run.settings['steps'] - run.steps} steps"
        raise ImportError(
            f"{state} of SpinQuant needs torch (pip install 'singlequant[torch]'), or --learned "
            f"with a finished run's file, or --time-limit 0 to take an unfinished one: {error}"
        ) from None


def check_run(run: spinquant.Learned, file: Path, checkpoint, windows: NDArray):
    """The run itself; ValueError when another model, text or precision was learned on."""
    digest = hashlib.sha256(np.ascontiguousarray(windows, np.int64)).hexdigest()
    expected = {"source_sha256": checkpoint.fingerprint, "windows_sha256": digest,
                "weight_bits": 4, "activation_bits": 4}
    for name, value in expected.items():
        if run.settings.get(name) != value:
            raise ValueError(f"{file}: {name}: expected {value!r}, that of this model and "
                             f"calibration, found {run.settings.get(name)!r}")
    return run


# ---- quality ------------------------------------------------------------------------------------


class Bench:
    """A model, its calibration windows and the text it is judged on."""

    def __init__(self, checkpoint, windows, text: str, arguments, folder: Path) -> None:
        limit = checkpoint.spec.max_position_embeddings
        seq_len = min(SEQ_LEN, limit) if arguments.seq_len is None else arguments.seq_len
        if not 2 <= seq_len <= limit:
            raise ValueError(f"--seq-len: expected 2 to {limit}, found {seq_len}")
        self.calibration, self.windows, self.folder = arguments.calibration, windows, folder
        self.laboratory = Laboratory(checkpoint.path, text, self.calibration, seq_len=seq_len,
                                     windows=arguments.windows)
        self.checkpoint, self.original = checkpoint, self.laboratory.original

    def judge(self, model) -> dict[str, Any]:
        """Loss on the calibration windows; perplexity and divergence on the text."""
        loss = sq.evaluate(model, self.windows.reshape(-1), self.windows.shape[1])
        found = self.laboratory.judge(model)
        return {"calibration_loss": math.log(loss.perplexity), "perplexity": found.perplexity,
                "kl_mean": found.kl_mean, "top1": found.top1_agreement}

    def closed_form(self, config: sq.QuantConfig) -> dict[str, Any]:
        """What `singlequant quantize` makes of the model under that config."""
        return self._packed(lambda out: self.quantize(config, out))

    def residual(self, r1: NDArray, r2: NDArray, clip: float) -> dict[str, Any]:
        """The model with r1 and r2 fused, down_proj's Hadamard online, rounded to nearest."""
        config = sq.QuantConfig("w4a4", "spinquant", "rtn", 4.0, clip=clip, **TABLES)
        view = spinquant.spinquant_checkpoint(self.checkpoint, r1, r2)
        rotations = [spinquant.online_rotations(view.spec, i) for i in range(view.spec.layers)]
        return self._packed(
            lambda out: sq.save(sq.quantize(view, rotations, config), out, view, config)
        )

    def quantize(self, config: sq.QuantConfig, out: Path) -> None:
        """The whole command: read, calibrate, solve, quantize, write."""
        sq.quantize_folder(self.checkpoint.path, out, config, self.calibration)

    def solve(self, config: sq.QuantConfig, statistics: Sequence, out: Path) -> None:
        """The same from statistics that are there: solve, quantize, write."""
        rotations = sq.solve_rotations(statistics, config.method, config.seed)
        sq.save(sq.quantize(self.checkpoint, rotations, config), out, self.checkpoint, config)

    def _packed(self, make: Callable[[Path], object]) -> dict[str, Any]:
        out = self.folder / "packed"
        make(out)
        found = self.judge(sq.load(out))
        shutil.rmtree(out)
        return found


# ---- seconds ------------------------------------------------------------------------------------


def time_builds(
    bench: Bench, configs: Mapping[str, sq.QuantConfig], repeats: int
) -> dict[str, dict[str, float]]:
    """Median seconds of each row, all rows in turn and in a new order each time.

    CPU seconds are the process's, of all threads.
    """
    statistics = list(sq.calibrate(bench.checkpoint, bench.windows))
    runs: dict[tuple[str, str], Callable[[Path], None]] = {}
    for name, config in configs.items():
        runs[name, "whole"] = lambda out, c=config: bench.quantize(c, out)
        if config.weights != "gptq":  # GPTQ needs the inputs themselves, layer by layer
            gptq = dataclasses.replace(config, weights="gptq")
            runs[name, "solve"] = lambda out, c=config: bench.solve(c, statistics, out)
            runs[name, "gptq"] = lambda out, c=gptq: bench.quantize(c, out)
    clocks: dict[tuple[str, str], list[tuple[float, float]]] = {key: [] for key in runs}
    order, shuffle = list(runs), np.random.default_rng(0).shuffle
    out = bench.folder / "timed"
    for repeat in range(repeats):
        shuffle(order)
        for key in order:
            wall, cpu = time.perf_counter(), time.process_time()
            runs[key](out)
            clocks[key].append((time.perf_counter() - wall, time.process_time() - cpu))
            shutil.rmtree(out)
            cpu = clocks[key][-1][1]
            say(f"repeat {repeat + 1} of {repeats}: {' '.join(key)}: {cpu:.2f} CPU s")
    medians = {key: np.median(values, axis=0).tolist() for key, values in clocks.items()}
    found: dict[str, dict[str, float]] = {}
    for name in configs:
        wall, cpu = medians[name, "whole"]
        found[name] = {"wall_seconds": wall, "cpu_seconds": cpu}
        for kind, column in (("solve", "cpu_seconds_without_calibration"),
                             ("gptq", "cpu_seconds_with_gptq")):
            if (name, kind) in medians:
                found[name][column] = medians[name, kind][1]
    return found


def run_seconds(run: spinquant.Learned) -> dict[str, float]:
    """Of all steps of the run's schedule; what is not done yet at the mean of what is."""
    share = run.settings["steps"] / run.steps
    return {"wall_seconds": float(run.seconds.sum() * share),
            "cpu_seconds": float(run.cpu_seconds.sum() * share)}


def arithmetic(row: Mapping[str, Any], run: spinquant.Learned, repeats: int) -> str:
    """The speedup over SpinQuant in three or four sentences, CPU and wall."""
    steps, parts = run.settings["steps"], []
    for kind, per_step in (("CPU", run.cpu_seconds.mean()), ("wall", run.seconds.mean())):
        ours = row[f"{kind.lower()}_seconds"]
        parts.append(f"In {kind} seconds: {per_step:.4g} per step x {steps} steps / {ours:.4g} "
                     f"= {per_step * steps / ours:.4g}x.")
    alone = row.get("cpu_seconds_without_calibration")
    if alone is not None:
        ratio = run.cpu_seconds.mean() * steps / alone
        parts.append(f"Without the calibration it takes {alone:.4g} CPU seconds, and the ratio is "
                     f"{ratio:.4g}x.")
    return (f"{row['method']} ({row['weights']}): the ratio is SpinQuant's time divided by the "
            "time of the whole run (reading, calibrating, solving, quantizing and writing; median "
            f"of {repeats}). {' '.join(parts)}")


def say(line: str) -> None:
    """One line of progress, on standard error."""
    print(line, file=sys.stderr, flush=True)


# ---- the experiment -----------------------------------------------------------------------------


def rows_of(bench: Bench, run: spinquant.Learned, repeats: int) -> list[dict[str, Any]]:
    """One row per method: the original, SpinQuant before and after its steps, closed forms."""
    default = sq.QuantConfig("w4a4", bits=4.0, calibration_tokens=bench.windows.size, **TABLES)
    clip = run.settings["clip"]
    methods = dict.fromkeys((*CLOSED_FORMS, default.method))
    configs = {m: dataclasses.replace(default, method=m, weights="rtn", clip=clip)
               for m in methods}
    configs["default"] = default
    rows: list[dict[str, Any]] = [{"method": "original", **bench.judge(bench.original)}]
    equal = {"weights": "rtn", "clip": clip}
    whole = run_seconds(run)
    start = spinquant.starting_rotations(bench.checkpoint.spec, run.settings["seed"])
    learned = {
        "spinquant, 0 steps": (start, {}),
        f"spinquant, {run.steps} steps": ((run.R1, run.R2), whole),
    }
    for name, (rotations, seconds) in learned.items():
        rows.append({"method": name, **equal, **bench.residual(*rotations, clip), **seconds})
        say(f"{name}: KL {rows[-1]['kl_mean']:.5f}")
    quality = {}
    for name, config in configs.items():
        quality[name] = bench.closed_form(config)
        say(f"{name}: KL {quality[name]['kl_mean']:.5f}")
    seconds = time_builds(bench, configs, repeats)
    for name, config in configs.items():
        label = f"default ({config.method})" if name == "default" else name
        rows.append({"method": label, "weights": config.weights, "clip": config.activation_clip,
                     **quality[name], **seconds[name],
                     **{f"spinquant_{kind}_ratio": whole[f"{kind}_seconds"]
                        / seconds[name][f"{kind}_seconds"] for kind in ("cpu", "wall")}})
    return rows


def notes_of(rows: Sequence[Mapping[str, Any]], run, repeats: int, threads: int) -> list[str]:
    """What the table cannot say: its arithmetic and how the seconds were taken."""
    steps = run.settings["steps"]
    notes = [arithmetic(row, run, repeats) for row in rows if "spinquant_cpu_ratio" in row]
    if not run.finished:
        notes.append(f"SpinQuant's run has {run.steps} of its {steps} steps. Its seconds are "
                     f"the mean of those, times {steps}.")
    notes += [
        "CPU seconds are those of all threads of the process. Read the ratios from them. Other "
        "programs on the machine stretch wall time, and they stretch a run of hours more than a "
        f"run of seconds. The closed forms ran on {threads} thread{'s' * (threads > 1)}.",
        "SpinQuant's seconds are those of its steps alone (forward, backward, Cayley update). They "
        "leave out reading the model, tokenizing, the probes of the noise and quantizing "
        "afterwards. The seconds of the closed forms include all that they need.",
    ]
    if len(run.probe_steps):
        notes.append(
            "The loss without noise is the mean over small rotations of R1 by "
            f"{spinquant.NOISE_ANGLE} rad. It is {run.smooth_losses[0]:.4f} at step "
            f"{run.probe_steps[0]} and {run.smooth_losses[-1]:.4f} at step {run.probe_steps[-1]}. "
            f"The noise (standard deviation) is {run.noise.mean():.4f} on average."
        )
    return notes


def cycle_means(losses: NDArray, windows: int, batch: int) -> tuple[NDArray, NDArray]:
    """(steps, mean loss) over as many steps as it takes to meet every window equally often."""
    cycle = windows // math.gcd(windows, batch)
    if len(losses) < cycle:
        return np.empty(0), np.empty(0)
    means = np.convolve(losses, np.full(cycle, 1 / cycle), "valid")
    return np.arange(len(means)) + (cycle - 1) / 2, means


def draw(rows: Sequence[Mapping[str, Any]], run: spinquant.Learned, title: str):
    """Losses as the optimiser meets them; without their noise, beside zero steps; seconds."""
    figure = report.new_figure(figsize=(14, 4.2))
    if figure is None:
        return None
    figure.suptitle(title, fontsize="medium")
    raw, smooth, dots = figure.subplots(1, 3)
    steps = np.arange(run.steps)
    raw.plot(steps, run.losses, ".", color="0.7", ms=3, label="loss of a step's windows")
    cycle = cycle_means(run.losses, run.settings["windows"][0], run.settings["batch"])
    raw.plot(*cycle, color="tab:blue", lw=0.8, label="mean over all windows in turn")
    raw.set(xlabel="step", ylabel="cross-entropy, nats per token", title="SpinQuant's loss")
    smooth.plot(*cycle, color="tab:blue", lw=0.5, alpha=0.4, label="with the noise of rounding")
    if len(run.probe_steps):
        smooth.errorbar(run.probe_steps, run.smooth_losses, run.noise, color="tab:blue", capsize=2,
                        marker="o", ms=3, label="without it; bars: its standard deviation")
    shown = [row for row in rows if not row["method"].startswith("spinquant")]
    for i, row in enumerate(shown):
        original = row["method"] == "original"
        name = row["method"] if original else f"{row['method']}, {row['weights']}, zero steps"
        smooth.axhline(row["calibration_loss"], label=name, lw=1.2,
                       color="black" if original else f"C{i}", ls=":" if original else "--")
    smooth.set(xlabel="step", title="the same data, W4A4, beside zero steps")
    for axis in (raw, smooth):
        axis.legend(fontsize="x-small", frameon=False, ncol=2, loc="upper center",
                    bbox_to_anchor=(0.5, -0.15))
    timed = [row for row in rows if "cpu_seconds" in row]
    values = [row["cpu_seconds"] for row in timed]
    dots.plot(values, range(len(timed)), "o", color="tab:blue")
    dots.set_xscale("log")
    dots.tick_params(axis="x", which="both", bottom=False, labelbottom=False)
    dots.grid(axis="y", color="0.9")
    dots.set_yticks(range(len(timed)), labels=[f"{r['method']}, {r['weights']}" for r in timed],
                    fontsize="small")
    dots.invert_yaxis()
    for y, value in enumerate(values):
        dots.annotate(f"{value:.3g} s", (value, y), xytext=(6, 0), textcoords="offset points",
                      va="center", fontsize="small")
    dots.margins(x=0.25, y=0.1)
    partial = "" if run.finished else f" ({run.settings['steps']} steps at the mean so far)"
    dots.set(title=f"CPU seconds{partial}")
    return figure


def run_experiment(arguments: argparse.Namespace) -> None:
    """Everything: learn or take the run, judge, time, write."""
    if arguments.repeats < 1:
        raise ValueError(f"--repeats: expected at least 1, found {arguments.repeats}")
    checkpoint = sq.load_checkpoint(arguments.model)
    config = sq.QuantConfig(calibration_tokens=arguments.calibration_tokens)
    windows = sq.calibration_windows(checkpoint, config, arguments.calibration)
    text = command.evaluation_text(arguments.text)
    sq.set_num_threads(arguments.threads)
    environment = common.environment(arguments.argv)
    common.print_environment(environment)
    run = learned_rotations(checkpoint, windows, arguments)
    with tempfile.TemporaryDirectory(prefix="convergence-") as folder:
        bench = Bench(checkpoint, windows, text, arguments, Path(folder))
        rows = rows_of(bench, run, arguments.repeats)
    notes = notes_of(rows, run, arguments.repeats, arguments.threads)
    model, shown = checkpoint.path.resolve().name, bench.laboratory.windows
    name = "bundled text" if arguments.text is None else arguments.text.name
    title = (f"{model}, W4A4, {windows.size} calibration tokens, {len(shown)} windows of "
             f"{shown.shape[1]} of {name}")
    curves = {
        "losses": run.losses.tolist(), "probe_steps": run.probe_steps.tolist(),
        "smooth_losses": run.smooth_losses.tolist(), "noise": run.noise.tolist(),
        "settings": dict(run.settings),
    }
    report.Report(NAME, title, COLUMNS, rows, notes, model, {"curves": curves}).write(
        arguments, environment, draw(rows, run, title))


def main(argv: Sequence[str] | None = None) -> None:
    with command.errors_of(NAME):
        run_experiment(command.parse(parser(), argv))


if __name__ == "__main__":
    main()
