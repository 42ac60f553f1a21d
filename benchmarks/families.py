# SPDX-License-Identifier: Apache-2.0
"""docs/families.md: what each family is made of, how near it is to transformers, what bits cost.

    python -m benchmarks.families [--from tests/data/families] [--out docs/families.md]

The models are the golden folders of the tests: a few thousand random weights each. The errors are
the largest differences from the logits that transformers gave. The costs are of an outlier twin: a
copy that computes the same with large channels in front of its linears.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import singlequant as sq
from benchmarks.common import ROOT
from benchmarks.tables import table
from singlequant import _C, files
from singlequant.checkpoint.views import ValueCheckpoint
from singlequant.info import machine_info
from singlequant.models.families import FAMILIES
from singlequant.models.spec import LayerSpec, ModelSpec, NormSpec, role_row
from singlequant.runtime.model import Model
from singlequant.weights import LayerWeights, Norm

PAGE = ROOT / "docs" / "families.md"
TEMPLATE = ROOT / "benchmarks" / "families.template.md"
GOLDEN = ROOT / "tests" / "data" / "families"
SEED, SHARE, LOW, HIGH = 1, 16, 4.0, 16.0  # one channel of 16 is 4 to 16 times as large
CALIBRATION, HELD_OUT = (8, 64), (8, 48)  # windows of random tokens: count, length
TWIN_TOLERANCE = 2e-3  # largest difference of a twin's logits from its model's
COLUMNS = {"W4A16": ("w4a16", "balanced"), "W4A8": ("w4a8", "balanced"),
           "W4A4": ("w4a4", "balanced"), "W4A4, `none`": ("w4a4", "none")}


# ---- blocks -------------------------------------------------------------------------------------


def blocks_of(spec: ModelSpec) -> list[str]:
    """The blocks of a model in words, but for what all of them have."""
    kinds = spec.kinds
    found = [
        *unique(norm_words(kind) for kind in kinds), *position_words(spec),
        *unique(word for kind in kinds for word in attention_words(kind)),
        *unique(word for kind in kinds for word in mlp_words(kind)),
    ]
    outer = {
        "embedding scaled": spec.embed_scale != 1, "embedding normalized": spec.embed_norm,
        "embedding projected": spec.project_in, "head with bias": spec.head_bias,
        "logits scaled": spec.logit_scale != 1, "logits capped": spec.logit_softcap,
        "no last norm": spec.final_norm is None,
    }  # fmt: skip
    return found + [word for word, there in outer.items() if there]


def unique(words: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(words))


def norm_words(layer: LayerSpec) -> str:
    """The norms of the residual stream and how the two halves of a layer follow each other."""
    places = [place for place in layer.norms if place.endswith(("attention", "mlp"))]
    first = layer.norms[places[0]]
    name = {"rms": "RMSNorm", "layer": "LayerNorm"}[first.kind]
    name += " 1 + w" if first.offset else "" if first.weight else " without weight"
    before = any(place.startswith("before") for place in places)
    after = any(place.startswith("after") for place in places)
    if layer.norm_sums:
        name += " of the sum"
    elif after:
        name += " before and behind" if before else " behind"
    return name + (", parallel" if layer.parallel else "")


def position_words(spec: ModelSpec) -> list[str]:
    """How a token's position is known."""
    words = ["learned positions"] if spec.positions else []
    for kind in spec.kinds:
        a = kind.attention
        if a.slopes:
            words.append("ALiBi")
        if a.rotary is None:
            continue
        turned = 2 * len(a.rotary.inv_freq)
        name = "rotary of a part" if turned < a.head_dim and not a.kv_rank else "rotary"
        name += ", interleaved" if a.rotary.interleaved else ""
        name += ", long" if a.rotary.long_inv_freq else ""
        words.append(name + (", by length" if a.rotary.dynamic else ""))
    turned = [kind.attention.rotary is not None for kind in spec.kinds]
    if any(turned) and not all(turned):
        words.append("layers without rotary")
    return unique(words)


def attention_words(layer: LayerSpec) -> list[str]:
    """What attention has beside heads and a softmax."""
    a, norms = layer.attention, layer.norms
    words = ["latent attention"] if a.kv_rank else []
    if a.kv_heads < a.heads:
        words.append("one key head" if a.kv_heads == 1 else "grouped queries")
    if "q_norm" in norms:
        shape = norms["q_norm"].shape
        words.append("norms of q and k" + (", by head" if len(shape) == 2 else
                                           ", whole" if shape[0] != a.head_dim else ""))
    biased = [role for role in ("q", "k", "v", "o") if role in layer.linears
              and layer.linears[role].bias]
    has = {"window": a.window, "scores capped": a.softcap, "sinks": "sinks" in layer.dense,
           "q, k, v clipped": a.qkv_clip, "queries that grow": a.query_growth,
           f"biases of {', '.join(biased)}": biased}
    return words + [word for word, there in has.items() if there]


def mlp_words(layer: LayerSpec) -> list[str]:
    """The MLP or the experts."""
    experts = layer.experts
    act = (layer.mlp or experts).activation
    gated = any(role.partition(".")[0] == "gate" for role in layer.linears)
    words = [f"{'gated ' if gated else ''}{act}"]
    if experts:
        words.append(f"experts, {experts.scoring}")
        words += ["in groups"] if experts.groups > 1 else []
        words += ["scores corrected"] if "correction" in layer.dense else []
        if experts.shared_intermediate:
            words.append("shared expert" + " with a gate" * ("shared_router" in layer.dense))
    return words + (["branches scaled"] if layer.residual_scale != 1 else [])


# ---- outlier twins ------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False, repr=False)
class OutlierTwin(ValueCheckpoint):
    """A checkpoint in float32 that computes the same with larger channels in front of its linears.

    Channels grow where they are made (a norm, the rows of v or of up) and shrink in what reads
    them. A site that nothing makes channel by channel stays as it is.
    """

    @cached_property
    def tensors(self) -> dict[str, Any]:
        """Type and size of the tensors by name; all are float32."""
        return self._infos({name: "F32" for name, _ in self.spec.tensors()})

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the source's fingerprint and what is done to it."""
        return hashlib.sha256(self.source.fingerprint.encode() + b"outliers").hexdigest()

    def _layer(self, i: int) -> LayerWeights:
        rng = np.random.default_rng([SEED, i])
        spec, source = self.spec.layer(i), self.source.layer(i)
        columns, rows, norms = {}, {}, dict(source.norms)
        for place, readers in read_norms(spec).items():
            scale = channel_scales(rng, spec.linears[readers[0]].k)
            norms[place] = larger_norm(source.norms[place], spec.norms[place], scale)
            columns |= dict.fromkeys(readers, scale)
            if place == spec._value("before_mlp"):
                columns |= {"router": scale, "shared_router": scale}
        for site in spec.sites.values():
            if site.producer in spec.linears:
                scale = channel_scales(rng, spec.linears[site.producer].n)
                rows[site.producer] = scale
                columns |= dict.fromkeys(site.roles, for_readers(spec, site.reads, scale))
        linears = {role: replace(
            linear, weight=scaled(linear.weight, rows.get(role), columns.get(role)),
            bias=None if linear.bias is None else _C.to_float32(linear.bias) * rows.get(role, 1),
        ) for role, linear in source.linears.items()}
        dense = {key: replace(tensor, array=scaled(tensor.array, None, columns[key]))
                 if key in columns else tensor for key, tensor in source.dense.items()}
        return LayerWeights(i, norms, linears, dense=dense)


def read_norms(spec: LayerSpec) -> dict[str, list[str]]:
    """The roles that read what comes out of a norm, by its place, where it has weights."""
    readers: dict[str, list[str]] = {}
    for role in spec.linears:
        readers.setdefault(spec._value(role_row(role).reads), []).append(role)
    return {place: roles for place, roles in readers.items()
            if place in spec.norms and spec.norms[place].weight}


def channel_scales(rng: np.random.Generator, channels: int) -> NDArray[np.float32]:
    """Factors [channels]: 1, and a larger one for one channel of SHARE."""
    scale = np.ones(channels, np.float32)
    chosen = rng.permutation(channels)[: max(1, channels // SHARE)]
    scale[chosen] = np.exp(rng.uniform(np.log(LOW), np.log(HIGH), len(chosen)))
    return scale


def for_readers(spec: LayerSpec, reads: str, scale: NDArray[np.float32]) -> NDArray[np.float32]:
    """The factors of what a site reads: a value head serves several queries."""
    if reads != "attention":
        return scale
    a = spec.attention
    heads = scale.reshape(a.kv_heads, -1)
    return np.repeat(heads, a.heads // a.kv_heads, axis=0).reshape(-1)


def scaled(
    weight: NDArray[Any], rows: NDArray[np.float32] | None, columns: NDArray[np.float32] | None
) -> NDArray[np.float32]:
    """weight [n, k] with its rows multiplied and its columns divided."""
    weight = _C.to_float32(weight)
    weight = weight if rows is None else weight * rows[:, None]
    return np.ascontiguousarray(weight if columns is None else weight / columns)


def larger_norm(norm: Norm, spec: NormSpec, scale: NDArray[np.float32]) -> Norm:
    """The norm whose channels come out larger."""
    offset = np.float32(spec.offset)
    weight = (_C.to_float32(norm.weight) + offset) * scale - offset
    return replace(norm, weight=weight,
                   bias=None if norm.bias is None else _C.to_float32(norm.bias) * scale)


# ---- figures ------------------------------------------------------------------------------------


def parity_error(folder: Path) -> float:
    """The largest difference from transformers' logits of a golden folder."""
    tokens, positions, expected = (
        np.load(folder / f"{name}.npy") for name in ("tokens", "positions", "logits"))
    return float(np.abs(sq.load(folder).forward(tokens[None])[0, positions] - expected).max())


def divergences(folder: Path, work: Path) -> dict[str, float]:
    """KL from an outlier twin to the twin quantized, in nats per token, by column."""
    source = sq.load_checkpoint(folder)
    twin, vocab = OutlierTwin(source), source.spec.vocab
    rng = np.random.default_rng(SEED)
    windows, tokens = rng.integers(2, vocab, CALIBRATION), rng.integers(2, vocab, HELD_OUT)
    reference = Model(twin)
    difference = np.abs(reference.forward(tokens) - Model(source).forward(tokens)).max()
    if not difference < TWIN_TOLERANCE:
        raise ValueError(f"{folder}: expected a twin that computes the same, found logits that "
                         f"differ by {difference:.2g}")
    found = {}
    for column, (scheme, method) in COLUMNS.items():
        config = sq.QuantConfig(scheme=scheme, method=method, bits=4.0)
        rotations = sq.solve_rotations(sq.calibrate(twin, windows), config)
        out = sq.save(sq.quantize(twin, rotations, config), work / scheme / method, twin, config)
        result = sq.evaluate(sq.load(out), tokens.reshape(-1), HELD_OUT[1], reference)
        found[column] = result.kl_mean
    return found


def rows_of(golden: Path) -> Iterator[tuple[str, str, list[str], Path]]:
    """(family, folder's name, blocks, folder) of each golden folder, in the order of the rows."""
    found = {}
    for folder in sorted(path for path in golden.iterdir() if (path / "config.json").is_file()):
        spec = sq.load_checkpoint(folder).spec
        found.setdefault(spec.family, []).append((folder.name, blocks_of(spec), folder))
    for family in FAMILIES:
        for row in found.get(family, []):
            yield family, *row


def page(lines: Sequence[Sequence[str]]) -> str:
    header = ["architecture", "folder", "blocks", "error", *COLUMNS]
    machine = f"{machine_info()['cpu']}, kernels {_C.kernels()['active']}."
    text = TEMPLATE.read_text("utf-8")
    return text.replace("<!-- table -->", table(header, lines, left=3)).replace(
        "<!-- machine -->", machine)


def make(golden: Path) -> str:
    """The page, from the golden folders."""
    lines = []
    with tempfile.TemporaryDirectory() as work:
        for family, name, blocks, folder in rows_of(golden):
            error, cost = parity_error(folder), divergences(folder, Path(work) / name)
            lines.append([f"`{family}`", name, "; ".join(blocks), f"{error:.0e}",
                          *(f"{cost[column]:.2g}" for column in COLUMNS)])
    return page(lines)


def main(argv: Sequence[str]) -> None:
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--from", dest="folder", type=Path, default=GOLDEN, metavar="DIR")
    p.add_argument("--out", type=Path, default=PAGE, metavar="FILE")
    arguments = p.parse_args(argv)
    try:
        files.write_file(arguments.out, make(arguments.folder))
    except (ValueError, OSError) as error:
        sys.exit(f"families: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
