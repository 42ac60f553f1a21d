# SPDX-License-Identifier: Apache-2.0
"""A byte-level BPE of tokenizer.json in GGUF's metadata. Others are left out: llama.cpp then takes
and gives ids of tokens."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from .._C import FormatError
from ..files import MAX_TOKENIZER_BYTES, is_present, require_size

if TYPE_CHECKING:
    from ..checkpoint.folder import Checkpoint

# Texts are split before they are merged. llama.cpp has a name for each way (llama-vocab.cpp).
SPLITS = {
    ("bytes", True): "gpt-2",
    ("digits", "bytes", True): "smollm",
    (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
     r"|\s*[\r\n]+|\s+(?!\S)|\s+", "bytes", False): "llama-bpe",
    (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
     r"|\s*[\r\n]+|\s+(?!\S)|\s+", "bytes", False): "qwen2",
}  # fmt: skip


def add_tokenizer(package: Any, writer: Any, checkpoint: Checkpoint) -> None:
    """Write tokens, merges and the chat template, or that there are none."""
    vocab, found = checkpoint.spec.vocab, _read(checkpoint.path / "tokenizer.json")
    name = split_name(found)
    tokens = None if name is None else _tokens(package, found, vocab)
    if tokens is None:
        writer.add_tokenizer_model("none")
        return
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(name)
    writer.add_token_list(tokens[0])
    writer.add_token_types(tokens[1])
    logging.getLogger("gguf.vocab").setLevel(logging.ERROR)
    special = package.SpecialVocab(checkpoint.path, load_merges=True, n_vocab=vocab)
    written = {key for part in writer.kv_data for key in part}
    special.special_token_ids = {
        kind: number for kind, number in special.special_token_ids.items()
        if f"tokenizer.ggml.{'padding' if kind == 'pad' else kind}_token_id" not in written}
    special.add_to_gguf(writer, quiet=True)


def _read(path: Path) -> dict[str, Any]:
    """tokenizer.json, {} where there is none. FormatError for one that tokenizers cannot read."""
    if not is_present(path):
        return {}
    require_size(path, MAX_TOKENIZER_BYTES, "a tokenizer")
    try:
        text = path.read_text("utf-8")
        Tokenizer.from_str(text)
    except Exception as error:  # the library raises Exception itself
        raise FormatError(f"{path}: {error}") from None
    return json.loads(text)


def split_name(tokenizer: Any) -> str | None:
    """llama.cpp's name of how tokenizer.json splits a text; None where it has none."""
    model = tokenizer.get("model") or {}
    normalizer = (tokenizer.get("normalizer") or {}).get("type")  # llama.cpp has none
    if model.get("type") != "BPE" or model.get("byte_fallback") or normalizer not in (None, "NFC"):
        return None
    steps = tokenizer.get("pre_tokenizer") or {}
    steps = steps.get("pretokenizers", [steps])
    key: list[Any] = []
    for step in steps:
        kind = step.get("type")
        if kind == "ByteLevel" and not step.get("add_prefix_space"):
            key += ["bytes", step.get("use_regex", True)]
        elif kind == "Digits" and step.get("individual_digits"):
            key.append("digits")
        elif kind == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
            key.append((step.get("pattern") or {}).get("Regex"))
        else:
            return None
    return SPLITS.get(tuple(key))


def _tokens(package: Any, tokenizer: Any, vocab: int) -> tuple[list[str], list[Any]] | None:
    """Tokens by id and their types; ids that nothing has are filled. None where ids are beyond."""
    types = package.TokenType
    tokens, kinds = [f"[PAD{i}]" for i in range(vocab)], [types.UNUSED] * vocab
    entries = [(token, number, types.NORMAL) for token, number in tokenizer["model"]["vocab"]
               .items()]
    entries += [(token["content"], token["id"], types.CONTROL if token.get("special")
                 else types.USER_DEFINED) for token in tokenizer.get("added_tokens") or ()]
    for token, number, kind in entries:
        if not 0 <= number < vocab:
            return None
        tokens[number], kinds[number] = token, kind
    return tokens, kinds
