"""Command line: quantize, eval, generate, demo, runtime."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from . import _C, __version__
from .artifacts import METHODS, SCHEMES, WEIGHTS, QuantConfig

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
    _add_generate(commands)
    _add_demo(commands)
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
                   help="rounding: rtn = to nearest, mse = to nearest with a searched clip "
                        f"(default {defaults.weights})")
    c.add_argument("--group-size", type=int, metavar="G",
                   help="inputs that share a weight scale, a multiple of 32 (default 0: the whole "
                        "output channel)")
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
                     "Perplexity of a folder, quantized or not, on a text.")
    c.add_argument("model", metavar="MODEL_OR_OUT", type=Path)
    c.add_argument("--text", type=Path, metavar="FILE", required=True)
    c.add_argument("--seq-len", type=int, metavar="N",
                   help="tokens of a window (default: the model's maximum, 2048 at most)")
    c.add_argument("--reference", type=Path, metavar="MODEL",
                   help="also print the divergence from this model")
    c.add_argument("--json", action="store_true", help="print JSON alone")


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


def _add_demo(commands) -> None:
    c = _add_command(commands, "demo", run_demo,
                     "Quantize the bundled model in several ways, compare, draw, write a sentence.")
    c.add_argument("--picture", type=Path, default=Path("singlequant-demo.png"), metavar="FILE",
                   help="where the picture goes (default %(default)s)")


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
             "ignore")
    given = {n: getattr(arguments, n) for n in names if getattr(arguments, n) is not None}
    return QuantConfig.from_json({**recipe.to_json(), **given})


def run_quantize(arguments: argparse.Namespace) -> None:
    from .sweep import dry_run, quantize_folder

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
          f"activation clip {config.activation_clip:g}")
    print(f"size        {megabytes(summary.bytes_before)} -> {megabytes(summary.bytes_after)}")
    print(f"time        {summary.seconds:.1f} s: calibrate {summary.calibration_seconds:.1f} "
          f"({tokens}), solve {summary.solve_seconds:.1f}, "
          f"quantize and pack {summary.quantize_seconds:.1f}")
    print(f"peak memory {megabytes(summary.peak_memory)} besides the mapped weights")
    if summary.resumed_layers:
        print(f"resumed     {summary.resumed_layers} layers were whole; counts are of the others")
    print("per layer   site      factors   ART steps   URT rotations   sweep rotations")
    for site in dict.fromkeys(s.site for s in summary.sites):
        rows = [s for s in summary.sites if s.site == site]
        counts = [spread([getattr(r, field) for r in rows])
                  for field in ("art_steps", "urt_steps", "sweep_rotations")]
        size = f"{rows[0].k1}x{rows[0].k2}"
        print(f"            {site:<9} {size:<9} {counts[0]:>9}   {counts[1]:>13}   {counts[2]:>15}")
    if config.scheme == "w4a4":
        print("hint        --scheme w4a8 is much closer to the original and, on most CPUs, as fast")


def spread(values: Sequence[int]) -> str:
    """'7' or '3-9'."""
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low}-{high}"


def megabytes(count: float) -> str:
    return f"{count / 1e6:.1f} MB"


def run_eval(arguments: argparse.Namespace) -> None:
    from .evaluate import split_windows
    from .sweep import default_seq_len, load, perplexity, read_text

    text = read_text(arguments.text)
    model = load(arguments.model)
    reference = load(arguments.reference) if arguments.reference else None
    limit = model.shape.max_position_embeddings
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
        result = perplexity(model, tokens, seq_len, reference, update)
    if arguments.json:
        print(json.dumps(result.to_json(), allow_nan=False))
        return
    print(f"perplexity      {result.perplexity:.4f}  ({result.predictions} predictions in windows "
          f"of {result.seq_len}, {result.seconds:.1f} s)")
    if reference:
        print(f"reference       {result.reference_perplexity:.4f}")
        print(f"kl_mean         {result.kl_mean:.5f} nats per token from the reference")
        print(f"kl_p99          {result.kl_p99:.5f}")
        print(f"top1_agreement  {result.top1_agreement:.4f}")


def run_generate(arguments: argparse.Namespace) -> None:
    from .runtime import check_sampling, stream_text
    from .sweep import load

    sampling = {
        "max_new_tokens": arguments.max_new_tokens, "temperature": arguments.temperature,
        "top_k": arguments.top_k, "top_p": arguments.top_p, "seed": arguments.seed,
    }
    check_sampling(**sampling)
    model = load(arguments.model)
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


def run_demo(arguments: argparse.Namespace) -> None:
    from .demo import demo

    demo(arguments.picture)


def run_runtime(arguments: argparse.Namespace) -> None:
    from . import show_runtime

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


if __name__ == "__main__":
    sys.exit(main())
