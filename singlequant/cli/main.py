"""Command line: quantize, eval, compare, inspect, generate, demo, bench, runtime."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from .. import _C, __version__
from ..config import (
    GPTQ_INPUTS,
    KV_BITS,
    SCHEMES,
    SITES,
    WEIGHTS,
    QuantConfig,
)
from ..methods.registry import METHODS

EXIT_BAD_INPUT = 2


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    top = argparse.ArgumentParser(
        prog="singlequant",
        description="Run large language models in 4 bits on the CPU.",
    )
    top.add_argument("--version", action="version", version=f"singlequant {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_quantize(commands)
    _add_eval(commands)
    _add_compare(commands)
    _add_generate(commands)
    _add_inspect(commands)
    _add_demo(commands)
    _add_bench(commands)
    runtime = commands.add_parser("runtime", help="what the kernels run on; for bug reports")
    runtime.set_defaults(run=run_runtime)
    return top


def _add_command(commands, name: str, run: Callable, help_text: str) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=help_text, description=help_text)
    command.add_argument("--threads", type=int, metavar="N", help="default: one per CPU")
    command.set_defaults(run=run)
    return command


def _add_quantize(commands) -> None:
    defaults = QuantConfig()
    c = _add_command(commands, "quantize", run_quantize,
                     "Quantize a save_pretrained folder in one sweep.")
    c.add_argument("model", metavar="MODEL", type=Path)
    c.add_argument("out", metavar="OUT", type=Path)
    c.add_argument("--scheme", choices=SCHEMES,
                   help=f"bits of weights and activations (default {defaults.scheme}); w4a8 is "
                        "much closer to the original and about as fast on most CPUs")
    c.add_argument("--method", choices=METHODS,
                   help=f"transformation of the activations (default {defaults.method})")
    c.add_argument("--weights", choices=WEIGHTS,
                   help="rounding: rtn = to nearest, mse = to nearest with a searched clip, gptq = "
                        "that with error feedback, the most accurate and the slowest "
                        f"(default {defaults.weights})")
    c.add_argument("--gptq-inputs", choices=GPTQ_INPUTS,
                   help="inputs that gptq looks at: as they are, or quantized as they will be run "
                        f"(default {defaults.gptq_inputs})")
    c.add_argument("--gptq-order", action=argparse.BooleanOptionalAction, default=None,
                   help="gptq rounds the inputs of largest energy first (default "
                        f"{'yes' if defaults.gptq_order else 'no'})")
    c.add_argument("--learned", metavar="FILE",
                   help="method spinquant: rotations learned before, instead of learning them")
    c.add_argument("--group-size", type=int, metavar="G",
                   help="inputs that share a weight scale, a multiple of 32 (default 0: the whole "
                        "output channel)")
    c.add_argument("--kv-bits", type=int, choices=KV_BITS,
                   help="bits of cached keys and values when the model runs; 8 and 4 also rotate "
                        f"the value heads (default {defaults.kv_bits})")
    c.add_argument("--clip", type=float, metavar="R",
                   help="share of a token's largest activation that the codes reach (default: the "
                        "scheme's)")
    c.add_argument("--calibration", type=Path, metavar="FILE",
                   help="UTF-8 text (default: a bundled one)")
    c.add_argument("--calibration-tokens", type=int, metavar="N",
                   help=f"default {defaults.calibration_tokens}")
    c.add_argument("--seed", type=int, metavar="N",
                   help="0 calibrates on the first windows of the text, others draw them (default "
                        f"{defaults.seed})")
    c.add_argument("--ignore", action="append", metavar="PATTERN",
                   help="linears to leave in 16 bits, such as '*.down_proj'; may be repeated")
    c.add_argument("--recipe", type=Path, metavar="FILE",
                   help="the same options as JSON; those given here win")
    c.add_argument("--resume", action="store_true",
                   help="go on with the layers an interrupted run left in OUT.partial")
    c.add_argument("--dry-run", action="store_true",
                   help="process one layer, write nothing, print size and time")


def _add_eval(commands) -> None:
    c = _add_command(commands, "eval", run_eval,
                     "Perplexity and zero-shot accuracy of a folder, quantized or not.")
    c.add_argument("model", metavar="MODEL_OR_OUT", type=Path)
    c.add_argument("--text", type=Path, metavar="FILE", help="perplexity on this text")
    c.add_argument("--seq-len", type=int, metavar="N",
                   help="tokens of a window (default: the model's maximum, 2048 at most)")
    c.add_argument("--reference", type=Path, metavar="MODEL",
                   help="also print the divergence from this model on the text")
    c.add_argument("--tasks", metavar="A,B",
                   help="zero-shot tasks: the package's own (stdlib_continuation, "
                        "stdlib_perplexity), those in --task-folder, and lm-evaluation-harness's; "
                        "needs pip install 'singlequant[evaluation]'")
    c.add_argument("--task-folder", type=Path, metavar="DIR",
                   help="YAML task files of your own, with local data")
    c.add_argument("--limit", type=int, metavar="N", help="documents per task (default: all)")
    _add_kv_bits(c)
    c.add_argument("--json", action="store_true", help="print JSON alone")


def _add_kv_bits(command: argparse.ArgumentParser) -> None:
    command.add_argument("--kv-bits", type=int, choices=(*KV_BITS, 32),
                         help="bits of cached keys and values (default: the folder's, 32 if it is "
                              "not quantized)")


def _add_compare(commands) -> None:
    defaults = QuantConfig()
    c = _add_command(commands, "compare", run_compare,
                     "Methods x schemes side by side: quality, seconds, memory, size.")
    c.add_argument("model", metavar="MODEL", type=Path)
    c.add_argument("--methods", type=names, metavar="A,B",
                   help=f"among {', '.join(METHODS)} (default: all that need no extra)")
    c.add_argument("--schemes", type=names, metavar="A,B", default=["w4a4", "w4a8"],
                   help=f"among {', '.join(SCHEMES)} (default w4a4,w4a8)")
    c.add_argument("--weights", type=names, metavar="A,B", default=["rtn"],
                   help=f"rounding of every method, among {', '.join(WEIGHTS)} (default rtn)")
    c.add_argument("--clip", type=float, metavar="R", default=1.0,
                   help="share of a token's largest activation that every method's codes reach "
                        "(default %(default)g)")
    c.add_argument("--group-size", type=int, metavar="G", default=0,
                   help="inputs that share a weight scale (default 0: the whole output channel)")
    c.add_argument("--learned", type=Path, metavar="FILE",
                   help="rotations of method spinquant, instead of learning them")
    c.add_argument("--no-default", action="store_true",
                   help="leave out the rows with the recipe's own rounding")
    c.add_argument("--text", type=Path, metavar="FILE", nargs="+", action="extend",
                   help="texts to evaluate on (default: a bundled one)")
    c.add_argument("--seq-len", type=int, metavar="N",
                   help="tokens of a window (default: the model's maximum, 2048 at most)")
    c.add_argument("--windows", type=int, metavar="N",
                   help="evaluate on the first N windows of each text (default: all)")
    c.add_argument("--calibration", type=Path, metavar="FILE",
                   help="UTF-8 text (default: a bundled one)")
    c.add_argument("--calibration-tokens", type=int, metavar="N",
                   help=f"default {defaults.calibration_tokens}")
    c.add_argument("--seeds", type=integers, metavar="N,M", default=[0],
                   help="draws of the calibration windows, a row each (default 0)")
    c.add_argument("--tasks", type=names, metavar="A,B", default=[],
                   help="zero-shot tasks of lm-evaluation-harness")
    c.add_argument("--task-folder", type=Path, metavar="DIR", help="where local tasks are")
    c.add_argument("--out", type=Path, metavar="DIR",
                   help="keep the packed models and the finished rows here; a rerun goes on")
    c.add_argument("--csv", type=Path, metavar="FILE")
    c.add_argument("--json", type=Path, metavar="FILE",
                   help="rows and machine; without --out, a rerun goes on from FILE.partial")
    c.add_argument("--picture", type=Path, metavar="FILE", help="KL of each method as a dot")


def names(text: str) -> list[str]:
    """The parts of 'a,b'."""
    return [part.strip() for part in text.split(",") if part.strip()]


def integers(text: str) -> list[int]:
    """The numbers of '0,1'."""
    return [int(part) for part in names(text)]


def _add_generate(commands) -> None:
    c = _add_command(commands, "generate", run_generate, "Continue a prompt, streamed.")
    c.add_argument("model", metavar="MODEL_OR_OUT", type=Path)
    c.add_argument("--prompt", action="append", required=True,
                   help="may be repeated: a batch, printed when it is whole")
    c.add_argument("--max-new-tokens", type=int, default=64, metavar="N")
    c.add_argument("--temperature", type=float, default=0.0, metavar="T",
                   help="0 (default) takes the most likely token")
    c.add_argument("--top-k", type=int, default=0, metavar="K", help="0 (default): off")
    c.add_argument("--top-p", type=float, default=1.0, metavar="P", help="1 (default): off")
    c.add_argument("--seed", type=int, default=0, metavar="N")
    c.add_argument("--chat", action="store_true", help="put the prompt into the chat template")
    _add_kv_bits(c)


def _add_inspect(commands) -> None:
    defaults = QuantConfig()
    c = _add_command(commands, "inspect", run_inspect,
                     "Outliers of every site before and after each step of its transformation.")
    c.add_argument("model", metavar="MODEL_OR_OUT", type=Path)
    c.add_argument("--original", type=Path, metavar="MODEL",
                   help="the model that OUT was made of; needed with a packed folder, which must "
                        "be of a method that folds nothing into the weights (not "
                        f"{', '.join(m.name for m in METHODS.values() if m.folds)})")
    c.add_argument("--method", choices=[m.name for m in METHODS.values() if not m.residual],
                   nargs="+", action="extend",
                   help=f"transformations to solve, one or more (default {defaults.method}; a "
                        "packed folder has its own)")
    c.add_argument("--scheme", choices=[s for s, bits in SCHEMES.items() if bits < 16],
                   help=f"bits of the activations (default {defaults.scheme}, or OUT's)")
    c.add_argument("--clip", type=float, metavar="R",
                   help="share of a token's largest activation that the codes reach")
    c.add_argument("--calibration", type=Path, metavar="FILE",
                   help="UTF-8 text (default: a bundled one)")
    c.add_argument("--calibration-tokens", type=int, metavar="N",
                   help=f"default {defaults.calibration_tokens}, or OUT's")
    c.add_argument("--layer", type=int, metavar="I", help="this layer alone, from 0")
    c.add_argument("--site", choices=SITES, help="this site alone")
    c.add_argument("--massive", type=float, nargs="+", metavar="T",
                   help="count entries beyond T times the median (default 100 1000)")
    c.add_argument("--normal", type=float, metavar="T",
                   help="count channels beyond T times the token's rms (default 6) in 6 %% of the "
                        "tokens")
    c.add_argument("--picture", type=Path, metavar="FILE",
                   help="heat maps of the peaks and bars of the errors")
    c.add_argument("--surface", type=Path, metavar="FILE",
                   help="|activation| over tokens and channels in 3-D, of the site whose peak is "
                        "largest among those asked for")
    c.add_argument("--csv", type=Path, metavar="FILE", help="every row and figure")
    c.add_argument("--json", action="store_true", help="print JSON alone")


def _add_demo(commands) -> None:
    c = _add_command(commands, "demo", run_demo,
                     "Quantize the bundled model in several ways, compare, draw, write a sentence.")
    c.add_argument("--picture", type=Path, default=Path("singlequant-demo.png"), metavar="FILE",
                   help="where the picture goes (default %(default)s)")


def _add_bench(commands) -> None:
    c = _add_command(commands, "bench", run_bench,
                     "Time the packed linears on this machine, against float32 and its peaks.")
    c.add_argument("--seconds", type=float, default=5.0, metavar="S",
                   help="time to measure for, besides some to prepare (default %(default)g)")
    c.add_argument("--json", type=Path, metavar="FILE", help="figures and machine")


# ---- commands ---------------------------------------------------------------------------------


@contextlib.contextmanager
def progress_bar(what: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    """A progress callback (done, total) that draws a bar with the time left on standard error."""
    from tqdm import tqdm

    with tqdm(desc=what, unit=unit, leave=False, disable=None) as bar:

        def update(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield update


def config_from(arguments: argparse.Namespace) -> QuantConfig:
    """The recipe file's values, overwritten by the options given."""
    recipe = QuantConfig.from_file(arguments.recipe) if arguments.recipe else QuantConfig()
    names = ("scheme", "method", "weights", "group_size", "clip", "calibration_tokens", "seed",
             "ignore", "gptq_inputs", "gptq_order", "learned", "kv_bits")
    given = {n: getattr(arguments, n) for n in names if getattr(arguments, n) is not None}
    return QuantConfig.from_json({**recipe.to_json(), **given})


def run_quantize(arguments: argparse.Namespace) -> None:
    from ..sweep.run import dry_run, quantize_folder

    config = config_from(arguments)
    if arguments.dry_run:
        estimate = dry_run(arguments.model, config, arguments.calibration)
        print(f"size        {megabytes(estimate.bytes_before)} -> "
              f"{megabytes(estimate.bytes_after)} (within a few percent)")
        print(f"time        about {estimate.seconds:.1f} s (the first layer's, scaled up)")
        print(f"peak memory about {megabytes(estimate.peak_memory)} besides the mapped weights")
        return
    with progress_bar("quantizing", "layer") as update:
        summary = quantize_folder(arguments.model, arguments.out, config, arguments.calibration,
                                  arguments.resume, update, arguments.recipe)
    print_summary(summary)


def print_summary(summary) -> None:
    """What was done, at what cost, and what to do next."""
    config = summary.config
    tokens = f"{summary.calibration_tokens} tokens"
    if summary.calibration_tokens != config.calibration_tokens:
        tokens += f", {config.calibration_tokens} asked"
    print(f"{summary.out}: {config.scheme}, method {config.method}, weights {config.weights}, "
          f"activation clip {config.activation_clip:g}, kv bits {config.kv_bits}")
    print(f"size        {megabytes(summary.bytes_before)} -> {megabytes(summary.bytes_after)}")
    print(f"time        {summary.seconds:.1f} s: calibrate {summary.calibration_seconds:.1f} "
          f"({tokens}), solve {summary.solve_seconds:.1f}, "
          f"quantize and pack {summary.quantize_seconds:.1f}")
    print(f"peak memory {megabytes(summary.peak_memory)} besides the mapped weights")
    if summary.resumed_layers:
        print(f"resumed     {summary.resumed_layers} layers were whole; counts are of the others")
    if summary.sites:
        print("per layer   site      factors   balance   ART steps   URT rotations   "
              "sweep rotations   8-bit inputs")
    for site in dict.fromkeys(s.site for s in summary.sites):
        rows = [s for s in summary.sites if s.site == site]
        counts = [spread([getattr(r, field) for r in rows])
                  for field in ("art_steps", "urt_steps", "sweep_rotations", "high")]
        size = f"{rows[0].k1}x{rows[0].k2}"
        balance = "yes" if rows[0].balanced else "no"
        print(f"            {site:<9} {size:<9} {balance:>7}   {counts[0]:>9}   {counts[1]:>13}   "
              f"{counts[2]:>15}   {counts[3]:>12}")
    if config.scheme == "w4a4":
        print("hint        --scheme w4a8 is much closer to the original and, on most CPUs, as fast")


def spread(values: Sequence[int]) -> str:
    """'7' or '3-9'."""
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low}-{high}"


def megabytes(count: float) -> str:
    return f"{count / 1e6:.1f} MB"


def run_eval(arguments: argparse.Namespace) -> None:
    from ..sweep.run import load

    check_eval(arguments)
    model = load(arguments.model, arguments.kv_bits)
    result = evaluate_text(model, arguments) if arguments.text else None
    tasks = evaluate_named_tasks(model, arguments) if arguments.tasks is not None else None
    if arguments.json:
        printed = {"kv_bits": model.kv_bits} | (result.to_json() if result else {})
        print(json.dumps(printed | ({"tasks": tasks} if tasks else {}), allow_nan=False))
        return
    print(f"kv_bits         {model.kv_bits}")
    if result:
        print_evaluation(result)
    for task, metrics in (tasks or {}).items():
        for name, value in metrics.items():
            if "_stderr" not in name:
                error = metrics.get(stderr_name(name))
                spread = "" if error is None else f" +- {error:.4f}"
                print(f"{task:<24} {name:<16} {value:.4f}{spread}")


def check_eval(arguments: argparse.Namespace) -> None:
    """ValueError for options that need another one."""
    if arguments.text is None and arguments.tasks is None:
        raise ValueError("eval: expected --text FILE, --tasks A,B or both")
    needs = {"--reference": ("--text", arguments.reference, arguments.text),
             "--seq-len": ("--text", arguments.seq_len, arguments.text),
             "--task-folder": ("--tasks", arguments.task_folder, arguments.tasks),
             "--limit": ("--tasks", arguments.limit, arguments.tasks)}
    for option, (needed, given, there) in needs.items():
        if given is not None and there is None:
            raise ValueError(f"{option}: needs {needed}")


def evaluate_text(model, arguments: argparse.Namespace):
    """Perplexity, and divergence from --reference, on --text: an Evaluation."""
    from ..study.evaluate import split_windows
    from ..sweep.run import default_seq_len, load, perplexity, read_text

    text = read_text(arguments.text)
    reference = load(arguments.reference) if arguments.reference else None
    limit = model.spec.max_position_embeddings
    if arguments.seq_len and arguments.seq_len > limit:
        print(f"singlequant: warning: --seq-len {arguments.seq_len} is beyond the model's "
              f"max_position_embeddings, {limit}", file=sys.stderr)
    seq_len = default_seq_len(model) if arguments.seq_len is None else arguments.seq_len
    try:  # what is wrong with the text is said under its file's name
        tokens = model.encode(text)
        split_windows(tokens, seq_len)
    except ValueError as error:
        raise ValueError(f"{arguments.text}: {error}") from None
    with progress_bar("evaluating", "window") as update:
        return perplexity(model, tokens, seq_len, reference, update)


def print_evaluation(result) -> None:
    print(f"perplexity      {result.perplexity:.4f}  ({result.predictions} predictions in windows "
          f"of {result.seq_len}, {result.seconds:.1f} s)")
    if result.kl_mean is not None:
        print(f"reference       {result.reference_perplexity:.4f}")
        print(f"kl_mean         {result.kl_mean:.5f} nats per token from the reference")
        print(f"kl_p99          {result.kl_p99:.5f}")
        print(f"top1_agreement  {result.top1_agreement:.4f}")


def run_compare(arguments: argparse.Namespace) -> None:
    from ..files import check_file, check_picture
    from ..study.compare import compare

    for path in (arguments.csv, arguments.json):
        if path is not None:
            check_file(path)
    if arguments.picture is not None:
        check_picture(arguments.picture)
    partial = None
    if arguments.json and not arguments.out:
        partial = arguments.json.with_name(arguments.json.name + ".partial")
    with progress_bar("comparing", "step") as update:
        result = compare(
            arguments.model, arguments.methods, arguments.schemes, arguments.weights,
            arguments.clip, arguments.group_size, arguments.text, arguments.seq_len,
            arguments.calibration, arguments.calibration_tokens, arguments.seeds, arguments.tasks,
            arguments.task_folder, arguments.windows, arguments.out, partial,
            not arguments.no_default, update, arguments.learned,
        )
    print(result)
    if arguments.csv:
        print(f"written     {result.to_csv(arguments.csv)}")
    if arguments.json:
        print(f"written     {result.to_json(arguments.json)}")
    if arguments.picture:
        result.plot(arguments.picture)
        print(f"written     {arguments.picture}")
    failed = [row for row in result.rows if row.error]
    if len(failed) == len(result.rows) - 1:
        raise ValueError(f"no method could run: {failed[0].error}")
    if failed and partial:
        print(f"kept        {partial}: a rerun tries again what failed")
    elif partial:
        partial.unlink()


def evaluate_named_tasks(model, arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Metrics of --tasks, by task."""
    from ..harness import evaluate_tasks

    names = [name.strip() for name in arguments.tasks.split(",") if name.strip()]
    return evaluate_tasks(model, names, arguments.task_folder, arguments.limit,
                          progress=sys.stderr.isatty())


def stderr_name(metric: str) -> str:
    """'acc' -> 'acc_stderr', 'exact_match,strict' -> 'exact_match_stderr,strict'."""
    name, comma, of_filter = metric.partition(",")
    return f"{name}_stderr{comma}{of_filter}"


def run_generate(arguments: argparse.Namespace) -> None:
    from ..runtime.generate import check_sampling, stream_text
    from ..sweep.run import load

    sampling = {
        "max_new_tokens": arguments.max_new_tokens, "temperature": arguments.temperature,
        "top_k": arguments.top_k, "top_p": arguments.top_p, "seed": arguments.seed,
    }
    check_sampling(**sampling)
    model = load(arguments.model, arguments.kv_bits)
    if arguments.chat:
        prompts = [model.chat_tokens([{"role": "user", "content": p}]) for p in arguments.prompt]
        shown = [""] * len(prompts)
    else:
        prompts = [model.encode(p).tolist() for p in arguments.prompt]
        shown = arguments.prompt
    if len(prompts) > 1:
        for text, prompt, new in zip(shown, prompts, model.generate(prompts, **sampling),
                                     strict=True):
            print(f"{text}{model.decode_after(prompt, new)}\n")
        return
    to_text = stream_text(model, prompts[0])
    waiting = shown[0]  # the prompt appears with the first token: not before an error

    def show(_: int, token: int) -> None:
        nonlocal waiting
        print(waiting + to_text(token), end="", flush=True)
        waiting = ""

    model.generate(prompts[0], **sampling, on_token=show)
    print(waiting)


def run_inspect(arguments: argparse.Namespace) -> None:
    from .. import files
    from ..checkpoint.folder import load_checkpoint
    from ..study import inspect as outliers

    for picture in (arguments.picture, arguments.surface):
        if picture is not None:
            files.check_picture(picture)
    if arguments.csv is not None:
        files.check_file(arguments.csv)
    names = ("scheme", "clip", "calibration_tokens")
    given = {n: getattr(arguments, n) for n in names if getattr(arguments, n) is not None}
    config = outliers.own_config(load_checkpoint(arguments.model))
    thresholds = {n: getattr(arguments, n) for n in ("massive", "normal")
                  if getattr(arguments, n) is not None}
    with progress_bar("inspecting", "layer") as update:
        result = outliers.inspect_model(
            arguments.model, arguments.method, arguments.original,
            dataclasses.replace(config, **given), arguments.calibration, arguments.layer,
            arguments.site, **thresholds, surface=arguments.surface is not None, progress=update)
    if arguments.csv is not None:
        files.write_file(arguments.csv, result.to_csv())
    if arguments.picture is not None:
        files.save_figure(outliers.plot_overview(result), arguments.picture)
    if arguments.surface is not None:
        files.save_figure(outliers.plot_surface(result), arguments.surface)
    if arguments.json:
        print(json.dumps(result.to_json(), allow_nan=False))
        return
    print_inspection(result)


def print_inspection(result) -> None:
    """The table of sites, that of steps, and what the columns are."""
    from ..study.inspect import site_table, step_table

    print(f"{result.model}: {result.bits}-bit activations, clip {result.clip:g}, weights "
          f"{result.weights}, {result.calibration_tokens} calibration tokens\n")
    print(site_table(result))
    print("\nafter each step: means over the layers, sums of MO and NO\n")
    print(step_table(result))
    print(f"""
MO>T         entries beyond T times the median magnitude; largest: the largest over the median
NO           channels beyond {result.normal:g} x the token's rms in {result.normal_share:.0%} of \
the tokens
utilization  entropy of the codes / {result.bits} bits; fill: mean|x| / (max / 2)
errors       relative, squared: of the quantized activations; of the linears' outputs""")


def run_demo(arguments: argparse.Namespace) -> None:
    from ..study.demo import demo

    demo(arguments.picture)


def run_bench(arguments: argparse.Namespace) -> None:
    from .. import files
    from ..study import bench

    if arguments.json is not None:
        files.check_file(arguments.json)
    result = bench.bench(arguments.seconds)
    print(bench.report(result))
    if arguments.json is not None:
        files.write_file(arguments.json, json.dumps(result, indent=1) + "\n")


def run_runtime(arguments: argparse.Namespace) -> None:
    from .. import show_runtime

    show_runtime()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; 0, or 2 and one line on standard error when the input is at fault."""
    parsed = parser().parse_args(arguments)
    try:
        if getattr(parsed, "threads", None) is not None:
            _C.set_num_threads(parsed.threads)
        parsed.run(parsed)
    except KeyboardInterrupt:
        print("singlequant: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError, MemoryError, ImportError) as error:
        print(f"singlequant: {describe(error)}", file=sys.stderr)
        return EXIT_BAD_INPUT
    return 0


def describe(error: BaseException) -> str:
    """One line that names the thing."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__

