# SPDX-License-Identifier: Apache-2.0
"""README.md of a packed folder: the model card that the Hub shows.

It names no time, no machine and no folder: a run that is done again gives the same bytes.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ..config import SCHEMES, QuantConfig
from ..files import MAX_JSON_BYTES, not_finite
from ..info import __version__
from ..methods.registry import METHODS
from ..models.spec import LinearSpec
from ..tensors import read_header
from ..weights import WEIGHT_BITS
from .partial import source_of

if TYPE_CHECKING:
    from ..checkpoint.folder import Checkpoint

__all__ = ["CARD_FILE", "Figures", "base_model", "model_card", "quantize_command"]

CARD_FILE = "README.md"
RECIPE_ONLY = ("gptq_damping", "kv_dtype")  # fields of QuantConfig that no option sets
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
KEPT_FACTS = ("license", "license_name", "license_link", "language")  # of the source's own card
MOST_OF_A_FACT = 200  # characters


class Figures(Protocol):
    """What was measured on the packed folder; an `Evaluation` beside a reference is one."""

    perplexity: float
    predictions: int
    seq_len: int
    kl_mean: float | None
    reference_perplexity: float | None


def model_card(
    checkpoint: Checkpoint,
    config: QuantConfig,
    linears: Mapping[str, LinearSpec],
    *,
    shards: Iterable[Path] = (),
    written: str | None = None,
    figures: Figures | None = None,
) -> str:
    """The card of the folder that config made of checkpoint, a Checkpoint or a view of one.

    linears: those that are packed, by name. shards: the files of the folder's tensors. written: the
    argument of --calibration where the model wrote its text. figures: what was measured, None if
    nothing was.
    """
    base, sizes = base_model(source_of(checkpoint)), _stored_bytes(shards)
    mean = _mean_bits(linears, sizes)
    lines = ["---", *_front_matter(checkpoint, config, base, mean), "---", ""]
    what = f"[{base}](https://huggingface.co/{base})" if base else (
        f"A {checkpoint.spec.family} of {checkpoint.spec.layers} layers")
    lines += [f"# {base or checkpoint.spec.family} in {_number(mean)} bits", "",
              f"{what} was quantized by singlequant {__version__}, to run on CPUs: weights of "
              f"{_number(mean)} bits on average, activations of {config.activation_bits} bits.", ""]
    lines += ["## Figures", "", *_table(checkpoint, config, linears, mean, sum(sizes.values()),
                                        figures), "", *_measured_on(figures), ""]
    lines += ["## Use", "", "Where singlequant is installed:", "", "```sh",
              'singlequant generate FOLDER --prompt "Once upon a time"', "```", "",
              "FOLDER is a copy of this repository, such as `hf download` makes. In Python:", "",
              "```python", "import singlequant as sq", "",
              'model = sq.load("FOLDER")', 'print(model.generate("Once upon a time"))', "```", ""]
    lines += ["## How it was made", "", "```sh", quantize_command(config, written), "```", "",
              "MODEL is a folder of the original. `recipe.json` holds every option and the hash of "
              "the calibration tokens. A text of one's own is given by `--calibration FILE`.",
              "", f"Method `{config.method}`: {METHODS[config.method].summary}."]
    return "\n".join(lines) + "\n"


def base_model(checkpoint: Checkpoint) -> str | None:
    """The Hub's name of the source, OWNER/NAME: of the cache that it lies in, or as config.json
    says; None where neither does."""
    for part in checkpoint.path.absolute().parts:
        owner, _, name = part.removeprefix("models--").partition("--")
        if part.startswith("models--") and HUB_ID.fullmatch(f"{owner}/{name}"):
            return f"{owner}/{name}"
    name = checkpoint.config.get("_name_or_path")
    return name if isinstance(name, str) and HUB_ID.fullmatch(name) else None


def quantize_command(config: QuantConfig, written: str | None = None) -> str:
    """The command that makes a folder of this recipe. written: as in `model_card`."""
    words = ["singlequant", "quantize", "MODEL", "OUT"]
    usual, several = QuantConfig(), config.weights != QuantConfig.weights  # defaults of tokens
    changed = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)
               if getattr(config, field.name) != getattr(usual, field.name)
               or (several and field.name == "calibration_tokens")}
    if any(name in changed for name in RECIPE_ONLY):
        changed = {"recipe": "recipe.json"}
    for name, value in changed.items():
        option = f"--{name.replace('_', '-')}"
        if value is True:
            words.append(option)
        else:
            for one in value if isinstance(value, tuple) else (value,):
                words += [option, f"{one:g}" if one == float(f"{one:g}") else repr(one)
                          ] if isinstance(one, float) else [option, str(one)]
    if written is not None:
        words += ["--calibration", written]
    return shlex.join(words)


def _front_matter(checkpoint: Checkpoint, config: QuantConfig, base: str | None, mean: float
                  ) -> list[str]:
    """The lines of YAML that the Hub reads: JSON values, which YAML takes as they are."""
    values: dict[str, Any] = {}
    if base is not None:
        values |= {"base_model": base, "base_model_relation": "quantized"}
    values |= {"library_name": "singlequant", "pipeline_tag": "text-generation"}
    values |= _kept_facts(checkpoint.path / CARD_FILE)
    values |= {"quantized_by": f"singlequant {__version__}",
               "tags": ["singlequant", config.scheme, f"{int(mean)}-bit", "quantized", "cpu"]}
    return [f"{key}: {json.dumps(value, allow_nan=False)}" for key, value in values.items()]


def _kept_facts(card: Path) -> dict[str, Any]:
    """Licence and languages that the source's own card states; nothing if it has none."""
    if not card.is_file() or card.stat().st_size > MAX_JSON_BYTES:
        return {}
    from huggingface_hub.repocard import metadata_load  # which tokenizers needs

    try:
        found = metadata_load(card)
    except Exception:  # a card that nobody can read: the model is fine without
        return {}
    return {key: found[key] for key in KEPT_FACTS if _is_fact(found.get(key))} if isinstance(
        found, dict) else {}


def _is_fact(value: Any) -> bool:
    """Whether a value of a card is a short text, or a list of such."""
    if isinstance(value, list):
        return 0 < len(value) <= MOST_OF_A_FACT and all(
            isinstance(one, str) and _is_fact(one) for one in value)
    return isinstance(value, str) and 0 < len(value) <= MOST_OF_A_FACT


def _stored_bytes(shards: Iterable[Path]) -> dict[str, int]:
    """Bytes of every tensor of these files."""
    return {name: info.nbytes for path in shards for name, info in read_header(path).items()}


def _mean_bits(linears: Mapping[str, LinearSpec], sizes: Mapping[str, int]) -> float:
    """Bits of a weight of the packed linears, on average; 4 where there are none."""
    weights = sum(linear.n * linear.k for linear in linears.values())
    stored = 8 * sum(sizes.get(f"{name}.weight_packed", 0) for name in linears)
    return stored / weights if stored else float(WEIGHT_BITS[0])


def _table(
    checkpoint: Checkpoint, config: QuantConfig, linears: Mapping[str, LinearSpec],
    mean: float, tensor_bytes: int, figures: Figures | None,
) -> Iterable[str]:
    """The table of figures: the original beside the folder."""
    spec, dtype = checkpoint.spec, checkpoint.dtype
    every = sum(len(spec.layer(i).linears) for i in range(spec.layers))
    tables, unquantized = config.table_bits(spec), SCHEMES["w4a16"]
    activations = config.activation_bits
    rows = [("bits of a weight of the linears, on average", dtype,
             _number(mean)),
            ("bits of an activation", dtype,
             "not quantized" if activations == unquantized else str(activations))]
    for what, name in (("embedding", spec.embed), ("head", spec.head)):
        if what == "embedding" or not spec.tied:
            shown = "embedding and head" if spec.tied else what
            rows.append((f"bits of {shown}", dtype, str(tables.get(name, dtype))))
    if len(linears) < every:
        rows.append((f"linears left as they were, of {every}", "", str(every - len(linears))))
    rows.append(("bits of cached keys and values", dtype, str(config.kv_bits)))
    rows.append(("size of the weights", _megabytes(source_of(checkpoint).bytes_on_disk),
                 _megabytes(tensor_bytes)))
    if figures is not None and figures.reference_perplexity is not None:
        rows.append(("perplexity", _figure(figures.reference_perplexity, ".2f"),
                     _figure(figures.perplexity, ".2f")))
        rows.append(("KL divergence from the original, nats per token", "0",
                     _figure(figures.kl_mean, ".4f")))
    head = ["| | original | this folder |", "|---|---:|---:|"]
    return [*head, *(f"| {what} | {before} | {after} |" for what, before, after in rows)]


def _measured_on(figures: Figures | None) -> list[str]:
    """Where perplexity and divergence are from."""
    if figures is None:
        return ["Perplexity and divergence were not measured when the folder was made. "
                "`singlequant eval FOLDER --text FILE --reference MODEL` measures both."]
    return [f"Perplexity and divergence are of {figures.predictions} predictions, in windows of "
            f"{figures.seq_len} tokens, of the held-out text that singlequant brings along. "
            f"Calibration never saw that text. It is short: `singlequant eval` measures on yours."]


def _number(value: float) -> str:
    """At most two digits behind the point."""
    return f"{value:.2f}".rstrip("0").rstrip(".")


def _figure(value: float | None, form: str) -> str:
    """A measured number; a word where it is not finite."""
    return "-" if value is None else not_finite(value) or format(value, form)


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB"
