# SPDX-License-Identifier: Apache-2.0
"""Special tokens of a folder, as transformers finds them beside tokenizer.json."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from .._C import FormatError
from ..files import MAX_TOKENIZER_BYTES, is_present, read_json, require_size
from .tokenizer_errors import tokenizer_errors

__all__ = ["SpecialTokens", "add_tokens", "has_tokenizer", "special_tokens"]

STANDARD = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token",
            "mask_token")
DECODER = "added_tokens_decoder"
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_END_OF_TEXT = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
_LLAMA = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
CLASS_TOKENS = {  # what a tokenizer_class has where the files name nothing
    "LlamaTokenizer": _LLAMA,
    "CodeLlamaTokenizer": _LLAMA,
    "GPT2Tokenizer": _END_OF_TEXT,
    "GPTNeoXTokenizer": {**_END_OF_TEXT, "pad_token": "<|padding|>"},
    "Qwen2Tokenizer": dict.fromkeys(("eos_token", "unk_token", "pad_token"), "<|endoftext|>"),
    "GemmaTokenizer": {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>",
                       "pad_token": "<pad>", "mask_token": "<mask>"},
    "CohereTokenizer": {"bos_token": "<BOS_TOKEN>", "eos_token": "<|END_OF_TURN_TOKEN|>",
                        "unk_token": "<UNK>", "pad_token": "<PAD>", "cls_token": "<CLS>",
                        "sep_token": "<SEP>", "mask_token": "<MASK_TOKEN>"},
}


def has_tokenizer(path: Path) -> bool:
    """Whether tokenizer.json is there. FormatError if it is larger than any tokenizer's is."""
    present = is_present(path)
    if present:
        require_size(path, MAX_TOKENIZER_BYTES, "a tokenizer")
    return present


@dataclass(frozen=True)
class SpecialTokens:
    """named: bos_token and the like, image_token and the like. tokens: all that are special."""

    named: dict[str, str]
    tokens: tuple[AddedToken, ...]


def special_tokens(checkpoint, tokenizer: Tokenizer | None = None) -> SpecialTokens:
    """The folder's special tokens: tokenizer_config.json, under special_tokens_map.json.

    The latter counts only where the former has no added_tokens_decoder. What neither names may
    come with the tokenizer_class. tokenizer: default, the folder's. FormatError names a token that
    is neither a text nor a description of one.
    """
    config, source = checkpoint.tokenizer_config, checkpoint.path / "tokenizer_config.json"
    values, extra = _collect(config, source)
    file = checkpoint.path / "special_tokens_map.json"
    if DECODER not in config and is_present(file):
        over, more = _collect(read_json(file), file)
        values, extra = {**values, **over}, more or extra
    own = CLASS_TOKENS.get(str(config.get("tokenizer_class")).removesuffix("Fast"), {})
    for name in own.keys() - values.keys():
        tokenizer = checkpoint.tokenizer if tokenizer is None else tokenizer
        if tokenizer.token_to_id(own[name]) is not None:
            values[name] = _token(own[name], source)
    named = {name: token for name, token in values.items() if token is not None}
    tokens = (*named.values(), *extra)
    return SpecialTokens({name: token.content for name, token in named.items()}, tokens)


def add_tokens(tokenizer: Tokenizer, checkpoint) -> None:
    """Makes a tokenizer take special and added tokens whole that tokenizer.json does not list.

    They are in tokenizer_config.json's added_tokens_decoder, or in added_tokens.json, or they are
    special tokens. FormatError names a token that is none.
    """
    config, special = checkpoint.tokenizer_config, special_tokens(checkpoint, tokenizer)
    names = {token.content for token in special.tokens}
    source, file = checkpoint.path / "tokenizer_config.json", checkpoint.path / "added_tokens.json"
    added = []
    if DECODER in config:
        added = [_token(value, f"{source}: {DECODER}: {i}", False)
                 for i, value in _by_id(config[DECODER], f"{source}: {DECODER}")]
    elif is_present(file):
        pairs = [(number, text) for text, number in read_json(file).items()]
        added = [AddedToken(text, special=text in names, normalized=text not in names)
                 for _, text in _by_id(dict(pairs), str(file))]
    for token in added:
        token.special = token.special or token.content in names
    with tokenizer_errors(checkpoint.path):
        tokenizer.add_tokens(added)
        known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
        tokenizer.add_tokens([token for token in special.tokens if token.content not in known])
    tokenizer.encode_special_tokens = bool(config.get("split_special_tokens"))


def _by_id(values: Any, place: str) -> list[tuple[Any, Any]]:
    """Pairs (id, value) in the order of ids."""
    try:
        return sorted(values.items(), key=lambda pair: int(pair[0]))
    except (AttributeError, TypeError, ValueError):
        raise FormatError(f"{place}: expected ids of tokens, found {values!r:.80}") from None


def _collect(values: dict[str, Any], source: Any) -> tuple[dict[str, Any], list[AddedToken]]:
    """({name: token or None}, tokens without a name) of a file's values."""
    found = {n: _token(values[n], f"{source}: {n}") for n in STANDARD if n in values}
    found |= {n: _token(v, f"{source}: {n}") for n, v in values.items()
              if n.endswith("_token") and n not in STANDARD and isinstance(v, (str, dict))}
    extra = []
    for key in ("model_specific_special_tokens", "extra_special_tokens"):
        value = values.get(key)
        if isinstance(value, dict):  # names of the folder's own
            found |= {n: _token(v, f"{source}: {key}: {n}") for n, v in value.items()}
    listed = values.get("extra_special_tokens") or values.get("additional_special_tokens")
    if isinstance(listed, list):
        extra = [_token(v, f"{source}: extra_special_tokens") for v in listed]
    return found, [token for token in extra if token is not None]


def _token(value: Any, place: Any, special: bool = True) -> AddedToken | None:
    """A token of a JSON value: its text, or a description with its text."""
    if value is None:
        return None
    values = {"content": value} if isinstance(value, str) else value
    if not isinstance(values, dict) or not isinstance(values.get("content"), str):
        raise FormatError(f"{place}: expected the text of a token, found {value!r:.80}")
    flags = {flag: bool(values[flag]) for flag in FLAGS if values.get(flag) is not None}
    return AddedToken(values["content"], **(flags | {"special": True} if special else flags))
