"""What can be put into the weights of a model, and what 4-bit blocks then lose: Q4_0 of each.

    python -m benchmarks.fused_blocks MODEL [--text FILE...] [--windows 7] [--seq-len 512]
        [--calibration FILE] [--json FILE]

It needs the gguf package, whose Q4_0 rounds the linears. Embedding and head stay as they are, and
our decoder runs the weights in float32: what differs is the linears' rounding alone. Each variant
is the same function before that. The balances are folded as `singlequant export --to rotated-hf`
folds them. A variant that the family has no room for is left out.
"""

import argparse
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

import singlequant as sq
from singlequant import _C
from singlequant.checkpoint.views import (
    RandomizedHadamard,
    ResidualCheckpoint,
    ValueCheckpoint,
    View,
)
from singlequant.methods.balance import block_balance, peak_balance, rms_balance
from singlequant.methods.quarot import quarot_checkpoint
from singlequant.rotations import Factor, LayerRotations, SiteRotation
from singlequant.runtime.model import Model
from singlequant.study.evaluate import CachedScorer, evaluate
from singlequant.sweep.balanced import BalancedCheckpoint, balances_of, statistics_of
from singlequant.sweep.text_file import read_text

from . import common


@dataclass(frozen=True, eq=False, repr=False)
class RoundedCheckpoint(View):
    """A checkpoint whose linears were rounded to Q4_0, in float32."""

    source: View

    @property
    def spec(self):
        return self.source.spec

    @property
    def config(self):
        return self.source.config

    @property
    def tensors(self):
        return self.source.tensors

    @property
    def fingerprint(self):
        return f"Q4_0 of {self.source.fingerprint}"

    def _layer(self, i):
        from gguf import GGMLQuantizationType, quants

        layer, kind = self.source.layer(i), GGMLQuantizationType.Q4_0
        linears = {}
        for role, linear in layer.linears.items():
            codes = quants.quantize(_C.to_float32(linear.weight), kind)
            linears[role] = replace(linear, weight=quants.dequantize(codes, kind))
        return replace(layer, linears=linears)


def norms_folded(checkpoint, statistics):
    """Each norm's weights in the columns behind it: what a rotation of the stream must do first."""
    layers = []
    for of_layer in statistics:
        spec, norms = checkpoint.spec.layer(of_layer.index), checkpoint.layer(of_layer.index).norms
        sites = {}
        for name, site in spec.sites.items():
            if site.producer in norms:
                place, found = spec.norms[site.producer], of_layer.sites[name]
                gain = np.abs(_C.to_float32(norms[site.producer].weight) + place.offset)
                sites[name] = SiteRotation(Factor.identity(found.k1), Factor.identity(found.k2),
                                           balance=np.where(gain > 0, gain, 1))
        layers.append(LayerRotations(of_layer.index, sites))
    return BalancedCheckpoint(checkpoint, tuple(layers))


def balanced(balance, checkpoint, statistics):
    return BalancedCheckpoint(checkpoint, tuple(balances_of(s, balance) for s in statistics))


VARIANTS = {
    "as it is": lambda checkpoint, _: checkpoint,
    "norms folded": norms_folded,
    "value heads rotated": lambda checkpoint, _: ValueCheckpoint(checkpoint),
    "residual stream rotated": lambda checkpoint, _: ResidualCheckpoint(
        checkpoint, RandomizedHadamard(checkpoint.spec.hidden, 0)),
    "both rotated": lambda checkpoint, _: quarot_checkpoint(checkpoint, 0),
    "rms balance": partial(balanced, rms_balance),
    "peak balance": partial(balanced, partial(peak_balance, alpha=0.5)),
    "block balance": partial(balanced, block_balance),
}


def measure(checkpoint, texts, arguments):
    """A row for each variant; prints them."""
    statistics = list(statistics_of(checkpoint, arguments.calibration))
    references = {name: CachedScorer(Model(checkpoint)) for name in texts}
    rows = []
    for name in arguments.variants:
        try:
            view = VARIANTS[name](checkpoint, statistics)
        except ValueError as error:
            print(f"{name:<24} left out: {error}", flush=True)
            continue
        model = Model(RoundedCheckpoint(view))
        kl = {text: evaluate(model, tokens, arguments.seq_len, references[text]).kl_mean
              for text, tokens in texts.items()}
        rows.append({"variant": name, "kl_mean": kl})
        print(f"{name:<24} " + "  ".join(f"{value:.4f}" for value in kl.values()), flush=True)
    return rows


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--text", type=Path, nargs="+", default=[], metavar="FILE",
                        help="to evaluate on, beside the bundled held-out text")
    parser.add_argument("--windows", type=int, default=7)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--calibration", metavar="FILE", help="(default: the bundled text)")
    parser.add_argument("--variants", type=lambda text: text.split(","), default=[*VARIANTS])
    common.add_output(parser)
    arguments = parser.parse_args(argv)
    unknown = {*arguments.variants} - {*VARIANTS}
    if unknown:
        parser.error(f"--variants: expected some of {', '.join(VARIANTS)}, found "
                     f"{', '.join(sorted(unknown))}")
    return arguments


def main(argv=None):
    arguments = parse(argv)
    environment = common.environment(argv)
    common.print_environment(environment)
    checkpoint = sq.load_checkpoint(arguments.model)
    texts = {path.stem: read_text(path) for path in arguments.text}
    texts |= {"bundled heldout": sq.bundled_text("heldout")}
    count = arguments.windows * arguments.seq_len
    texts = {name: checkpoint.encode(text)[:count] for name, text in texts.items()}
    print(f"KL of Q4_0's linears to the original, {arguments.windows} windows of "
          f"{arguments.seq_len} tokens of {', '.join(texts)}", flush=True)
    rows = measure(checkpoint, texts, arguments)
    common.write_result({"environment": environment, "rows": rows}, arguments.json)


if __name__ == "__main__":
    main()
