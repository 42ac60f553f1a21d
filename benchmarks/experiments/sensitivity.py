"""How much the result depends on what a user might choose otherwise.

    python -m benchmarks.experiments.sensitivity [MODEL] --part PART [--text FILE]
        [--calibration FILE] [--windows N] [--quick] [--out DIR]

thresholds  which extremes ART takes for massive outliers, and what share of the axis it may pair;
            which URT takes for normal ones: perplexity, KL and zero-shot accuracy of the paper's
            method (--tasks, with lm_eval installed)
tokens      calibration tokens from 16 to 4096, three draws each, of the default recipe
seeds       five draws of the calibration tokens
factors     Kronecker factors of other sizes: KL, seconds to solve, cost per token
domain      calibrated on one kind of text, evaluated on another (--domain)
all         all of them

A part writes PART.md, .csv, .json and .png. The run can be stopped and started again; take another
--out after a change of the code.
"""

from __future__ import annotations

import functools
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import singlequant as sq
from singlequant.methods import paper
from singlequant.methods.axes import SWEEP_ORDER_MAX
from singlequant.methods.solve import solve_layer, solve_site
from singlequant.rotations import LayerRotations
from singlequant.statistics import LayerStatistics, SiteStatistics
from singlequant.study.compare import ROWS_FILE, Row

from . import command, report
from .laboratory import ORIGINAL, Laboratory, Trial

NAME = "sensitivity"
# The paper's method has three thresholds; one moves, the others keep their default.
THRESHOLDS = {
    "art_threshold": ("ART: massive above x median", (1.0, 1.5, 2.0, 3.0, 5.0, 10.0)),
    "art_share": ("ART: share of the axis at most", (0.05, 0.125, 0.25, 0.5, 1.0, 2.0)),
    "urt_threshold": ("URT: normal above x median", (0.0, 0.5, 1.0, 1.5, 2.0, 3.0)),
}
PAPER = {
    "art_threshold": paper.ART_THRESHOLD,
    "art_share": paper.ART_SHARE,
    "urt_threshold": paper.URT_THRESHOLD,
}
TOKENS = tuple(16 << i for i in range(9))  # 16 ... 4096
TOKEN_SEEDS, SEEDS = (1, 2, 3), (1, 2, 3, 4, 5)  # 0 would take the text's first tokens
TOLERANCE = 0.02  # of KL, that fewer tokens may cost
FACTOR_SCALES = tuple(Fraction(2) ** i for i in range(-4, 5))  # of the second factor's order


def laboratory(arguments: Namespace, tasks: Sequence[str] = ()) -> Laboratory:
    text = command.evaluation_text(arguments.text)
    return Laboratory(arguments.model, text, arguments.calibration, arguments.out / ROWS_FILE,
                      seq_len=arguments.seq_len, windows=arguments.windows, tasks=tasks,
                      task_folder=arguments.task_folder)


def recipe(arguments: Namespace, **changes) -> sq.QuantConfig:
    """The default recipe but for `changes`."""
    if arguments.calibration_tokens is not None:
        changes.setdefault("calibration_tokens", arguments.calibration_tokens)
    return sq.QuantConfig(scheme=arguments.scheme, **changes)


def describe(config: sq.QuantConfig) -> str:
    clip = "" if config.activation_clip == 1 else f", clip {config.activation_clip:g}"
    return f"{config.method}, weights {config.weights}{clip}"


def compare(arguments: Namespace, **options) -> sq.Comparison:
    """sq.compare of recipes that round as the default does, unless `options` say otherwise."""
    default = sq.QuantConfig(scheme=arguments.scheme)
    texts = None if arguments.text is None else [arguments.text]
    defaults = {"methods": [default.method], "weights": [default.weights], "clip": None,
                "texts": texts, "calibration": arguments.calibration, "defaults": False,
                **command.comparison_options(arguments)}
    with command.progress(options.pop("what")) as progress:
        found = sq.compare(arguments.model, progress=progress, **{**defaults, **options})
    for row in found.rows:
        if row.error:
            raise ValueError(f"{row.method}: {row.error}")
    return found


# ---- thresholds ---------------------------------------------------------------------------------


def threshold_trials(config: sq.QuantConfig, quick: bool) -> list[Trial]:
    """The paper's method with one threshold moved, and the Hadamard beside it."""

    def solve(layer: LayerStatistics, build: Callable) -> LayerRotations:
        sites = {name: solve_site(site, build, config.seed)
                 for name, site in layer.sites.items()}
        return LayerRotations(layer.index, sites)

    trials = {}
    for name, (_, values) in THRESHOLDS.items():
        few = sorted({*values[::3], PAPER[name]})
        for value in few if quick else values:
            facts = {**PAPER, name: value}
            build = functools.partial(paper.build, **facts)
            trials[f"{name} {value:g}"] = Trial(
                f"{name} {value:g}", config, functools.partial(solve, build=build), facts)
    hadamard = replace(config, method="hadamard")
    trials["hadamard"] = Trial("hadamard", hadamard)
    return list(trials.values())


def thresholds(arguments: Namespace) -> None:
    config = recipe(arguments, method="paper", weights="rtn", bits=4.0, clip=1.0)
    lab = laboratory(arguments, arguments.tasks)
    with command.progress("thresholds") as progress:
        found = lab.run(threshold_trials(config, arguments.quick), progress)
    rows = []
    for name, row in found.items():
        parameter, _, value = name.partition(" ")
        result = row.results[0]
        cells = {"parameter": parameter, "value": float(value) if value else None,
                 "default": parameter in PAPER and float(value) == PAPER[parameter],
                 "perplexity": result.perplexity, "kl_mean": result.kl_mean,
                 "top1_agreement": result.top1_agreement}
        for task, metrics in row.tasks.items():
            cells |= {f"{task}_{metric}": number for metric, number in metrics.items()}
        rows.append(cells)
    rows.sort(key=lambda row: row["parameter"] != ORIGINAL)
    scores = [(task, f"{task}_acc") for task in arguments.tasks]
    for row in rows:
        row["shown"] = row["parameter"] if row["value"] is None else (
            f"{THRESHOLDS[row['parameter']][0]}{' (default)' if row['default'] else ''}")
    title = f"MO and NO thresholds, {lab.checkpoint.path.name}, {arguments.scheme.upper()}, paper"
    columns = [("what", "shown", ""), ("value", "value", "g"), ("perplexity", "perplexity", ".3f"),
               ("KL", "kl_mean", ".5f"), ("top-1", "top1_agreement", ".3f"),
               *((task, key, ".3f") for task, key in scores)]
    count = found[ORIGINAL].results[0].predictions
    notes = ["Weights and activations are rounded to nearest, without a clip. Each row has "
             f"{count} predictions. The median is that of the axis's signed extremes, by "
             "magnitude."]
    absent = [task for task, key in scores if key not in rows[0]]
    if absent:
        notes.append(f"{', '.join(absent)}: not run, lm_eval is not installed "
                     "(pip install 'singlequant[evaluation]').")
    for task, key in scores:
        if f"{key}_stderr" in rows[0]:
            notes.append(f"{task}: the standard error is {rows[0][f'{key}_stderr']:.3f}.")
    report.Report("thresholds", title, columns, rows, notes).write(
        arguments, figure=draw_thresholds(rows, scores, title))


def draw_thresholds(rows: list[dict], scores: list[tuple[str, str]], title: str):
    """A column of panels per threshold, a row per measure; the Hadamard is the dotted line."""
    measures = [("kl_mean", "KL, nats per token"), ("perplexity", "perplexity")]
    measures += [(key, f"{task}\naccuracy") for task, key in scores if key in rows[0]]
    figure, axes = report.figure(len(measures), len(THRESHOLDS), height=2.4, sharey="row",
                                 sharex="col")
    if figure is None:
        return None
    reference = {row["parameter"]: row for row in rows}
    for column, (name, (label, _)) in enumerate(THRESHOLDS.items()):
        line = sorted((r for r in rows if r["parameter"] == name), key=lambda r: r["value"])
        for axis, (key, what) in zip(axes[:, column], measures, strict=True):
            axis.plot([r["value"] for r in line], [r[key] for r in line], **report.style(column))
            axis.axhline(reference["hadamard"][key], color="0.3", linestyle=":",
                         label="Hadamard on both axes")
            axis.axvline(PAPER[name], color="0.7", linewidth=1, label="default")
            if column == 0:
                axis.set_ylabel(what)
        axes[-1, column].set_xlabel(label)
        if name == "art_share":
            axes[-1, column].set_xscale("log")
            report.plain_ticks(axes[-1, column], "x")
    axes[0, -1].legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    figure.suptitle(title, fontsize="medium")
    return figure


# ---- calibration tokens and seeds ---------------------------------------------------------------


def tokens(arguments: Namespace) -> None:
    checkpoint = sq.load_checkpoint(arguments.model)
    rows, short = [], None
    for count in TOKENS[::4] if arguments.quick else TOKENS:
        config = sq.QuantConfig(calibration_tokens=count, seed=1)
        if sq.calibration_windows(checkpoint, config, arguments.calibration).size < count:
            short = count
            break
        found = compare(arguments, what=f"{count} tokens", calibration_tokens=count,
                        seeds=TOKEN_SEEDS)
        rows += [{"calibration_tokens": count, "seed": row.config.seed,
                  "kl_mean": row.results[0].kl_mean, "perplexity": row.results[0].perplexity,
                  "top1_agreement": row.results[0].top1_agreement,
                  "calibrate_seconds": row.seconds["calibrate"]} for row in found.rows[1:]]
    table = []
    for count in dict.fromkeys(row["calibration_tokens"] for row in rows):
        same = [row for row in rows if row["calibration_tokens"] == count]
        line = {"calibration_tokens": count, "draws": len(same)}
        for key in ("kl_mean", "perplexity", "top1_agreement", "calibrate_seconds"):
            report.add_spread(line, [row[key] for row in same], key)
        table.append(line)
    most = table[-1]
    for line in table:
        line["to_most"] = line["kl_mean"] / most["kl_mean"]
    fits = [line["to_most"] <= 1 + TOLERANCE for line in table]
    fewest = table[fits.index(True)]["calibration_tokens"]
    lasting = table[len(fits) - next((i for i, fit in enumerate(reversed(fits)) if not fit),
                                     len(fits))]["calibration_tokens"]
    error = most["kl_mean_sd"] / len(TOKEN_SEEDS) ** 0.5 / most["kl_mean"]
    notes = [
        f"The smallest number whose KL is within {TOLERANCE:.0%} of that of "
        f"{most['calibration_tokens']} tokens is **{fewest}**. From {lasting} on every number is "
        "within it.",
        f"The standard error of the last line's mean is {error:.1%} of it."
        + (" More draws would be needed to tell 2 %." if error > TOLERANCE else ""),
        f"The recipe is the default: {describe(sq.QuantConfig(scheme=arguments.scheme))}.",
    ]
    if short:
        notes.append(f"The calibration text has fewer than {short} tokens.")
    title = f"Calibration tokens, {checkpoint.path.name}, {arguments.scheme.upper()}"
    columns = [("tokens", "calibration_tokens", "d"), ("draws", "draws", "d"),
               ("KL", "kl_mean", ".5f"), ("sd", "kl_mean_sd", ".5f"),
               (f"/ {most['calibration_tokens']} tokens'", "to_most", ".3f"),
               ("perplexity", "perplexity", ".3f"), ("top-1", "top1_agreement", ".3f"),
               ("calibrate s", "calibrate_seconds", ".2f")]
    report.Report("tokens", title, columns, table, notes).write(
        arguments, figure=draw_tokens(rows, table, fewest, title))


def draw_tokens(rows: list[dict], table: list[dict], fewest: int, title: str):
    """KL over tokens, the draws as dots, with the band that counts as equal."""
    figure, axes = report.figure(1, 1, 5.6, 3.8)
    if figure is None:
        return None
    axis, key = axes[0, 0], "calibration_tokens"
    last = table[-1]["kl_mean"]
    band = (last * (1 - TOLERANCE), last * (1 + TOLERANCE))
    axis.axhspan(*band, color="0.85", label=f"within {TOLERANCE:.0%} of {table[-1][key]} tokens")
    axis.plot([r[key] for r in rows], [r["kl_mean"] for r in rows], linestyle="", alpha=0.6,
              label="one draw", **report.style(1))
    axis.plot([r[key] for r in table], [r["kl_mean"] for r in table], label="mean",
              **report.style(0))
    axis.axvline(fewest, color="0.3", linestyle=":", label=f"{fewest} tokens")
    axis.set_xscale("log", base=2)
    axis.set_xticks([r[key] for r in table], labels=[str(r[key]) for r in table])
    axis.set(xlabel="calibration tokens", ylabel="KL to the original, nats per token",
             yscale="log")
    report.plain_ticks(axis)
    axis.legend(fontsize="small")
    figure.suptitle(title, fontsize="medium")
    return figure


def seeds(arguments: Namespace) -> None:
    drawn = SEEDS[:2] if arguments.quick else SEEDS
    default = sq.QuantConfig(scheme=arguments.scheme)
    runs = {describe(default): {}}
    for method in ("singlequant", "paper"):
        config = replace(default, method=method, weights="rtn", clip=1.0)
        runs.setdefault(describe(config), {"methods": [method], "weights": ["rtn"], "clip": 1.0})
    rows, model = [], ""
    for name, options in runs.items():
        found = compare(arguments, what=name, seeds=drawn, **options)
        model = found.model
        rows += [{"recipe": name, "seed": row.config.seed, "kl_mean": row.results[0].kl_mean,
                  "perplexity": row.results[0].perplexity,
                  "top1_agreement": row.results[0].top1_agreement} for row in found.rows[1:]]
    table = []
    for name in runs:
        same = [row for row in rows if row["recipe"] == name]
        line, kl = {"recipe": name, "draws": len(same)}, [row["kl_mean"] for row in same]
        for key in ("kl_mean", "perplexity", "top1_agreement"):
            report.add_spread(line, [row[key] for row in same], key)
        line |= {"least": min(kl), "most": max(kl), "spread": line["kl_mean_sd"] / line["kl_mean"]}
        line["draws_kl"] = " ".join(f"{value:.6f}" for value in kl)
        table.append(line)
    title = f"Draws of the calibration tokens, {model}, {arguments.scheme.upper()}"
    columns = [("recipe", "recipe", ""), ("draws", "draws", "d"), ("KL", "kl_mean", ".5f"),
               ("sd", "kl_mean_sd", ".5f"), ("sd / KL", "spread", ".1%"), ("least", "least", ".5f"),
               ("most", "most", ".5f"), ("perplexity", "perplexity", ".3f"),
               ("sd", "perplexity_sd", ".3f")]
    notes = ["Two recipes whose KL differs by less than about two of these standard deviations "
             "cannot be told apart by one run each."]
    figure, axes = report.figure(1, 1, 6.5, 1.2 + 0.5 * len(runs))
    if figure is not None:
        axis = axes[0, 0]
        for y, name in enumerate(runs):
            kl = [row["kl_mean"] for row in rows if row["recipe"] == name]
            axis.plot(kl, [y] * len(kl), linestyle="", **report.style(y))
        axis.set_yticks(range(len(runs)), labels=list(runs))
        axis.set(ylim=(len(runs) - 0.5, -0.5), xlabel="KL to the original, nats per token",
                 xscale="log")
        report.plain_ticks(axis, "x")
        figure.suptitle(title, fontsize="medium")
    report.Report("seeds", title, columns, table, notes).write(arguments, figure=figure)


# ---- factor sizes -------------------------------------------------------------------------------


def resized(site: SiteStatistics, scale: Fraction) -> SiteStatistics:
    """The site with the second factor's order times `scale`, as far as that divides."""
    k = site.k1 * site.k2
    while scale != 1:
        k2 = site.k2 * scale
        if k2.denominator == 1 and k % k2.numerator == 0:
            break
        scale = scale * 2 if scale < 1 else scale / 2
    if scale == 1:
        return site
    k2 = int(site.k2 * scale)
    return replace(site, k1=k // k2, k2=k2)


def factors(arguments: Namespace) -> None:
    config = recipe(arguments, method=arguments.method, weights=arguments.weights, bits=4.0)
    lab = laboratory(arguments)
    sizes: dict[str, dict[str, tuple[int, int]]] = {}

    def solve(layer: LayerStatistics, scale: Fraction, of: sq.QuantConfig) -> LayerRotations:
        sites = {name: resized(site, scale) for name, site in layer.sites.items()}
        return solve_layer(replace(layer, sites=sites), of)

    first = next(iter(sq.calibrate(
        lab.checkpoint, lab.calibration_windows(config))))
    trials = []
    for scale in FACTOR_SCALES[::4] if arguments.quick else FACTOR_SCALES:
        new = {name: (r.k1, r.k2) for name, site in first.sites.items()
               for r in [resized(site, scale)]}
        if new not in sizes.values():
            sizes[str(scale)] = new
            trials += [
                Trial(f"{of.method} {scale}", of, functools.partial(solve, scale=scale, of=of),
                      {"factor_scale": str(scale)})
                for of in dict.fromkeys((config, replace(config, method="hadamard")))
            ]
    del first
    with command.progress("factors") as progress:
        found = lab.run(trials, progress)
    rows = []
    for name, orders in sizes.items():
        row, plain = found[f"{config.method} {name}"], found[f"hadamard {name}"]
        cost = sum(k1 * k2 * (k1 + k2) for k1, k2 in orders.values())
        cost /= sum(k1 * k2 for k1, k2 in orders.values())
        rows.append({
            "k2_scale": name, "default": name == "1",
            **{site: f"{k1}x{k2}" for site, (k1, k2) in orders.items()},
            "multiply_adds_per_input": cost, "solve_seconds": row.seconds["solve"],
            "kl_mean": row.results[0].kl_mean, "perplexity": row.results[0].perplexity,
            "top1_agreement": row.results[0].top1_agreement,
            "hadamard_kl": plain.results[0].kl_mean})
    default = next(row for row in rows if row["default"])
    for row in rows:
        row["kl_to_default"] = row["kl_mean"] / default["kl_mean"]
    title = f"Factor sizes k1 x k2, {lab.checkpoint.path.name}, {arguments.scheme.upper()}"
    sites = next(iter(sizes.values()))
    columns = [("k2 x", "k2_scale", ""), *((site, site, "") for site in sites),
               ("k1 + k2", "multiply_adds_per_input", ".0f"), ("KL", "kl_mean", ".5f"),
               ("/ default's", "kl_to_default", ".3f"), ("perplexity", "perplexity", ".3f"),
               ("top-1", "top1_agreement", ".3f"), ("solve s", "solve_seconds", ".2f"),
               ("Hadamard's KL", "hadamard_kl", ".5f")]
    notes = [f"The recipe is {describe(config)}. Its own factor sizes are those at k2 x 1. "
             "Hadamard's KL is that of a Hadamard on both axes of the same sizes, with the same "
             "rounding.",
             "k1 + k2 is the number of multiply-adds per input of a site that a rotation with "
             "dense factors takes. It is the mean over the sites, weighted by their width.",
             f"Sweeps leave out factors above order {SWEEP_ORDER_MAX}."]
    report.Report("factors", title, columns, rows, notes).write(
        arguments, figure=draw_factors(rows, config.method, title))


def draw_factors(rows: list[dict], method: str, title: str):
    """KL, seconds to solve and cost per token over the second factor's order."""
    figure, axes = report.figure(1, 3, 3.6, 3.0)
    if figure is None:
        return None
    x = [float(Fraction(row["k2_scale"])) for row in rows]
    measures = (("kl_mean", "KL, nats per token"), ("solve_seconds", "seconds to solve"),
                ("multiply_adds_per_input", "k1 + k2, multiply-adds per input"))
    for number, (axis, (key, label)) in enumerate(zip(axes[0], measures, strict=True)):
        axis.plot(x, [row[key] for row in rows], label=method, **report.style(number))
        axis.axvline(1, color="0.3", linestyle=":")
        axis.set_xscale("log", base=2)
        axis.set_xticks(x, labels=[row["k2_scale"] for row in rows])
        axis.set(xlabel="k2 / default k2", ylabel=label)
        axis.set_yscale("log")
        report.plain_ticks(axis)
    axes[0, 0].plot(x, [row["hadamard_kl"] for row in rows], label="Hadamard, same rounding",
                    **report.style(len(measures)))
    axes[0, 0].legend(fontsize="small")
    figure.suptitle(title, fontsize="medium")
    return figure


# ---- domain -------------------------------------------------------------------------------------


def domain(arguments: Namespace) -> None:
    default = sq.QuantConfig(scheme=arguments.scheme)
    rows, model = [], ""
    with command.domains(arguments.domain) as kinds:
        for calibrated in kinds:
            found = compare(arguments, what=f"calibrated on {calibrated.name}",
                            calibration=calibrated.calibration, texts=[d.text for d in kinds],
                            methods=["hadamard", "singlequant"], weights=["rtn"], clip=1.0,
                            defaults=True)
            model = found.model
            rows += [_domain_row(row, result.to_json(), calibrated.name, text)
                     for row in found.rows[1:]
                     for text, result in zip(found.texts, row.results, strict=True)]
        names = [kind.name for kind in kinds]
    order = list(dict.fromkeys(row["recipe"] for row in rows))
    rows.sort(key=lambda r: (order.index(r["recipe"]), names.index(r["evaluated_on"]),
                             names.index(r["calibrated_on"])))
    for row in rows:
        own = next(r for r in rows if r["recipe"] == row["recipe"]
                   and r["evaluated_on"] == r["calibrated_on"] == row["evaluated_on"])
        row["to_own"] = row["kl_mean"] / own["kl_mean"]
    title = f"Calibration text of another domain, {model}, {arguments.scheme.upper()}"
    columns = [("recipe", "recipe", ""), ("evaluated on", "evaluated_on", ""),
               ("calibrated on", "calibrated_on", ""), ("KL", "kl_mean", ".5f"),
               ("/ own domain's", "to_own", ".3f"), ("perplexity", "perplexity", ".3f"),
               ("top-1", "top1_agreement", ".3f")]
    notes = [f"The default is {describe(default)}. The others round to nearest without a clip. "
             "The method hadamard takes nothing from the calibration."]
    report.Report("domain", title, columns, rows, notes).write(
        arguments, figure=draw_domain(rows, names, order, title))


def _domain_row(row: Row, result: dict, calibrated: str, text: str) -> dict[str, object]:
    return {"recipe": "default" if row.default else row.method, "evaluated_on": text,
            "calibrated_on": calibrated,
            **{key: result[key] for key in ("kl_mean", "perplexity", "top1_agreement")}}


def draw_domain(rows: list[dict], names: list[str], order: list[str], title: str):
    """A panel per evaluation text, a line of it per recipe, a marker per calibration text."""
    figure, axes = report.figure(1, len(names), 4.4, 2.6, sharey=True)
    if figure is None:
        return None
    for axis, text in zip(axes[0], names, strict=True):
        for number, calibrated in enumerate(names):
            same = [r for r in rows if r["evaluated_on"] == text
                    and r["calibrated_on"] == calibrated]
            y = [order.index(r["recipe"]) + (number - (len(names) - 1) / 2) * 0.25 for r in same]
            axis.plot([r["kl_mean"] for r in same], y, linestyle="",
                      label=f"calibrated on {calibrated}", **report.style(number))
        axis.set(title=f"evaluated on {text}", xlabel="KL, nats per token", xscale="log")
        report.plain_ticks(axis, "x")
    axes[0, 0].set_yticks(range(len(order)), labels=order)
    axes[0, 0].invert_yaxis()
    axes[0, -1].legend(fontsize="small")
    figure.suptitle(title, fontsize="medium")
    return figure


PARTS = {"thresholds": thresholds, "tokens": tokens, "seeds": seeds, "factors": factors,
         "domain": domain}


def main(argv: Sequence[str] | None = None) -> None:
    options = command.parser(__doc__, NAME)
    options.add_argument("--part", choices=[*PARTS, "all"], default="all")
    command.add_texts(options)
    options.add_argument("--method", default="singlequant", help="for the factors (%(default)s)")
    options.add_argument("--weights", default="mse", help="rounding, for the factors (%(default)s)")
    options.add_argument("--tasks", type=command.names,
                         default=["stdlib_continuation"],
                         help="of lm-evaluation-harness, for the thresholds (%(default)s)")
    options.add_argument("--task-folder", type=Path, help="of local task files")
    command.add_domains(options)
    arguments = command.parse(options, argv)
    with command.errors_of(NAME):
        for part in PARTS if arguments.part == "all" else [arguments.part]:
            PARTS[part](arguments)


if __name__ == "__main__":
    main()
