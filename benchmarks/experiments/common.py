"""What the experiments share: options, texts, tables with the machine beside them, figures."""

from __future__ import annotations

import argparse
import contextlib
import csv
import importlib.util
import io
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import singlequant as sq
from singlequant.files import save_figure, write_file
from singlequant.study.compare import ROWS_FILE
from singlequant.sweep.texts import read_text

ROOT = Path(__file__).resolve().parents[2]
QUICK = {"windows": 2, "seq_len": 128, "calibration_tokens": 256}
# Okabe and Ito's colours, told apart by colour-blind readers; every line has its own marker too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")


# ---- options ------------------------------------------------------------------------------------


def parser(description: str | None, name: str, models: str = "?") -> argparse.ArgumentParser:
    """Options of every experiment. models: how many, as argparse counts."""
    options = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = sq.bundled_model()
    options.add_argument(
        "model", nargs=models, type=Path, default=default if models == "?" else [default],
        metavar="MODEL", help="a folder as save_pretrained writes it (default: the bundled model)",
    )
    options.add_argument("--out", type=Path, default=Path("experiments") / name, metavar="DIR",
                         help="where tables and figures go, and finished rows (%(default)s)")
    options.add_argument("--scheme", default="w4a4", help="bits (%(default)s)")
    options.add_argument("--windows", type=_positive, help="windows of a text (default: all)")
    options.add_argument("--seq-len", type=_positive, help="tokens of a window (default: the "
                         "model's maximum, 2048 at most)")
    options.add_argument("--calibration-tokens", type=_positive,
                         help=f"(default: {sq.QuantConfig().calibration_tokens})")
    options.add_argument("--quick", action="store_true",
                         help="a small part of it, to see that it runs: the figures mean nothing")
    return options


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, found {value}")
    return value


def integers(text: str) -> list[int]:
    """Option of the form 0,1,2."""
    return [int(part) for part in text.split(",")]


def parse(options: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The options given, with --quick's values where there are none; makes the output folder."""
    arguments = options.parse_args(argv)
    if arguments.quick:
        for key, value in QUICK.items():
            if getattr(arguments, key) is None:
                setattr(arguments, key, value)
    arguments.out.mkdir(parents=True, exist_ok=True)
    return arguments


def run(function: Callable[[], None]) -> None:
    """Call it; an error of the user's is one line on standard error and exit status 1."""
    try:
        function()
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f"{Path(sys.argv[0]).name}: error: {error}") from None


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
    return "".join(path.read_text("utf-8") for path in sorted((ROOT / "csrc").rglob("*.c")))


# ---- results ------------------------------------------------------------------------------------


@dataclass
class Report:
    """A table. columns: (header, key of a row, format or ""); notes stand below it."""

    name: str  # of the files
    title: str
    columns: Sequence[tuple[str, str, str]]
    rows: list[dict[str, Any]]
    notes: list[str] = field(default_factory=list)

    def markdown(self) -> str:
        """The table; an empty cell where a row has no value."""
        head = [header for header, *_ in self.columns]
        rule = ["---:" if form else "---" for *_, form in self.columns]
        lines = [[_cell(row.get(key), form) for _, key, form in self.columns] for row in self.rows]
        return "\n".join(f"| {' | '.join(line)} |" for line in (head, rule, *lines))

    def write(self, out: Path, arguments: argparse.Namespace, figure: Any = None) -> None:
        """Print the table; write NAME.md, NAME.csv, NAME.json and, with a figure, NAME.png."""
        values = environment()
        machine = (f"{values['cpu']}, {values['cpus']} CPUs, kernels {values['kernels']['active']},"
                   f" commit {values['commit']}")
        command = " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])
        notes = "".join(f"\n- {note}" for note in self.notes)
        text = f"## {self.title}\n\n{self.markdown()}\n{notes}\n"
        write_file(out / f"{self.name}.md", f"{text}\nMachine: {machine}. Command: `{command}`\n")
        write_file(out / f"{self.name}.csv", self._csv())
        options = {key: str(value) if isinstance(value, (Path, list)) else value
                   for key, value in vars(arguments).items()}
        whole = {"title": self.title, "environment": values, "options": options,
                 "notes": self.notes, "rows": self.rows}
        write_file(out / f"{self.name}.json", json.dumps(whole, indent=1, allow_nan=False) + "\n")
        print(text, flush=True)
        if figure is not None:
            save_figure(figure, out / f"{self.name}.png")
        print(f"{out / self.name}.md, .csv, .json{', .png' if figure is not None else ''}\n")

    def _csv(self) -> str:
        keys = dict.fromkeys(key for row in self.rows for key in row)
        file = io.StringIO()
        writer = csv.DictWriter(file, list(keys), lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        return file.getvalue()


def _cell(value: Any, form: str) -> str:
    if value is None:
        return ""
    return str(value) if isinstance(value, str) else format(value, form)


def environment() -> dict[str, Any]:
    """The machine, the commit and the command line, as every benchmark keeps them."""
    path = ROOT / "benchmarks" / "common.py"  # not importable by name: this file has the same
    spec = importlib.util.spec_from_file_location("benchmarks_common", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.environment()


def add_spread(row: dict[str, Any], values: Sequence[float], key: str) -> None:
    """Put the mean of values into row[key] and their sample standard deviation into key_sd."""
    mean = sum(values) / len(values)
    row[key] = mean
    row[f"{key}_sd"] = None
    if len(values) > 1:
        row[f"{key}_sd"] = (sum((v - mean) ** 2 for v in values) / (len(values) - 1)) ** 0.5


# ---- figures ------------------------------------------------------------------------------------


def figure(rows: int, columns: int, width: float = 4.2, height: float = 3.2, **shared: Any):
    """(Figure, axes [rows, columns]) in one style, or (None, None) without matplotlib, aloud."""
    os.environ.setdefault("MPLBACKEND", "Agg")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no figure: it needs matplotlib (pip install 'singlequant[plots]'); run the same "
              "command again when it is there, finished rows are kept", file=sys.stderr)
        return None, None
    drawn = Figure(figsize=(width * columns, height * rows), layout="constrained")
    axes = drawn.subplots(rows, columns, squeeze=False, **shared)
    for axis in axes.flat:
        axis.grid(color="0.9")
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    return drawn, axes


def style(number: int) -> Mapping[str, Any]:
    """Colour and marker of the line with that number."""
    return {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)]}


def plain_ticks(axis: Any, which: str = "y") -> None:
    """Ticks of a log axis as plain figures at 1, 2, 5, 10, ..., also where it spans no decade."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    side = axis.yaxis if which == "y" else axis.xaxis
    side.set_major_locator(LogLocator(subs=(1, 2, 5)))
    side.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    side.set_minor_formatter(NullFormatter())
