"""Methods side by side on families beyond LLaMA, and the page that says where the gains hold.

    python -m benchmarks.families_side_by_side MODEL... --out DIR [--text FILE...]
    python -m benchmarks.families_side_by_side --out DIR --page docs/beyond-llama.md

MODEL is a folder of `benchmarks.train_families`, or any other. Each is compared on the bundled
held-out text and on the files of --text, and DIR gets a JSON file per model. Finished rows are
kept in DIR, so that a run can be stopped and started again. --page writes the page from all JSON
files of DIR, those of earlier runs too.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import singlequant as sq
from singlequant.config import QuantConfig
from singlequant.files import json_text, write_file
from singlequant.study.compare import Comparison

from .experiments import command as options
from .experiments.report import cell, table
from .experiments.results import Result, compare_command, machine

NAME = "families_side_by_side"
METHODS = ("none", "hadamard", "singlequant", "balanced")
SCHEMES = ("w4a4", "w4a8")
DEFAULT = "default recipe"
RECORD = "training.json"
ORDER = ("LlamaForCausalLM", "GPTNeoXForCausalLM", "Qwen3MoeForCausalLM")
# The gains that are asked about: the first is expected to be closer to the original.
GAINS = (("hadamard", "none"), ("singlequant", "hadamard"), ("balanced", "hadamard"),
         ("balanced", "singlequant"), (DEFAULT, "balanced"))


# ---- comparisons --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Side:
    """The comparison of a model, its architecture, and how it was trained where that is known."""

    architecture: str
    training: Mapping[str, Any] | None
    values: Mapping[str, Any]  # of `Comparison.to_json`

    @property
    def result(self) -> Result:
        """What the page of results has helpers for."""
        return Result("compare", Path(self.values["model"]), self.values)

    @property
    def comparison(self) -> Comparison:
        return self.result.comparison()


def compare_model(model: Path, arguments: argparse.Namespace) -> Side:
    """Compare the methods on a folder; rows that an earlier run finished are taken from OUT."""
    name = model.resolve().name
    texts = [sq.bundled_model().parent / "heldout.txt", *arguments.text]
    with options.progress(name) as update:
        found = sq.compare(
            model, methods=METHODS, schemes=SCHEMES, texts=texts, seq_len=arguments.seq_len,
            windows=arguments.windows, rows_file=arguments.out / f"{name}.rows.jsonl",
            progress=update)
    path = found.to_json(arguments.out / f"{name}.json")
    record = model / RECORD
    config = json.loads((model / "config.json").read_text("utf-8"))
    side = Side(config["architectures"][0],
                json.loads(record.read_text("utf-8")) if record.is_file() else None,
                json.loads(path.read_text("utf-8")))
    for made, row in zip(side.values["rows"], found.rows, strict=True):
        if row.config is not None:  # the clip of the day, not of the day of the page
            made["config"]["clip"] = row.config.activation_clip
    write_file(path, json_text(vars(side), indent=1) + "\n")
    print(f"{name}\n{found}\n", flush=True)
    return side


def read_sides(folder: Path) -> list[Side]:
    """The comparisons in a folder, families in the page's order. ValueError where there is none."""
    sides = []
    for path in sorted(folder.glob("*.json")):
        try:
            sides.append(Side(**json.loads(path.read_text("utf-8"))))
            sides[-1].comparison  # noqa: B018
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path}: expected a file of {NAME}, found: {error!r}") from None
    if not sides:
        raise ValueError(f"{folder}: expected files of {NAME}, found none")
    return sorted(sides, key=lambda s: (place(s.architecture), s.values["model"]))


def place(architecture: str) -> tuple[int, str]:
    """Where a family stands on the page."""
    return (ORDER.index(architecture) if architecture in ORDER else len(ORDER), architecture)


# ---- gains --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gain:
    """How a method compares with another one of a family and scheme; a ratio of KL per case.

    A case is a model and a text. A ratio below 1 says that `ours` is closer to the original.
    """

    architecture: str
    scheme: str
    ours: str
    other: str
    ratios: Mapping[tuple[str, str], float]

    @property
    def mean(self) -> float:
        """The geometric mean of the ratios."""
        return geometric_mean(self.ratios.values())

    @property
    def held(self) -> int:
        """In how many cases ours is closer."""
        return sum(ratio < 1 for ratio in self.ratios.values())


def divergences(side: Side) -> Iterator[tuple[str, str, str, float]]:
    """(scheme, method, text, KL) of each quantized row that has figures."""
    found = side.comparison
    for row in found.rows:
        if row.config is None or row.error:
            continue
        method = DEFAULT if row.default else row.method
        for text, evaluation in zip(found.texts, row.results, strict=True):
            yield row.scheme, method, text, evaluation.kl_mean


def by_case(sides: Sequence[Side]) -> dict[tuple[str, str, str], dict[tuple[str, str], float]]:
    """KL by family, scheme and method, then by case."""
    kl: dict[tuple[str, str, str], dict[tuple[str, str], float]] = defaultdict(dict)
    for side in sides:
        for scheme, method, text, value in divergences(side):
            kl[side.architecture, scheme, method][side.values["model"], text] = value
    return kl


def geometric_mean(values: Collection[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def kl_table(sides: Sequence[Side]) -> str:
    """A row per scheme and family: the mean KL of each method over the cases."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for (architecture, scheme, method), cases in by_case(sides).items():
        row = rows.setdefault((scheme, architecture), {"scheme": scheme, "family": architecture})
        row[method] = geometric_mean(cases.values())
    return table([rows[key] for key in sorted(rows, key=lambda key: (key[0], place(key[1])))])


def gains(sides: Sequence[Side]) -> list[Gain]:
    """Every gain that is asked about, by family and scheme."""
    kl, found = by_case(sides), []
    for architecture in dict.fromkeys(side.architecture for side in sides):
        for scheme in SCHEMES:
            for ours, other in GAINS:
                mine, theirs = (kl[architecture, scheme, m] for m in (ours, other))
                ratios = {case: mine[case] / theirs[case] for case in mine if case in theirs}
                if ratios:
                    found.append(Gain(architecture, scheme, ours, other, ratios))
    return found


def gain_table(found: Sequence[Gain]) -> str:
    """A row per gain and scheme; families side by side: the mean ratio, and in how many cases."""
    rows: dict[tuple[str, str, str], dict[str, Any]] = {}
    for gain in found:
        row = rows.setdefault((gain.scheme, gain.ours, gain.other), {
            "scheme": gain.scheme, "KL of": gain.ours, "divided by that of": gain.other})
        row[gain.architecture] = f"{gain.mean:.2f} ({gain.held} of {len(gain.ratios)})"
    return table([rows[key] for key in sorted(rows, key=lambda key: key[0])])


def answers(found: Sequence[Gain]) -> list[str]:
    """A sentence per family and scheme: which gains hold in every case."""
    groups: dict[tuple[str, str], list[Gain]] = defaultdict(list)
    for gain in found:
        groups[gain.architecture, gain.scheme].append(gain)
    lines = []
    for (architecture, scheme), asked in groups.items():
        broken = [f"`{g.ours}` over `{g.other}`" for g in asked if g.held < len(g.ratios)]
        lines.append(f"{architecture}, {scheme}: {len(asked) - len(broken)} of {len(asked)} gains "
                     f"hold in every case" + (f", but not that of {' and '.join(broken)}." if broken
                                              else "."))
    return lines


def losses(found: Sequence[Gain]) -> list[str]:
    """A sentence per gain that does not hold in every case."""
    lines = []
    for gain in found:
        missing = len(gain.ratios) - gain.held
        if missing:
            worst = max(gain.ratios, key=lambda case: gain.ratios[case])
            lines.append(
                f"{gain.architecture}, {gain.scheme}: `{gain.ours}` is not closer than "
                f"`{gain.other}` in {missing} of {len(gain.ratios)} cases. The ratio of KL is "
                f"{gain.mean:.3f} on average and {gain.ratios[worst]:.3f} at worst "
                f"({worst[0]} on {worst[1]}).")
    return lines


# ---- the page -----------------------------------------------------------------------------------


def network_row(side: Side) -> dict[str, Any]:
    """How a model was trained, as a row."""
    made = side.training
    original = side.comparison.rows[0].results[0]
    row = {"model": side.values["model"], "architecture": side.architecture,
           "perplexity of heldout": f"{original.perplexity:.2f}"}
    if made:
        row |= {"parameters": f"{made['parameters'] / 1e6:.1f}M", "steps": made["plan"]["steps"],
                "tokens seen": f"{made['plan']['steps'] * made['plan']['batch'] / 1e6:.2f}M",
                "CPU minutes": f"{made['cpu_seconds'] / 60:.1f}"}
        row |= {f"peak of {site}": f"{min(v):.0f} to {max(v):.0f}"
                for site, v in made["peaks"].items() if v}
    return row


def recipe(sides: Sequence[Side]) -> str:
    """What the default recipe is; where the figures are of another one than today's, what was."""
    differ = dict.fromkeys(
        change for side in sides for row in side.values["rows"] if row["default"]
        for change in changes(row["config"]))
    if not differ:
        return f"{RECIPE} does: {MADE_OF}"
    return (f"{RECIPE} did when these figures were measured: {MADE_OF} Some of its settings were "
            f"others than today's: {', '.join(differ)}.")


def changes(config: Mapping[str, Any]) -> Iterator[str]:
    """Settings of a default row that are no longer the scheme's defaults, each in words."""
    today = QuantConfig(scheme=config["scheme"])
    values = today.to_json() | {"clip": today.activation_clip}
    for name, value in values.items():
        if name not in config:
            yield f"there was no `{name}`"
        elif name not in ("scheme", "seed") and config[name] not in (value, None):
            where = f" in {config['scheme'].upper()}" if name == "clip" else ""
            yield f"`{name}` was {config[name]}{where} and is {value}"


def trained_by(sides: Sequence[Side]) -> str:
    """The commands that made the models."""
    made = [side.training for side in sides if side.training]
    lines = []
    for training in made:
        words = [f"--family {training['family']}", f"--seed {training['plan']['seed']}",
                 f"--steps {training['plan']['steps']}", f"--threads {training['threads']}"]
        words += [] if training["plan"]["factors"] else ["--plain"]
        files = training["texts"][1:]
        words += ["--text", *files] if files else []
        lines.append(f"python -m benchmarks.train_families OUT {' '.join(words)}")
    versions = sorted({f"torch {t['torch']} and transformers {t['transformers']}" for t in made})
    return ("```sh\n" + "\n".join(lines) + "\n```\n\nThe versions were "
            + ", ".join(versions) + ".") if made else ""


def detail(side: Side) -> str:
    """All rows of a model with the command and the machine."""
    rows = [{"scheme": row.scheme, "method": DEFAULT if row.default else row.method,
             "weights": row.config.weights if row.config else None,
             "clip": row.config.activation_clip if row.config else None,
             **{f"{name}, {text}": form.format(getattr(e, key))
                for text, e in zip(side.comparison.texts, row.results, strict=bool(row.results))
                for name, key, form in (("perplexity", "perplexity", "{:.2f}"),
                                        ("KL", "kl_mean", "{:.4f}"),
                                        ("top-1", "top1_agreement", "{:.3f}"))}}
            for row in side.comparison.rows]
    failed = [f"- {row.scheme} {row.method}: {cell(row.error)}"
              for row in side.comparison.rows if row.error]
    return "\n\n".join(filter(None, [
        f"### {side.values['model']}, {side.architecture}", f"`{compare_command(side.result)}`",
        machine(side.values["machine"]), table(rows), "\n".join(failed)]))


ABOUT = """`python -m benchmarks.families_side_by_side` makes this page from its own results. Do \
not edit it by hand. KL is in nats per token, from the original to the quantized model. The \
[glossary](glossary.md) defines the terms.

The paper measures LLaMA alone. This page asks whether its gains hold for a network with LayerNorm \
and GELU, and for one with experts. The networks are small and were trained in minutes, with \
outlier channels made on purpose. The bundled stdlib-llama was trained on the same text and stands \
beside them as the LLaMA. Figures of such networks do not carry over to large ones. They tell \
whether a gain depends on LLaMA's blocks."""

MEANS = """A case is a model and a text. The first table gives the KL of each method as the \
geometric mean over a family's cases. All methods round weights to the nearest code and clip \
nothing."""

RECIPE = "The default recipe is what `singlequant quantize`"
MADE_OF = "`balanced`, with GPTQ, and with clipped activations in W4A4."

READING = """The second table divides the KL of one method by that of another, case by case. A \
cell is the geometric mean of the ratio over a family's cases. Below 1, the first method is closer \
to the original. In parentheses stands in how many cases it is."""

NETWORKS = """A peak is the largest channel's root mean square divided by that of the median \
channel, from the lowest to the highest layer's value, at the inputs of these linears. Each \
network saw no paragraph of the bundled texts. Where cells of a network are blank, its folder has \
no record of its training."""


def page(sides: Sequence[Side]) -> str:
    """docs/beyond-llama.md."""
    found = gains(sides)
    lines = losses(found)
    cases = sum(len(gain.ratios) for gain in found)
    missing = cases - sum(gain.held for gain in found)
    verdict = f"Of {cases} comparisons, {missing} {'has' if missing == 1 else 'have'} no gain."
    return "\n\n".join(filter(None, [
        "# Beyond LLaMA", ABOUT, "## Do the gains hold?",
        "\n".join(f"- {line}" for line in answers(found)), f"{MEANS} {recipe(sides)}",
        kl_table(sides), READING, gain_table(found),
        "## Where they do not hold", verdict, "\n".join(f"- {line}" for line in lines),
        "## The networks", table([network_row(side) for side in sides]), NETWORKS,
        trained_by(sides), "## Every row", *map(detail, sides)])) + "\n"


# ---- the command --------------------------------------------------------------------------------


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = options.bare_parser(__doc__, NAME)
    parser.prog = f"python -m benchmarks.{NAME}"
    parser.add_argument("models", nargs="*", type=Path, metavar="MODEL")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR",
                        help="where the results and finished rows are kept")
    parser.add_argument("--text", type=Path, nargs="+", default=[], metavar="FILE",
                        help="texts to evaluate on, beside the bundled held-out text")
    parser.add_argument("--seq-len", type=options.positive, default=512,
                        help="tokens of a window (default %(default)s)")
    parser.add_argument("--windows", type=options.positive, default=40,
                        help="the first windows of each text (default %(default)s)")
    parser.add_argument("--page", type=Path, metavar="FILE", help="write the page here")
    return options.parse(parser, argv)


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse(argv)
    with options.errors_of(NAME):
        for model in arguments.models:
            compare_model(model, arguments)
        if arguments.page is not None:
            write_file(arguments.page, page(read_sides(arguments.out)))
            print(f"written     {arguments.page}")


if __name__ == "__main__":
    main()
