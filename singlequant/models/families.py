# SPDX-License-Identifier: Apache-2.0
"""All rows by name, and which of them a config.json means."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from typing import Any

from .._C import FormatError
from . import gemma, gpt, llama, mixture
from .family import Family

MODULES = (llama, gemma, gpt, mixture)
FAMILIES = {row.name: row for module in MODULES for row in vars(module).values()
            if isinstance(row, Family)}
GUIDE = "docs/adding-a-family.md"
# Of a wrapper's config.json: keys that hold for its text model where text_config is silent.
OUTER_KEYS = ("dtype", "torch_dtype", "quantization_config", "tie_word_embeddings", "bos_token_id",
              "eos_token_id", "pad_token_id")
# Sizes that a text_config leaves out where they are those of its config class in transformers.
SEVEN_BILLION = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}
SIZES = {
    "LlamaForCausalLM": {**SEVEN_BILLION, "intermediate_size": 11008, "vocab_size": 32000},
    "MistralForCausalLM": {**SEVEN_BILLION, "intermediate_size": 14336, "vocab_size": 32000},
    "Gemma3ForCausalLM": {"hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
                          "num_attention_heads": 8, "vocab_size": 262208},
}  # fmt: skip


def find_family(config: Mapping[str, Any], source: str = "config.json") -> Family:
    """The row that config.json's `architectures` names.

    Where `architectures` is missing, or names the family's model without a head, `model_type`
    decides. FormatError lists the supported ones and names the nearest.
    """
    name = _architecture(config)
    row = FAMILIES.get(name) if isinstance(name, str) else None
    row = row or next((other for other in FAMILIES.values() if name in other.aliases), None)
    typed = family_of_type(config.get("model_type"))
    if row is None and typed is not None and (name is None or name in _headless(typed)):
        row = typed
    if row is None:
        raise FormatError(_unknown(config, name, source))
    return row


def family_of_type(model_type: Any) -> Family | None:
    """The row of a `model_type` such as gpt_neox or gemma3_text, as transformers spells them."""
    if not isinstance(model_type, str):
        return None
    wanted = model_type.replace("_", "").removesuffix("text")
    return next((row for row in FAMILIES.values() if _stem(row).lower() == wanted), None)


def language_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The text model's config.json: `text_config` of a wrapper that its family's row lists.

    Any other config.json is returned as it is. SIZES fills in what text_config leaves out.
    """
    text = config.get("text_config")
    row = family_of_type(text.get("model_type")) if isinstance(text, dict) else None
    if row is None or _architecture(config) not in row.wrappers:
        return config
    outer = {key: config[key] for key in OUTER_KEYS if key in config}
    merged = SIZES.get(row.name, {}) | outer | text
    if config.get("tie_word_embeddings") is True:  # old folders say it outside, new ones inside
        merged["tie_word_embeddings"] = True
    return merged | {"architectures": [row.name]}


def _architecture(config: Mapping[str, Any]) -> Any:
    """The one entry of `architectures`; None if there is none."""
    names = config.get("architectures")
    return (names[0] if len(names) == 1 else names or None) if isinstance(names, list) else names


def _stem(row: Family) -> str:
    """'GPTNeoX' of GPTNeoXForCausalLM, 'GPT2' of GPT2LMHeadModel."""
    return re.sub("(ForCausalLM|LMHeadModel)$", "", row.name)


def _headless(row: Family) -> tuple[str, ...]:
    """Names of the classes that hold a family's model without its head."""
    return f"{_stem(row)}Model", f"{_stem(row)}TextModel"


def _unknown(config: Mapping[str, Any], name: Any, source: str) -> str:
    """The text of the error about a config.json that no row explains."""
    text, wanted = config.get("text_config"), name if isinstance(name, str) else ""
    wrapped = f" around the text model {text.get('model_type')!r:.80}" if isinstance(
        text, dict) else ""
    wanted = wanted or f"{config.get('model_type') or ''}".replace("_", "")
    by_lower = {row.lower(): row for row in FAMILIES}
    nearest = difflib.get_close_matches(wanted.lower(), by_lower, 1, 0.0) if wanted else []
    hint = f"; the nearest is {by_lower[nearest[0]]}" if nearest else ""
    return (f"{source}: architectures: expected one of {', '.join(FAMILIES)}, found "
            f"{name!r:.200}{wrapped}{hint}; {GUIDE} tells how a family is added")
