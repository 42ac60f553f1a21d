# SPDX-License-Identifier: Apache-2.0
"""Which range the 4-bit activations should have, by KL and by what it costs the inner loop.

    python -m benchmarks.experiments.ranges [MODEL] [--text FILE] [--calibration FILE] [--windows N]
                                            [--seq-len N] [--only PATTERN] [--out DIR] [--quick]

The transformation is that of method `balanced`, without its block of 8-bit inputs and with it; the
weights are GPTQ's (row 1, the baseline, is Hadamard with rounding to nearest). Columns: kl (nats
per token from the original), top1 (share of equal first choices), ratio (kl over the baseline's),
and the cost, counted from the options and the model's shapes: passes (reads of a token's inputs by
the quantizer: range, codes, and the errors of a search), roundings (of each input), accumulations
(scaled float sums per output: the integer sum is cut at each change of the activations' scale),
products_8bit (share of the products with an 8-bit activation), corrections (zero points that each
sum needs) and bits (of the activations, mean over inputs).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from singlequant import _C
from singlequant.methods import singlequant

from . import recipes as table, simulation
from .rounding import Range, round_transformed
from .simulation import Experiment, Key, Ranges, Recipe, Transformed
from .transforms import built, principal

NAME, TITLE = "ranges", "Ranges of 4-bit activations"
STATIC_CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65)
SEARCHES = {3: (0.9, 0.8, 0.7), 4: (0.95, 0.85, 0.75, 0.65),
            9: (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6)}
INT8_SHARES = {"1/16": 1 / 16, "1/8": 1 / 8, "1/4": 1 / 4}
SAMPLE_TOKENS = 128  # of the calibration sample, for the clip of a site


def static_clips(base: Range):
    """Range of each site: base with the clip of least output error on the calibration sample.

    The error is that of the activations alone, |(Q(x) - x) W^T|^2 with x and W transformed.
    """

    def choose(found: Transformed) -> Mapping[Key, Range]:
        chosen = {}
        for key, site in found.experiment.sites.items():
            transform, sample = found.transforms[key], site.statistics.sample
            y = transform.inputs(sample[:: max(1, len(sample) // SAMPLE_TOKENS)])
            weights, errors = np.concatenate(found.float_weights(key)), []
            for clip in STATIC_CLIPS:
                rounded = round_transformed(y, transform.int8_inputs, replace(base, clip=clip))
                errors.append(np.sum(_C.linear_dense(rounded - y, weights) ** 2))
            chosen[key] = replace(base, clip=STATIC_CLIPS[int(np.argmin(errors))])
        return chosen

    return choose


def options() -> dict[str, Ranges]:
    """Every range by name, for the transformation without a block of 8 bits."""
    found: dict[str, Ranges] = {
        f"clip {clip:g}": Range(clip) for clip in (1.0, 0.9, 0.85, 0.8, 0.75, 0.7)
    }
    found |= {f"asymmetric, clip {clip:g}": Range(clip, asymmetric=True)
              for clip in (1.0, 0.95, 0.9, 0.85, 0.8)}
    found |= {f"{rms:g} rms": Range(rms=rms) for rms in (2.3, 2.4, 2.5, 2.6, 2.7)}
    found |= {f"search of {count}": Range(search=ratios) for count, ratios in SEARCHES.items()}
    found["clip per site"] = static_clips(Range())
    found |= {f"groups of {group}, clip {clip:g}": Range(clip, group=group)
              for group in (64, 128) for clip in (1.0, 0.9)}
    found["groups of 64, search of 3"] = Range(search=SEARCHES[3], group=64)
    found["groups of 64, asymmetric, clip 0.95"] = Range(0.95, asymmetric=True, group=64)
    return found


def blocks() -> dict[tuple[str, str], Ranges]:
    """Ranges beside a block of 8 bits, by the block's share and the range's name."""
    every, found = options(), {}
    for share in INT8_SHARES:
        found[share, "clip 0.8"] = every["clip 0.8"]
    for name in ("clip 0.75", "clip 0.85", "2.5 rms", "search of 3", "search of 9",
                 "asymmetric, clip 0.85", "clip per site", "groups of 64, clip 0.9"):
        found["1/8", name] = every[name]
    found["1/4", "search of 3"] = every["search of 3"]
    return found


def recipes() -> list[Recipe]:
    """All rows, those of one transformation together."""
    plain = built(singlequant.build, power=0.5)
    rows = [table.BASELINE]
    rows += [Recipe(name, "balanced, no block", plain, "gptq", r) for name, r in options().items()]
    for share, value in INT8_SHARES.items():
        solver = built(principal(value), power=0.5)
        rows += [Recipe(f"{share} at 8 bits, {name}", f"balanced, {share}", solver, "gptq", r)
                 for (of, name), r in blocks().items() if of == share]
    return rows


def measure(experiment: Experiment, recipe: Recipe) -> dict[str, Any]:
    """What a row holds beside its divergence."""
    return simulation.cost(experiment, recipe)


def main(argv: list[str] | None = None) -> None:
    """The command."""
    table.main(NAME, TITLE, __doc__, recipes, measure, argv)


if __name__ == "__main__":
    main()
