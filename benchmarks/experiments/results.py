"""docs/results.md from the JSON of the experiments and of `singlequant compare --json`.

    python -m benchmarks.experiments.results --from DIR [--out docs/results.md] [--title TEXT]
                                             [--summary docs/summary.md] [--first MODEL]

DIR is searched with its subfolders. A file named after an experiment (convergence.json,
ablation-NAME.json, ...) or a comparison is a section, anything else an error. Figures that lie
beside a file are copied to images/ beside the page; a comparison's is drawn. Where SingleQuant
loses is computed from the same rows. --summary puts the head of it between the marks
<!-- results:begin --> and <!-- results:end -->.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from singlequant.files import write_file
from singlequant.study.compare import Comparison, Row

from ..common import ROOT
from . import command as options
from .report import cell, table

NAME = "results"
OURS = "singlequant"
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
# kind -> heading and what the section is about, in the page's order
SECTIONS = {
    "compare": ("Methods side by side", "All rows of a model share one calibration. Rows of equal "
                "weights and clip differ in the transformation alone. `(default)` is what "
                "`singlequant quantize` does when no option is given."),
    "formats": ("Beside llama.cpp's formats", "llama.cpp's own quantizer made its formats of the "
                "same weights, and llama.cpp ran them. All rows have the same original, tokens and "
                "judge. KL, weights alone, is that of a file's weights in our decoder, whose "
                "activations are float32. llama.cpp itself rounds activations to 8 bits. Each of "
                "our folders is compared with the format of least KL that takes no more bytes."),
    "convergence": ("Baselines and speed", "SpinQuant learns its rotations by a thousand steps of "
                    "Cayley SGD. The closed forms take no steps."),
    "ablation": ("Ablation", "The tables show what each part of the transformation contributes. "
                 "The column kl to hadamard is the KL divided by that of the Hadamard rotation."),
    "closed_forms": ("Closed forms", "The tables list the transformations that were tried. A "
                     "forward pass in NumPy rounds weights and activations. The method `balanced` "
                     "was chosen from them. The ratio is the KL divided by that of the first row. "
                     "The peak is the mean of (max / rms)^2 of the inputs that get 4 bits. The "
                     "bits are those of the activations, as the mean over the inputs."),
    "ranges": ("Activation range", "The tables list the ranges that were tried for the 4-bit "
               "activations, with the same forward pass. Passes are how often the quantizer reads "
               "a token's inputs. Roundings are how often it rounds each of them. Accumulations "
               "are the scaled float sums per output. Corrections are the zero points that each "
               "sum needs. The ratio is the KL divided by that of the first row."),
    "sensitivity": ("Sensitivity", "The tables show how much the thresholds, the calibration and "
                    "the seeds matter."),
    "signatures": ("Failure signatures", "The tables cover cases in which 4-bit activations have "
                   "been reported to fail."),
    "latency": ("Latency", "The tables give the tokens per second that the package itself "
                "reaches."),
}
# files by other names that belong to a kind's section
FILES = {**{kind: kind for kind in SECTIONS},
         **dict.fromkeys(("thresholds", "tokens", "seeds", "factors", "domain"), "sensitivity"),
         "memory": "signatures"}


@dataclass(frozen=True)
class Result:
    """One JSON file: its kind, where it lies, what it holds."""

    kind: str
    path: Path
    values: Mapping[str, Any]

    @property
    def model(self) -> str:
        """The model's name, "" where the file does not say."""
        named = self.values.get("model") or self.values.get("options", {}).get("model") or ""
        return "" if named.startswith("[") else Path(named).name  # of several the rows tell

    @property
    def title(self) -> str:
        """The table's own, or else the model's name or the file's."""
        if self.kind == "compare":
            texts = ", ".join(self.values["texts"])
            return f"{self.model}, {texts}, windows of {self.values['seq_len']}"
        return self.values.get("title") or self.model or self.path.stem

    @property
    def environment(self) -> Mapping[str, Any]:
        """The machine and the date."""
        return self.values.get("machine") or self.values.get("environment") or {}

    def comparison(self) -> Comparison:
        """The result of `singlequant compare`."""
        rows = tuple(Row.from_json(row) for row in self.values["rows"])
        return Comparison(**{**self.values, "texts": tuple(self.values["texts"]), "rows": rows})


def read_results(folder: Path, first: str | None = None) -> list[Result]:
    """Every result in a folder, in the page's order: kinds, then models, the shortest name first.

    first: a model that leads each kind.

    ValueError names a file that is none, or says that there is none.
    """
    found = []
    for path in sorted(folder.rglob("*.json")):
        try:
            values = json.loads(path.read_text("utf-8"))
            rows = values["rows"]
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path}: expected the JSON of an experiment, found: {error!r}"
                             ) from None
        if "fingerprint" in values and "texts" in values:
            kind = "compare"
        else:
            kind = next((k for name, k in FILES.items() if path.stem.startswith(name)), "")
        if not kind or not rows:
            raise ValueError(f"{path}: expected rows of {', '.join(FILES)}, found {len(rows)} "
                             f"rows in a file of another name")
        found.append(Result(kind, path, values))
    if not found:
        raise ValueError(f"{folder}: expected results of experiments, found none")
    order = list(SECTIONS)
    return sorted(found, key=lambda r: (order.index(r.kind), r.model != first, len(r.model),
                                        r.model, r.path))


# ---- a section ----------------------------------------------------------------------------------


def section(result: Result, images: Path) -> str:
    """A table with its command, machine, date, notes and figure."""
    parts = [f"### {result.title}", f"`{command(result)}`", machine(result.environment)]
    if result.kind == "compare":
        parts.append(result.comparison()._repr_markdown_())
    else:
        rows, columns = result.values["rows"], result.values.get("columns")
        parts.append(table(rows, columns))
        parts.append("\n".join(f"- {note}" for note in result.values.get("notes", [])))
    name = figure(result, images)
    if name:
        parts.append(f"![{result.title}]({images.name}/{name})")
    return "\n\n".join(filter(None, parts))


def command(result: Result) -> str:
    """What made the table; of folders outside of the checkout only the last name is shown."""
    values = result.values
    if result.kind == "compare":
        return compare_command(result)
    words = shlex.split(values.get("command", ""))
    if not words:
        words = ["python", "-m", f"benchmarks.experiments.{result.kind}",
                 *result.environment.get("argv", [])]
    return shlex.join(Path(w).name if w.startswith(("/", "../")) else w for w in words)


def compare_command(result: Result) -> str:
    """A `singlequant compare` that makes these rows."""
    values, rows = result.values, result.comparison().rows
    configs = [row.config for row in rows if row.config and not row.default]
    if not configs:
        return f"singlequant compare {result.model}"

    def listed(name: str) -> str:
        return ",".join(dict.fromkeys(str(getattr(config, name)) for config in configs))

    words = ["singlequant", "compare", result.model]
    for option in ("methods", "schemes", "weights", "seeds"):
        name = option if option == "weights" else option[:-1]
        words += [f"--{option}", listed(name)]
    words += ["--clip", f"{configs[0].activation_clip:g}"]
    if configs[0].group_size:
        words += ["--group-size", str(configs[0].group_size)]
    if not any(row.default for row in rows):
        words.append("--no-default")
    if values["texts"] != ["heldout"] or values["calibration"] != "bundled":
        words += ["--text", *values["texts"]]
    words += ["--seq-len", str(values["seq_len"])]
    evaluated = next((row.results[0].tokens for row in rows if row.results), 0)
    words += ["--windows", str(evaluated // values["seq_len"])]
    learned = next((config.learned for config in configs if config.learned), None)
    if learned:
        words += ["--learned", Path(learned).name]
    if values["calibration"] != "bundled":
        words += ["--calibration", Path(values["calibration"]).name]
    words += ["--calibration-tokens", str(configs[0].calibration_tokens)]
    return shlex.join(words)


def machine(environment: Mapping[str, Any]) -> str:
    """One line: the CPU, the kernels, the versions and the date."""
    parts = [environment.get("cpu", "unknown CPU")]
    if "cpus" in environment:
        parts.append(f"{environment['cpus']} CPUs")
    if "threads" in environment:
        parts.append(f"{environment['threads']} thread{'s' * (environment['threads'] > 1)}")
    if "kernels" in environment:
        parts.append(f"{environment['kernels']['active']} kernels")
    if "load" in environment:
        parts.append(f"load {environment['load'][0]} before the run")
    if environment.get("singlequant"):
        parts.append(f"singlequant {environment['singlequant']}")
    return ", ".join([*parts, environment.get("date", "no date")]) + "."


def figure(result: Result, images: Path) -> str | None:
    """Put the result's figure among the page's images; its name, None where there is none."""
    named = result.values.get("figure")
    if named is not None and Path(named).name != named:
        raise ValueError(f"{result.path}: figure: expected the name of a file beside it, "
                         f"found {named!r}")
    source = result.path.with_name(named or f"{result.path.stem}.png")
    suffix = f"-{result.model}" if result.model and result.model not in result.path.stem else ""
    target = images / f"{result.path.stem}{suffix}.png"
    if source.is_file():
        images.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
        return target.name
    if named:
        raise ValueError(f"{result.path}: expected the figure {named} beside it, found none")
    if result.kind != "compare":
        return None
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        print(f"{result.path}: no figure: it needs matplotlib", file=sys.stderr)
        return None
    images.mkdir(parents=True, exist_ok=True)
    result.comparison().plot(target)
    return target.name


# ---- where it loses -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Record:
    """A method's divergence on one text. rounding: what must be equal for a fair comparison."""

    place: tuple[str, str, str]  # model, text, scheme
    method: str
    rounding: str
    default: bool
    kl: float


def records(result: Result) -> Iterator[Record]:
    """The rows with a method and a KL, of any kind of result that compares methods."""
    if result.kind == "compare":
        found = result.comparison()
        for row in found.rows:
            if row.config is None or row.error:
                continue
            c = row.config
            rounding = f"{c.weights}, clip {c.activation_clip:g}"
            if c.group_size:
                rounding += f", groups of {c.group_size}"
            for text, evaluation in zip(found.texts, row.results, strict=True):
                yield Record((found.model, text, c.scheme), c.method, rounding, row.default,
                             evaluation.kl_mean)
    elif result.kind in ("convergence", "ablation"):
        scheme = result.values.get("options", {}).get("scheme", "w4a4")
        for row in result.values["rows"]:
            method, kl = row.get("method"), row.get("kl_mean")
            if method in (None, "original") or kl is None:
                continue
            rounding = f"{row.get('weights', 'rtn')}, clip {row.get('clip', 1.0):g}"
            yield Record((result.model or result.title, row.get("text", ""), scheme), method,
                         rounding, method.startswith("default"), kl)


def losses(result: Result) -> tuple[list[dict[str, Any]], int]:
    """(one row per defeat, contests): methods of lower KL than singlequant at equal rounding, and
    than the default at any. Seeds are averaged."""
    kl: dict[tuple, list[float]] = defaultdict(list)
    for r in records(result):
        kl[r.place, r.rounding, r.default, r.method].append(r.kl)
    means = {key: sum(values) / len(values) for key, values in kl.items()}
    rows, contests = [], 0
    for (place, rounding, default, method), ours in means.items():
        if not (default or method == OURS):
            continue
        contests += 1
        for (other_place, other_rounding, other_default, other), theirs in means.items():
            equal = default or other_rounding == rounding
            if other_place == place and equal and not other_default and theirs < ours:
                rows.append({
                    "model": place[0], "text": place[1], "scheme": place[2],
                    "ours": label(method, default, rounding), "KL": ours,
                    "lower": label(other, False, other_rounding), "its KL": theirs,
                    "ratio": theirs / ours,
                })
    return rows, contests


def label(method: str, default: bool, rounding: str) -> str:
    marked = default and not method.startswith("default")
    return f"{method}{' (default)' if marked else ''}, {rounding}"


def bits_table(results: Sequence[Result]) -> list[dict[str, Any]]:
    """The default's KL by scheme, and what 4 and 8 bits cost beside the next."""
    kl: dict[tuple[str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for result in results:
        if result.kind == "compare":
            for r in records(result):
                if r.default:
                    kl[r.place[:2]][r.place[2]].append(r.kl)
    rows = []
    for (model, text), schemes in kl.items():
        mean = {scheme: sum(values) / len(values) for scheme, values in schemes.items()}
        row: dict[str, Any] = {"model": model, "text": text, **mean}
        for low, high in (("w4a4", "w4a8"), ("w4a8", "w4a16")):
            if low in mean and mean.get(high):
                row[f"{low} / {high}"] = mean[low] / mean[high]
        if len(mean) > 1:
            rows.append(row)
    return rows


def slower(results: Sequence[Result]) -> list[str]:
    """Sentences: who quantizes in less time, which packed model runs slower than which."""
    lines = []
    for result in results:
        if result.kind == "convergence":
            lines += slower_to_quantize(result)
        elif result.kind == "latency":
            lines += slower_to_run(result)
    return lines


def slower_to_quantize(result: Result) -> list[str]:
    """Methods that take less processor time than singlequant at equal rounding."""
    rows = [row for row in result.values["rows"] if "cpu_seconds" in row]
    ours = next((row for row in rows if row["method"] == OURS), None)
    return [f"{result.model}: {row['method']} takes {cell(row['cpu_seconds'])} CPU s to quantize, "
            f"`{OURS}` takes {cell(ours['cpu_seconds'])} CPU s."
            for row in rows if ours is not None and row["weights"] == ours["weights"]
            and row["cpu_seconds"] < ours["cpu_seconds"]]


def slower_to_run(result: Result) -> list[str]:
    """Packed models behind the original, and W4A4 behind W4A8, phase by phase."""
    rows, lines = result.values["rows"], []
    ratios = [key for key in rows[0] if key.endswith("_ratio")]
    at = {(row["scheme"], row["method"]): row for row in rows}
    for row in rows:
        rivals = [("the original", rows[0])]
        if row["scheme"] == "w4a4":
            rivals.append(("W4A8", at.get(("w4a8", row["method"]))))
        for name, rival in rivals:
            behind = [f"{key.removesuffix('_ratio').replace('_', ', batch ')}: "
                      f"{row[key] / rival[key]:.2f}"
                      for key in ratios if rival and row[key] < rival[key]]
            if behind:
                lines.append(f"{result.model}: {row['scheme']} {row['method']} is slower than "
                             f"{name} (its speed relative to that: {'; '.join(behind)}).")
    return lines


def lost(results: Sequence[Result]) -> str:
    """The last section, computed from the rows of the others."""
    rows, contests = [], 0
    for result in results:
        found, count = losses(result)
        rows += [{"table": SECTIONS[result.kind][0], **row} for row in found]
        contests += count
    beaten = len({(row["table"], row["model"], row["text"], row["scheme"], row["ours"])
                  for row in rows})
    parts = ["## Where SingleQuant loses",
             f"This section counts {contests} rows. A row of `{OURS}` is compared with every "
             "method at the same rounding. A row of the default is compared with every row, "
             f"whatever its rounding. Of these rows, {beaten} "
             f"{'has' if beaten == 1 else 'have'} a method of lower KL beside "
             f"{'it' if beaten == 1 else 'them'}{':' if rows else '.'}"]
    if rows:
        parts.append(table(rows))
    bits = bits_table(results)
    if bits:
        parts += ["Activations with 4 bits lower the quality, whatever the rotation. The table "
                  "gives the KL of the default recipe by scheme:", table(bits)]
    lines = slower(results)
    if lines:
        parts.append("\n".join(f"- {line}" for line in lines))
    return "\n\n".join(parts)


# ---- the page -----------------------------------------------------------------------------------


def page(results: Sequence[Result], images: Path, title: str) -> str:
    """docs/results.md, or a page like it."""
    parts = [f"# {title}",
             "`python -m benchmarks.experiments.results` makes this page from what the commands "
             "below wrote. Do not edit it by hand. KL is in nats per token, from the original to "
             "the quantized model. Seconds of a shared machine mean little by themselves: compare "
             "them within a table only. The [glossary](glossary.md) defines the terms: site, "
             "scheme, recipe, KL, top-1 agreement and the models."]
    for kind, (heading, about) in SECTIONS.items():
        chosen = [r for r in results if r.kind == kind]
        if chosen:
            parts += [f"## {heading}", about, *(section(r, images) for r in chosen)]
    return "\n\n".join([*parts, lost(results)]) + "\n"


def head(results: Sequence[Result], link: str) -> str:
    """The summary's table: the first comparison's first text, and the speedup over SpinQuant."""
    parts = []
    for result in [r for r in results if r.kind == "compare"][:1]:
        found = result.comparison()
        rows = []
        for row in found.rows:
            if not row.results:
                continue
            e, name = row.results[0], row.method + (" (default)" if row.default else "")
            rows.append({"scheme": row.scheme, "method": name,
                         "weights": row.config.weights if row.config else None,
                         "perplexity": f"{e.perplexity:.3f}",
                         "KL": f"{e.kl_mean:.5f}",
                         "same top token": f"{e.top1_agreement:.3f}"})
        parts += [f"{found.model} on {found.texts[0]}, {found.rows[0].results[0].predictions} "
                  f"predictions, KL in nats per token to the original:", table(rows)]
    for result in [r for r in results if r.kind == "convergence"][:1]:
        rows = {row["method"]: row for row in result.values["rows"]}
        spin = next((r for name, r in rows.items() if name.startswith("spinquant")
                     and "cpu_seconds" in r), None)
        if spin and "spinquant_cpu_ratio" in rows.get(OURS, {}):
            steps = result.values["curves"]["settings"]["steps"]
            ours = rows[OURS]
            parts.append(
                f"SpinQuant's {steps} steps take {cell(spin['cpu_seconds'])} CPU s on "
                f"{result.model or 'the same model'}. From reading the model to writing it, "
                f"`{OURS}` takes {cell(ours['cpu_seconds'])} CPU s: "
                f"{cell(ours['spinquant_cpu_ratio'])} times less."
            )
    parts.append(f"[All results]({link}) are on one page, with the commands and with the cases in "
                 "which SingleQuant loses.")
    return "\n\n".join(parts)


def replace_marked(text: str, new: str, name: str) -> str:
    """text with what stands between the marks replaced. ValueError unless there is one pair."""
    first, last = text.find(BEGIN), text.find(END)
    if text.count(BEGIN) != 1 or text.count(END) != 1 or last < first:
        raise ValueError(f"{name}: expected {BEGIN} and {END} once each, in this order")
    return f"{text[: first + len(BEGIN)]}\n{new}\n{text[last:]}"


def main(argv: Sequence[str] | None = None) -> None:
    p = options.bare_parser(__doc__, NAME)
    p.add_argument("--from", dest="folder", metavar="DIR", type=Path, required=True)
    p.add_argument("--out", metavar="FILE", type=Path, default=ROOT / "docs" / "results.md")
    p.add_argument("--title", metavar="TEXT", default="Results", help="(default: %(default)s)")
    p.add_argument("--summary", metavar="FILE", type=Path)
    p.add_argument("--first", metavar="MODEL", help="a model that leads each section")
    arguments = p.parse_args(argv)
    with options.errors_of(NAME):
        results = read_results(arguments.folder, arguments.first)
        text = page(results, arguments.out.parent / "images", arguments.title)
        if arguments.summary is not None:
            link = os.path.relpath(arguments.out.resolve(), arguments.summary.resolve().parent)
            summary = replace_marked(arguments.summary.read_text("utf-8"), head(results, link),
                                     str(arguments.summary))
            write_file(arguments.summary, summary)
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        write_file(arguments.out, text)
    print(f"{arguments.out}: {len(results)} tables")


if __name__ == "__main__":
    main()
