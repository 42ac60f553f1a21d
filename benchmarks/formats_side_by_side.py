"""Our packed folders beside llama.cpp's formats: bytes, and divergence from the same original.

    python -m benchmarks.formats_side_by_side MODEL --peer-python VENV/bin/python --work DIR \\
        [--ours OUT...] [--formats Q4_0,Q4_K_M] [--against Q4_0] [--importance FILE] \\
        [--original FOLDER] [--text FILE] [--windows N] [--out DIR]

MODEL is a LLaMA folder in 16 bits. llama.cpp's own quantizer makes its formats of the same weights,
and llama.cpp runs them: VENV has llama-cpp-python (README.md). Every row is judged by the same code
on the same windows, the predictions of each window alone. The original is MODEL in our decoder. The
GGUF files are kept in --work.

With --importance the quantizer gets an importance matrix: the mean square of each input of each
linear on a calibration text, which our calibration takes.

For llama.cpp's rows there is a second divergence, that of the weights alone: our decoder runs the
file's weights in float32. llama.cpp itself rounds activations to 8 bits, as our W4A8 does. The
row of the unquantized file shows what llama.cpp's own arithmetic and cache in 16 bits cost. The
weight error is |file's weights - MODEL's| / |MODEL's| over all matrices. A format that says
a model's weights nearly exactly, because they came out of such a format, says nothing about
quantizing: --against leaves it out when ours are compared.

With --original the rows are judged by that folder, and MODEL is what `singlequant export` made of
it, such as its rotated-hf. Weight errors are still of MODEL's weights.

Each of ours is compared with the format of least divergence among those that take no more bytes.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tempfile
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import singlequant as sq
from singlequant.checkpoint.folder import Checkpoint, load_checkpoint
from singlequant.files import whole_file
from singlequant.models.spec import tensor_name
from singlequant.runtime.model import Model
from singlequant.study.evaluate import CachedScorer, Evaluation, Scorer, evaluate, split_windows
from singlequant.sweep.calibrate import calibrate
from singlequant.sweep.texts import calibration_windows, token_digest

from .experiments import command as options
from .experiments.report import Report
from .peers.gguf_files import gguf_name, source_type
from .processes import Process

NAME = "formats_side_by_side"
THEIRS, OURS = "llama.cpp", "singlequant"
FORMATS = ("Q4_0", "Q4_1", "IQ4_XS", "IQ4_NL", "Q4_K_S", "Q4_K_M", "Q5_K_S", "Q5_K_M", "Q6_K",
           "Q8_0")
ANSWER_SECONDS = 3600.0  # that llama.cpp may take to make a file, or for the logits of a group
NEARLY_EXACT = 0.02  # weight error; 4 bits lose 0.07 and more of weights that they did not make
COLUMNS = [
    ("by", "by", ""), ("format", "format", ""), ("MB", "megabytes", ".2f"),
    ("bits per weight", "bits_per_weight", ".2f"), ("KL", "kl_mean", ".5f"),
    ("KL, weights alone", "kl_weights_alone", ".5f"), ("weight error", "weight_error", ".4f"),
    ("top-1", "top1_agreement", ".3f"), ("perplexity", "perplexity", ".3f"),
    ("best at or below its bytes", "rival", ""), ("KL / that", "ratio", ".2f"),
]

Row = dict[str, Any]


# ---- llama.cpp ----------------------------------------------------------------------------------


class Missing(Exception):
    """llama.cpp's packages are not installed in the Python that was named."""


class LlamaCpp(Process):
    """A process with llama.cpp, which makes and runs the formats of one folder. A `Scorer`.

    Its hidden states are the logits themselves. ValueError when llama.cpp fails.
    """

    def __init__(self, folder: Path, work: Path, python: str, cpus: Sequence[int]) -> None:
        self.scratch = tempfile.TemporaryDirectory(prefix="logits-", dir=work)
        super().__init__(
            "formats_llama_cpp", [folder.resolve(), work.resolve(), ",".join(map(str, cpus))],
            python=python, threads=len(cpus), environment={}, own=False, paused=False,
            timeout=ANSWER_SECONDS)
        if self.failed is not None:
            said = self.said()
            self.end()
            if "missing" in self.hello:
                raise Missing(self.failed)
            raise ValueError(f"{THEIRS}: {self.failed}\n{said}")

    def ask(self, **order: Any) -> dict[str, Any]:
        """The answer; ValueError with what llama.cpp said when it failed."""
        answer = super().ask(**order)
        if "failed" in answer:
            raise ValueError(f"{THEIRS}: {answer['failed']}\n{self.said()}")
        return answer

    def end(self) -> None:
        """Kill the process and remove its logits."""
        super().end()
        self.scratch.cleanup()

    def open(self, kind: str, importance: Path | None = None) -> Path:
        """The file of a format, which the next logits come from."""
        given = None if importance is None else str(importance.resolve())
        return Path(self.ask(do="open", kind=kind, importance=given)["path"])

    def hidden_states(self, windows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Logits [count, length, vocab] of windows [count, length]."""
        given, found = (Path(self.scratch.name) / name for name in ("windows.npy", "logits.npy"))
        np.save(given, windows)
        self.ask(do="logits", windows=str(given), out=str(found))
        return np.load(found, mmap_mode="r")

    def logits(self, hidden: NDArray[np.float32]) -> NDArray[np.float32]:
        """The same again."""
        return np.ascontiguousarray(hidden)


def importance_file(original: Checkpoint, windows: NDArray[np.int64], work: Path) -> Path:
    """An importance matrix of windows [count, length], by GGUF's names; kept in work.

    A linear's entry is the mean of the squares of each of its inputs, float32 [k].
    """
    path = work / f"{original.name}-importance-{token_digest(windows)[:12]}.npz"
    if not path.exists():
        values = {}
        for found in calibrate(original, windows, keep_inputs=False):
            layer = original.spec.layer(found.index)
            for name, site in layer.sites.items():
                of_site = found.sites[name]
                mean = (of_site.sum2 / of_site.count).astype(np.float32)
                for role in site.roles:
                    linear = tensor_name(layer.linears[role].name, found.index)
                    values[gguf_name(f"{linear}.weight")] = mean
        with whole_file(path) as file:
            np.savez(file, **values)
    return path


# ---- rows ---------------------------------------------------------------------------------------


def parameters(checkpoint: Checkpoint) -> int:
    """Numbers in a folder's tensors; tied ones are stored once."""
    return sum(prod(info.shape) for info in checkpoint.tensors.values())


def row_of(by: str, name: str, stored: int, weights: int, found: Evaluation, **more: Any) -> Row:
    """stored: bytes of the weight files. weights: numbers in the original's tensors."""
    return {"by": by, "format": name, "bytes": stored, "megabytes": stored / 1e6,
            "bits_per_weight": 8 * stored / weights, "kl_mean": found.kl_mean,
            "kl_p99": found.kl_p99, "top1_agreement": found.top1_agreement,
            "perplexity": found.perplexity, **more}


def weight_error(original: Checkpoint, other: Checkpoint) -> float:
    """|W' - W| / |W| over all matrices of two folders of one spec."""
    error = whole = 0.0
    for name, info in original.tensors.items():
        if len(info.shape) == 2:
            weight = original.tensor(name).astype(np.float32)
            whole += float(np.vdot(weight, weight))
            weight -= other.tensor(name)
            error += float(np.vdot(weight, weight))
    return (error / whole) ** 0.5


def their_row(peer: LlamaCpp, kind: str, judge: Judge, source: Checkpoint, alone: bool,
              importance: Path | None = None) -> Row:
    """A format of llama.cpp, run by llama.cpp. source: what its files are made of. alone: its
    weights in our decoder, too."""
    checkpoint = load_checkpoint(peer.open(kind, importance))
    return row_of(THEIRS, kind, checkpoint.bytes_on_disk, judge.weights, judge(peer),
                  kl_weights_alone=judge(Model(checkpoint)).kl_mean if alone else None,
                  weight_error=weight_error(source, checkpoint))


def our_row(folder: Path, judge: Judge) -> Row:
    """A packed folder of ours. ValueError unless it is one of the original's vocabulary."""
    model = sq.load(folder)
    checkpoint = model.checkpoint
    if not checkpoint.quantized or model.spec.vocab != judge.original.spec.vocab:
        raise ValueError(f"{folder}: expected a packed folder with a vocabulary of "
                         f"{judge.original.spec.vocab}, found another folder")
    return row_of(OURS, checkpoint.name, checkpoint.bytes_on_disk, judge.weights, judge(model),
                  scheme=checkpoint.quant_config.scheme)


class Judge:
    """Evaluates models on the same tokens against the same original."""

    def __init__(self, original: Checkpoint, tokens: NDArray[np.int64], seq_len: int) -> None:
        self.original, self.tokens, self.seq_len = original, tokens, seq_len
        self.weights = parameters(original)
        self.reference = CachedScorer(Model(original))

    def __call__(self, model: Scorer) -> Evaluation:
        with options.progress("evaluating") as update:
            return evaluate(model, self.tokens, self.seq_len, self.reference, update)


def compared(rows: Sequence[Row], against: Sequence[str]) -> list[Row]:
    """All rows by bytes. Ours name their rival, and their divergence divided by its.

    against: the formats that may be a rival. Without one of no more bytes both are None.
    """
    found = []
    for row in sorted(rows, key=lambda r: (r["bytes"], r["by"], r["format"])):
        row = dict(row)
        if row["by"] == OURS:
            smaller = [r for r in rows if r["by"] == THEIRS and r["format"] in against
                       and r["bytes"] <= row["bytes"]]
            best = min(smaller, key=lambda r: r["kl_mean"], default=None)
            row |= {"rival": best and best["format"],
                    "ratio": best and row["kl_mean"] / best["kl_mean"]}
        found.append(row)
    return found


def notes_of(rows: Sequence[Row], original: Evaluation, against: Sequence[str],
             version: str | None, importance: str | None = None) -> list[str]:
    """What stands below the table."""
    notes = [f"The original has a perplexity of {original.perplexity:.3f} on "
             f"{original.predictions} predictions in windows of {original.seq_len} tokens.",
             "MB are 10^6 bytes of all weight files. Bits per weight are 8 times these bytes, "
             "divided by the numbers in the original's tensors."]
    if version is not None:
        notes.append(f"llama.cpp is that of {version}. Its quantizer had "
                     f"{importance or 'no importance matrix'}.")
    exact = [r["format"] for r in rows if r.get("weight_error", 1.0) < NEARLY_EXACT
             and r["bits_per_weight"] < 6]
    if exact:
        notes.append(f"{', '.join(exact)} can say these weights nearly exactly, as if they had "
                     "come out of such a format.")
    left = [r["format"] for r in rows if r["by"] == THEIRS and r["format"] not in against]
    if left:
        notes.append(f"Ours are not compared with {', '.join(left)}.")
    return notes


# ---- the command --------------------------------------------------------------------------------


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = options.bare_parser(__doc__, NAME)
    parser.prog = f"python -m benchmarks.{NAME}"
    parser.add_argument("model", type=Path, metavar="MODEL")
    parser.add_argument("--ours", type=Path, nargs="+", default=[], metavar="OUT",
                        help="packed folders of MODEL")
    parser.add_argument("--formats", type=options.names, default=list(FORMATS), metavar="A,B",
                        help=f"of llama.cpp (default: {','.join(FORMATS)})")
    parser.add_argument("--against", type=options.names, metavar="A,B",
                        help="the formats that ours are compared with (default: all)")
    parser.add_argument("--peer-python", default=sys.executable, metavar="FILE",
                        help="the Python that has llama-cpp-python (default: this one)")
    parser.add_argument("--work", type=Path, required=True, metavar="DIR",
                        help="where the GGUF files are made and kept")
    parser.add_argument("--importance", type=Path, metavar="FILE",
                        help="give the quantizer an importance matrix of this text")
    parser.add_argument("--importance-tokens", type=options.positive, default=16384, metavar="N",
                        help="(default %(default)s)")
    parser.add_argument("--original", type=Path, metavar="FOLDER",
                        help="what all rows are judged by (default: MODEL)")
    parser.add_argument("--text", type=Path, metavar="FILE",
                        help="to evaluate on (default: the bundled held-out text)")
    parser.add_argument("--seq-len", type=options.positive, default=512,
                        help="tokens of a window (default %(default)s)")
    parser.add_argument("--windows", type=options.positive, metavar="N",
                        help="the first windows of the text (default: all)")
    parser.add_argument("--no-weights-alone", dest="weights_alone", action="store_false",
                        help="leave out the divergence of the weights alone, to save time")
    parser.add_argument("--threads", type=options.positive, default=len(os.sched_getaffinity(0)),
                        metavar="N", help="(default: one per CPU)")
    parser.add_argument("--out", type=Path, metavar="DIR",
                        help="write formats-MODEL.md, .csv and .json there")
    arguments = options.parse(parser, argv)
    arguments.against = arguments.formats if arguments.against is None else arguments.against
    unknown = [name for name in arguments.formats + arguments.against if name not in FORMATS]
    if unknown:
        parser.error(f"--formats: expected some of {', '.join(FORMATS)}, found {unknown[0]}")
    return arguments


def first_windows(tokens: NDArray[np.int64], arguments: argparse.Namespace) -> NDArray[np.int64]:
    """The tokens of the windows asked for. ValueError where the text has fewer."""
    windows = split_windows(tokens, arguments.seq_len)
    count = arguments.windows or len(windows)
    if count > len(windows):
        raise ValueError(f"--windows: expected at most {len(windows)}, the text's, found {count}")
    return windows[:count].reshape(-1)


def run(arguments: argparse.Namespace) -> Report:
    """All rows of the command as its report."""
    exact = source_type(arguments.model)  # refuses at once what cannot be written as GGUF
    sq.set_num_threads(arguments.threads)
    source = load_checkpoint(arguments.model)
    original = Model(load_checkpoint(arguments.original) if arguments.original else source)
    tokens = original.encode(options.evaluation_text(arguments.text))
    judge = Judge(original.checkpoint, first_windows(tokens, arguments), arguments.seq_len)
    itself = evaluate(judge.reference, judge.tokens, judge.seq_len)
    rows = [our_row(folder, judge) for folder in arguments.ours]
    version = matrix = given = None
    arguments.work.mkdir(parents=True, exist_ok=True)
    if arguments.importance is not None:
        config = sq.QuantConfig(calibration_tokens=arguments.importance_tokens)
        windows = calibration_windows(judge.original, config, arguments.importance)
        matrix = importance_file(source, windows, arguments.work)
        given = f"the importance matrix of {windows.size} tokens of {arguments.importance.name}"
    cpus = sorted(os.sched_getaffinity(0))[: arguments.threads]
    try:
        peer = LlamaCpp(arguments.model, arguments.work, arguments.peer_python, cpus)
    except Missing as missing:
        print(f"left out: {THEIRS}: {missing}")
    else:
        version = peer.hello["version"]
        with contextlib.ExitStack() as stack:
            stack.callback(peer.end)
            for kind in [exact, *arguments.formats]:
                rows.append(their_row(peer, kind, judge, source, arguments.weights_alone,
                                      None if kind == exact else matrix))
                print(f"{kind:<8} KL {rows[-1]['kl_mean']:.5f}", flush=True)
    name = source.name
    notes = notes_of(rows, itself, arguments.against, version, given)
    stem = f"formats-{name}" if given is None else f"formats-{name}-importance"
    return Report(stem, f"Beside llama.cpp's formats, {name}", COLUMNS,
                  compared(rows, arguments.against), notes, name)


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse(argv)
    with options.errors_of(NAME):
        run(arguments).write(arguments)


if __name__ == "__main__":
    main()
