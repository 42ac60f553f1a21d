"""What each format of `singlequant export` costs in divergence, run by the program that it is for.

    python -m benchmarks.exports MODEL --work DIR [--text FILE] [--windows N] \\
        [--peer-python VENV/bin/python] [--out DIR]

MODEL is a LLaMA folder in 16 bits, the original that all rows are judged by, on the same windows.
It is quantized by each recipe of RECIPES, and every packed folder is exported to the formats that
take it. All are kept in --work. GGUF files are run by llama.cpp: VENV has llama-cpp-python
(README.md). compressed-tensors folders are run by transformers, where torch, transformers and
compressed-tensors are installed beside this package; their W4A8 rounds activations. Folders of
GPTQ's and AWQ's layouts are run by our own decoder with --dequantize, as are plain folders.

A row without its program is left out aloud. The row `packed` of a recipe is the packed folder in
our runtime: what the export of it has to reach.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import singlequant as sq
from singlequant.checkpoint.folder import load_checkpoint
from singlequant.files import folder_bytes
from singlequant.runtime.model import Model

from .experiments import command as options
from .experiments.report import Report
from .formats_side_by_side import Judge, LlamaCpp, Missing, first_windows

NAME = "exports"
LLAMA_CPP, TRANSFORMERS, OURS = "llama.cpp", "transformers", "our decoder"
PLAIN = {"method": "none", "bits": 4.0, "group_size": 32}
RECIPES = {
    "default, W4A8": sq.QuantConfig(),
    "none, W4A16": sq.QuantConfig("w4a16", **PLAIN),
    "none, W4A8": sq.QuantConfig("w4a8", **PLAIN),
}
# recipe -> (format, dtype, what runs it)
EXPORTS = {
    "default, W4A8": (("hf", "bfloat16", OURS), ("gguf", "float16", LLAMA_CPP)),
    "none, W4A16": (("gguf-blocks", "float16", LLAMA_CPP),
                    ("compressed-tensors", "bfloat16", TRANSFORMERS), ("gptq", "float16", OURS),
                    ("awq", "float16", OURS)),
    "none, W4A8": (("compressed-tensors", "bfloat16", TRANSFORMERS),),
}
COLUMNS = [
    ("recipe", "recipe", ""), ("`--to`", "format", ""), ("`--dtype`", "dtype", ""),
    ("run by", "by", ""), ("MB", "megabytes", ".1f"), ("KL", "kl_mean", ".5f"),
    ("top-1", "top1_agreement", ".3f"), ("perplexity", "perplexity", ".3f"),
]

Row = dict[str, Any]


class Transformers:
    """transformers' model of a folder, in the folder's type. A `Scorer` whose states are logits."""

    def __init__(self, folder: Path, threads: int) -> None:
        import compressed_tensors
        import torch
        import transformers

        self.torch, self.version = torch, (f"transformers {transformers.__version__}, "
                                           f"compressed-tensors {compressed_tensors.__version__}")
        torch.set_num_threads(threads)
        transformers.utils.logging.disable_progress_bar()
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()

    def hidden_states(self, windows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Logits [count, length, vocab], a window at a time."""
        with self.torch.inference_mode():
            return np.concatenate([self.model(self.torch.from_numpy(window[None])).logits.float()
                                   .numpy() for window in windows])

    def logits(self, hidden: NDArray[np.float32]) -> NDArray[np.float32]:
        """The same again."""
        return hidden


def made(path: Path, make: Callable[[], Any]) -> Path:
    """A folder, made unless it is there."""
    if not path.exists():
        make()
    return path


def row_of(judge: Judge, recipe: str, to: str, dtype: str, by: str, folder: Path,
           model: Any) -> Row:
    """One line of the table."""
    found = judge(model)
    print(f"{recipe:<14} {to:<19} KL {found.kl_mean:.5f}", flush=True)
    return {"recipe": recipe, "format": to, "dtype": dtype, "by": by, "bytes": folder_bytes(folder),
            "megabytes": folder_bytes(folder) / 1e6, "kl_mean": found.kl_mean,
            "top1_agreement": found.top1_agreement, "perplexity": found.perplexity}


def rows_of(judge: Judge, recipe: str, arguments: argparse.Namespace, peer: LlamaCpp | None,
            programs: set[str]) -> list[Row]:
    """A recipe's packed folder and its exports."""
    stem, config = recipe.replace(", ", "-").lower(), RECIPES[recipe]
    packed = made(arguments.work / stem, lambda: sq.quantize_folder(
        arguments.model, arguments.work / stem, config))
    rows = [row_of(judge, recipe, "packed", "", OURS, packed, sq.load(packed))]
    for to, dtype, by in EXPORTS[recipe]:
        out = arguments.work / f"{stem}-{to}"
        made(out, lambda out=out, to=to, dtype=dtype: sq.export(packed, to, out, dtype=dtype))
        if by == LLAMA_CPP and peer is None:
            continue
        if by == LLAMA_CPP:
            peer.open(str((out / "model.gguf").resolve()))
            model: Any = peer
            programs.add(peer.hello["version"])
        elif by == TRANSFORMERS:
            try:
                model = Transformers(out, arguments.threads)
            except ImportError as missing:
                print(f"left out: {to}: {missing}")
                continue
            programs.add(model.version)
        else:
            model = Model(load_checkpoint(out, dequantize=True))
        rows.append(row_of(judge, recipe, to, dtype, by, out, model))
    return rows


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = options.bare_parser(__doc__, NAME)
    parser.prog = f"python -m benchmarks.{NAME}"
    parser.add_argument("model", type=Path, metavar="MODEL")
    parser.add_argument("--work", type=Path, required=True, metavar="DIR",
                        help="where the folders are made and kept")
    parser.add_argument("--text", type=Path, metavar="FILE",
                        help="to evaluate on (default: the bundled held-out text)")
    parser.add_argument("--seq-len", type=options.positive, default=512,
                        help="tokens of a window (default %(default)s)")
    parser.add_argument("--windows", type=options.positive, metavar="N",
                        help="the first windows of the text (default: all)")
    parser.add_argument("--recipe", action="append", choices=RECIPES, metavar="NAME",
                        help="one of these alone; may be given again (default: all)")
    parser.add_argument("--peer-python", default=sys.executable, metavar="FILE",
                        help="the Python that has llama-cpp-python (default: this one)")
    parser.add_argument("--threads", type=options.positive, default=len(os.sched_getaffinity(0)),
                        metavar="N", help="(default: one per CPU)")
    parser.add_argument("--out", type=Path, metavar="DIR",
                        help="write exports-MODEL.md, .csv and .json there")
    return options.parse(parser, argv)


def run(arguments: argparse.Namespace) -> Report:
    """All rows of the command as its report."""
    sq.set_num_threads(arguments.threads)
    arguments.work.mkdir(parents=True, exist_ok=True)
    original = Model(load_checkpoint(arguments.model))
    tokens = original.encode(options.evaluation_text(arguments.text))
    judge = Judge(original.checkpoint, first_windows(tokens, arguments), arguments.seq_len)
    rows: list[Row] = []
    programs: set[str] = set()
    with contextlib.ExitStack() as stack:
        cpus = sorted(os.sched_getaffinity(0))[: arguments.threads]
        try:
            peer = LlamaCpp(arguments.model, arguments.work, arguments.peer_python, cpus)
            stack.callback(peer.end)
        except Missing as missing:
            peer = None
            print(f"left out: {LLAMA_CPP}: {missing}")
        for recipe in arguments.recipe or RECIPES:
            rows += rows_of(judge, recipe, arguments, peer, programs)
    name = original.checkpoint.name
    count = judge.tokens.size - judge.tokens.size // arguments.seq_len
    notes = [f"KL to the original on {count} predictions in windows of {arguments.seq_len} tokens.",
             "MB are 10^6 bytes of the folder.", *sorted(programs)]
    return Report(f"exports-{name}", f"Exports of {name}", COLUMNS, rows, notes, name)


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse(argv)
    with options.errors_of(NAME):
        run(arguments).write(arguments)


if __name__ == "__main__":
    main()
