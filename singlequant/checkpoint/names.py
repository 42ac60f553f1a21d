# SPDX-License-Identifier: Apache-2.0
"""Which stored tensor is which: prefixes of the base model, and tensors beside the model's own."""

from __future__ import annotations

import fnmatch
import os
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .._C import FormatError
from ..models.spec import ModelSpec, tensor_name
from ..tensors import TensorFiles, TensorInfo

# Buffers that every forward pass makes anew: tables of the rotary embedding, causal masks.
ROTARY_BUFFERS = ("*.rotary_emb.*",)
MASK_BUFFERS = ("*.attn.bias", "*.attn.masked_bias", "*.attention.bias", "*.attention.masked_bias")
# Tensors inside the layers that transformers leaves out as well: adapters that were not merged,
# and the scales of a quantized KV cache.
REPORTED = ("*.lora_A.*", "*.lora_B.*", "*.lora_embedding_A*", "*.lora_embedding_B*",
            "*.lora_magnitude_vector*", "*.k_scale", "*.v_scale", "*.q_scale", "*.prob_scale")


# ---- prefixes -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Renaming:
    """Stored names begin with `stored` where the spec's begin with `base`."""

    stored: str
    base: str
    roots: frozenset[str]  # what may follow `stored` if that is empty: layers, norm, ...
    head: str

    def __call__(self, name: str) -> str:
        """The spec's name of a stored tensor."""
        outer, found, part = name.rpartition(f"{self.head}.")
        if found and "." not in part and self.stored.startswith(outer):
            return found + part
        return self.base + name.removeprefix(self.stored) if self.covers(name) else name

    def covers(self, name: str) -> bool:
        """Whether a stored tensor is of the base model."""
        rest = name.removeprefix(self.stored)
        return name.startswith(self.stored) and (
            bool(self.stored) or rest.partition(".")[0] in self.roots)


def find_renaming(spec: ModelSpec, present: Collection[str]) -> Renaming | None:
    """How stored names become the spec's; None where they are, or where no rule is the only one.

    The embedding is looked for by the end of its name. What stands in front of that end is the
    prefix, in the folder and in the spec. Of several prefixes that one counts under which most of
    the first layer is found.
    """
    expected = f"{spec.embed}.weight"
    if expected in present:
        return None
    end = ".".join(expected.split(".")[-2:])
    found = [name for name in present if name == end or name.endswith(f".{end}")]
    if not found:
        return None
    modules = {name.rpartition(".")[0] for name in present}
    own = {name.rpartition(".")[0] for name, _ in spec.layer_tensors(0)}
    scores: dict[tuple[str, str], int] = {}
    for name in found:
        stored, base = _prefixes(name, expected)
        scores[stored, base] = sum(stored + module.removeprefix(base) in modules for module in own)
    best = max(scores.values())
    chosen = [pair for pair, score in scores.items() if score == best]
    if best == 0 or len(chosen) > 1:
        return None
    stored, base = chosen[0]
    names = (*_outer(spec), *own)
    roots = frozenset(name.removeprefix(base).partition(".")[0] for name in names)
    return Renaming(stored, base, roots, spec.head)


def _outer(spec: ModelSpec) -> list[str]:
    """Modules of the base model outside of its layers."""
    names = (name.rpartition(".")[0] for name, _ in spec.outer_tensors())
    return [name for name in names if name != spec.head]


def find_spelling(
    respelled: Mapping[str, str] | None, present: Collection[str]
) -> dict[str, str]:
    """Those parts of names that the folder spells in another way than the spec."""
    return {other: own for other, own in (respelled or {}).items()
            if any(other in name for name in present) and not any(own in name for name in present)}


def _prefixes(name: str, expected: str) -> tuple[str, str]:
    """What stands in front of the longest common end of dotted parts, in both names."""
    a, b = name.split(".")[::-1], expected.split(".")[::-1]
    common = len(os.path.commonprefix([a, b]))
    return tuple("".join(f"{part}." for part in parts[common:][::-1]) for parts in (a, b))


def require_head(folder: Path, spec: ModelSpec, infos: Mapping[str, TensorInfo]) -> None:
    """FormatError if the model's own head is missing: transformers would make a random one."""
    if not spec.tied and f"{spec.head}.weight" not in infos:
        raise FormatError(
            f"{folder}: {spec.head}.weight: missing tensor, expected shape "
            f"{[spec.vocab, spec.hidden]}: a folder that AutoModel saved has no head. Save it by "
            f"AutoModelForCausalLM, or set tie_word_embeddings in config.json if the embedding is "
            f"the head"
        )


def has_own_head(folder: Path, spec: ModelSpec, files: TensorFiles) -> bool:
    """Whether a model whose config.json ties the head to the embedding stores another head.

    The tensors decide, as in transformers. A warning says so.
    """
    head, embedding = f"{spec.head}.weight", f"{spec.embed}.weight"
    if not spec.tied or head not in files or embedding not in files:
        return False
    same_kind = all(getattr(files.infos[head], field) == getattr(files.infos[embedding], field)
                    for field in ("dtype", "shape"))
    if same_kind and files.pages(head) == files.pages(embedding):
        a, b = (np.ascontiguousarray(files.view(name)).view(np.uint8) for name in (head, embedding))
        if np.array_equal(a, b):
            return False
    warnings.warn(f"{folder}: tie_word_embeddings is true in config.json, but {head} is not "
                  f"{embedding}: the head is read as it is stored", stacklevel=3)
    return True


# ---- tensors beside the model's own -------------------------------------------------------------


def base_prefix(spec: ModelSpec) -> str:
    """What all names of the base model begin with, such as `model.`."""
    names = (*_outer(spec), *(name for name, _ in spec.layer_tensors(0)))
    parts = os.path.commonprefix([name.split(".")[:-1] for name in names])
    return "".join(f"{part}." for part in parts)


def sort_extras(
    spec: ModelSpec, config: Mapping[str, Any], infos: Mapping[str, TensorInfo],
    extras: Iterable[str], outside: Collection[str] = (), unneeded: Collection[str] = (),
) -> tuple[list[str], list[str]]:
    """(silent, reported): the tensors that the spec does not explain, none of which is needed.

    silent: buffers, `unneeded`, the copy of a tied head. reported: tensors outside of the base
    model such as a vision tower's, layers that predict further tokens
    (`num_nextn_predict_layers`), REPORTED. outside: names known to be outside of the base model.
    unneeded: names whose values change nothing. FormatError names any other tensor: it may change
    the result.
    """
    silent, reported = [], []
    base, further = base_prefix(spec), _further_layers(spec, config)
    patterns = (*unneeded, *((f"{spec.head}.weight",) if spec.tied else ()))
    for name in sorted(extras):
        if _matches(name, patterns) or _is_buffer(name, infos[name]):
            silent.append(name)
            continue
        own = name not in outside and name.startswith((base, f"{spec.head}."))
        if own and not name.startswith(further) and not _matches(name, REPORTED):
            raise FormatError(
                f"{infos[name].path}: {name}: unexpected tensor: not part of a {spec.family} with "
                f"{spec.layers} layers as config.json describes it"
            )
        reported.append(name)
    return silent, reported


def _further_layers(spec: ModelSpec, config: Mapping[str, Any]) -> tuple[str, ...]:
    """Prefixes of the layers behind the last one that predict more than the next token."""
    count = config.get("num_nextn_predict_layers")
    template = next(iter(spec.layer(0).linears.values())).name.partition("{i}")[0] + "{i}."
    count = min(count, 16) if type(count) is int else 0
    return tuple(tensor_name(template, spec.layers + i) for i in range(count))


def warn_of(path: Path, names: Sequence[str]) -> None:
    """One warning about tensors that are left out."""
    if names:
        shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        tensors = "1 tensor is" if len(names) == 1 else f"{len(names)} tensors are"
        warnings.warn(f"{path}: {tensors} not of the model and left out: {shown}", stacklevel=4)


def _is_buffer(name: str, info: TensorInfo) -> bool:
    """Whether a tensor is a table or a mask that the forward pass makes itself."""
    mask = len(info.shape) == 4 or info.shape in ((), (1,))
    return _matches(name, ROTARY_BUFFERS) or (mask and _matches(name, MASK_BUFFERS))


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
