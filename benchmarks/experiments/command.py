"""The command line of the experiments: options, errors, progress, and the texts to read."""

from __future__ import annotations

import argparse
import contextlib
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import singlequant as sq
from singlequant.study.compare import ROWS_FILE
from singlequant.sweep.text_file import read_text

from .. import common

QUICK = {"windows": 2, "seq_len": 128, "calibration_tokens": 256}


# ---- options ------------------------------------------------------------------------------------


def bare_parser(description: str | None, name: str) -> argparse.ArgumentParser:
    """A parser without options for `python -m benchmarks.experiments.NAME`."""
    return argparse.ArgumentParser(
        prog=f"python -m benchmarks.experiments.{name}", description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def parser(description: str | None, name: str, models: str = "?") -> argparse.ArgumentParser:
    """Options of every experiment on quality. models: how many, as argparse counts."""
    options = bare_parser(description, name)
    default = sq.bundled_model()
    options.add_argument(
        "model", nargs=models, type=Path, default=default if models == "?" else [default],
        metavar="MODEL", help="a folder as save_pretrained writes it (default: the bundled model)",
    )
    options.add_argument("--out", type=Path, default=Path("experiments") / name, metavar="DIR",
                         help="where tables and figures go, and finished rows (%(default)s)")
    options.add_argument("--scheme", default="w4a4", help="bits (%(default)s)")
    options.add_argument("--windows", type=positive, help="windows of a text (default: all)")
    options.add_argument("--seq-len", type=positive, help="tokens of a window (default: the "
                         "model's maximum, 2048 at most)")
    options.add_argument("--calibration-tokens", type=positive,
                         help=f"(default: {sq.QuantConfig().calibration_tokens})")
    options.add_argument("--quick", action="store_true",
                         help="a small part of it, to see that it runs: the figures mean nothing")
    return options


def add_texts(options: argparse.ArgumentParser) -> None:
    """--text and --calibration, one file each."""
    options.add_argument("--text", type=Path, metavar="FILE",
                         help="to evaluate on (default: the bundled held-out text)")
    options.add_argument("--calibration", type=Path, metavar="FILE",
                         help="(default: the bundled text)")


def positive(text: str) -> int:
    """A type for argparse: an integer from 1."""
    value, = common.integers(text)
    return value


def integers(text: str) -> list[int]:
    """A type for argparse: 0,1,2."""
    return common.integers(text, least=0)


def names(text: str) -> list[str]:
    """A type for argparse: A,B."""
    return text.split(",")


def parse(options: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The options given, with --quick's values where there are none; makes the output folder.

    The result also holds `argv` and `command`, the whole command line.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    arguments = options.parse_args(argv)
    arguments.argv, arguments.command = argv, shlex.join([*options.prog.split(), *argv])
    if getattr(arguments, "quick", False):
        for key, value in QUICK.items():
            if getattr(arguments, key) is None:
                setattr(arguments, key, value)
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
    return arguments


@contextlib.contextmanager
def errors_of(name: str) -> Iterator[None]:
    """An error of the user's is one line on standard error and exit status 1.

    The number of threads is afterwards what it was.
    """
    threads = sq.get_num_threads()
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f"{name}: error: {error}") from None
    finally:
        sq.set_num_threads(threads)


def comparison_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """What an experiment hands to sq.compare: rows finished before are taken from the folder."""
    return {
        "schemes": [arguments.scheme], "seq_len": arguments.seq_len, "windows": arguments.windows,
        "calibration_tokens": arguments.calibration_tokens,
        "rows_file": arguments.out / ROWS_FILE,
    }


@contextlib.contextmanager
def progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """A progress callback (done, total) that draws a bar on a terminal."""
    from tqdm import tqdm

    with tqdm(desc=what, unit="step", leave=False, disable=None) as bar:

        def update(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield update


def evaluation_text(path: Path | None) -> str:
    """The text of a file, or the bundled held-out text."""
    return sq.bundled_text("heldout") if path is None else read_text(path)


# ---- texts --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Domain:
    """A kind of text: one to calibrate on, another to evaluate on."""

    name: str
    calibration: Path
    text: Path


def add_domains(options: argparse.ArgumentParser) -> None:
    options.add_argument(
        "--domain", type=Path, nargs="+", action="append", metavar="FILE",
        help="a calibration text and a text to evaluate on, or one text whose first half "
             "calibrates; given once per domain (default: the bundled texts; the C sources)",
    )


@contextlib.contextmanager
def domains(files: Sequence[Sequence[Path]] | None) -> Iterator[list[Domain]]:
    """The domains of --domain. A single file is cut in halves, in a temporary folder."""
    with tempfile.TemporaryDirectory(prefix="singlequant-") as name:
        folder, found = Path(name), []
        if files is None:
            for part in ("calibration", "heldout"):
                (folder / f"{part}.txt").write_text(sq.bundled_text(part), "utf-8")
            (folder / "c-sources.txt").write_text(_c_sources(), "utf-8")
            files = [[folder / "calibration.txt", folder / "heldout.txt"],
                     [folder / "c-sources.txt"]]
        for given in files:
            if len(given) > 2:
                raise ValueError(f"--domain: expected one or two files, found {len(given)}")
            if len(given) == 1:
                given = _halves(given[0], folder / str(len(found)))
            if given[-1].stem in [domain.name for domain in found]:
                raise ValueError(f"--domain: expected texts of different names, found "
                                 f"{given[-1].stem} twice")
            found.append(Domain(given[-1].stem, *given))
        yield found


def _halves(path: Path, folder: Path) -> tuple[Path, Path]:
    """The first half of a text's lines for calibration, the second to evaluate on."""
    lines = read_text(path).splitlines(keepends=True)
    middle = len(lines) // 2
    folder.mkdir()
    files = folder / f"{path.stem}-first-half.txt", folder / f"{path.stem}.txt"
    for file, part in zip(files, (lines[:middle], lines[middle:]), strict=True):
        file.write_text("".join(part), "utf-8")
    return files


def _c_sources() -> str:
    """The core's sources: a domain far from the bundled model's, in every checkout."""
    return "".join(path.read_text("utf-8") for path in sorted((common.ROOT / "csrc").rglob("*.c")))
