# SPDX-License-Identifier: Apache-2.0
"""JSON objects with typed access: every error names the file, the key, the expected, the found."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any

from .._C import FormatError

# Keys of config.json that change no result of a forward pass: what training, generation and
# transformers' own bookkeeping write. A key beside these that no row reads is refused if it is on.
HARMLESS = (
    "_*", "unsloth*", "transformers*", "*_token_id", "*_token_ids", "*dropout*", "*pdrop",
    "*_init*", "initializer*", "architectures", "auto_map", "model_type", "torch_dtype", "dtype",
    "use_cache", "tokenizer_*", "pretraining_tp", "is_llama_config", "return_dict*",
    "output_*", "torchscript", "use_bfloat16", "tf_legacy_loss", "pruned_heads",
    "chunk_size_feed_forward", "is_decoder", "id2label", "label2id", "num_labels", "problem_type",
    "finetuning_task", "task_specific_params", "prefix", "max_length", "min_length", "do_sample",
    "early_stopping", "num_beam*", "diversity_penalty", "temperature", "top_k", "top_p",
    "typical_p", "repetition_penalty", "length_penalty", "*no_repeat_ngram_size", "bad_words_ids",
    "num_return_sequences", "remove_invalid_values", "exponential_decay_length_penalty",
    "*suppress_tokens", "attn_implementation", "name_or_path", "cache_implementation",
    "model_max_length", "quantization_config", "router_aux_loss_coef", "z_loss*",
    "max_sequence_length",
)  # fmt: skip


class Fields:
    """One JSON object; it remembers which keys were asked for."""

    def __init__(
        self,
        values: Mapping[str, Any],
        source: str,
        prefix: str = "",
        names: Mapping[str, str] | None = None,
        defaults: Mapping[str, Any] | None = None,
    ) -> None:
        """source: the file. prefix: where the object stands in it, such as "model.". names: keys
        that this object spells in another way. defaults: values of keys that are missing."""
        self._given, self._source, self._prefix = values, source, prefix
        self._values = {**(defaults or {}), **values}
        self._names = names or {}
        self._read: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        """The value, or None."""
        key = self._names.get(key, key)
        self._read.add(key)
        return self._values.get(key)

    def __contains__(self, key: str) -> bool:
        """Whether the key is there with a value other than null."""
        return not self.absent(key)

    def absent(self, key: str) -> bool:
        """Whether the key is missing or null."""
        return self[key] is None

    def entries(self) -> list[str]:
        """All keys."""
        return list(self._values)

    def ignore(self, *keys: str) -> None:
        """Mark keys as read."""
        self._read.update(keys)

    def error(self, key: str, expected: str, found: Any = None) -> FormatError:
        """The error about a key; found: its value unless another is given."""
        key = self._names.get(key, key)
        found = self._values.get(key) if found is None else found
        return FormatError(f"{self._source}: {self._prefix}{key}: expected {expected}, "
                           f"found {found!r:.200}")

    def integer(self, key: str, least: int = 1, value: Any = None) -> int:
        """An integer from least to 2^31 - 1; value: instead of the key's own."""
        value = self[key] if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**31:
            raise self.error(key, f"an integer from {least} to 2147483647", value)
        return value

    def integer_or(self, key: str, default: int, least: int = 1) -> int:
        """An integer from least to 2^31 - 1; default where the key is off: null, false or 0."""
        return self.integer(key, least) if self[key] else default

    def integers_or(self, key: str, default: list[int], least: int = 1) -> list[int]:
        """A list of integers from least to 2^31 - 1; default where the key is off or empty."""
        return self.integers(key, least) if self[key] else default

    def object_or_none(self, key: str) -> Fields | None:
        """An object under the key; None where the key is off or empty."""
        return self.object(key) if self[key] else None

    def number(self, key: str, value: Any = None) -> float:
        """A number from 1e-30 to 1e30; value: instead of the key's own."""
        value = self[key] if value is None else value
        if not _is_number(value) or not 1e-30 <= value <= 1e30:  # also false for nan
            raise self.error(key, "a number from 1e-30 to 1e30", value)
        return float(value)

    def finite(self, key: str) -> float:
        """A number within +-1e30."""
        value = self[key]
        if not _is_number(value) or not -1e30 <= value <= 1e30:
            raise self.error(key, "a number from -1e30 to 1e30", value)
        return float(value)

    def boolean(self, key: str) -> bool:
        """true or false."""
        value = self[key]
        if not isinstance(value, bool):
            raise self.error(key, "true or false", value)
        return value

    def string(self, key: str) -> str:
        """A text that is not empty."""
        value = self[key]
        if not isinstance(value, str) or not value:
            raise self.error(key, "a text", value)
        return value

    def choice(self, key: str, allowed: Sequence[str]) -> str:
        """One of the allowed texts."""
        value = self[key]
        if not isinstance(value, str) or value not in allowed:
            raise self.error(key, f"one of {', '.join(allowed)}", value)
        return value

    def object(self, key: str) -> Fields:
        """An object under the key."""
        value = self[key]
        if not isinstance(value, dict):
            raise self.error(key, "an object", value)
        return self.under(key, value)

    def under(self, key: str, values: Mapping[str, Any]) -> Fields:
        """These values as the object under the key."""
        return Fields(values, self._source, f"{self._prefix}{key}.")

    def objects(self, key: str) -> list[Fields]:
        """A list of at least one object."""
        value = self._list(key)
        if not value or not all(isinstance(entry, dict) for entry in value):
            raise self.error(key, "a list of objects", value)
        return [Fields(entry, self._source, f"{self._prefix}{key}.{i}.")
                for i, entry in enumerate(value)]

    def integers(self, key: str, least: int = 1) -> list[int]:
        """A list of integers from least to 2^31 - 1."""
        return [self.integer(key, least, -1 if value is None else value)
                for value in self._list(key)]

    def finites(self, key: str) -> list[float]:
        """A list of numbers within +-1e30."""
        values = self._list(key)
        if not all(_is_number(value) and -1e30 <= value <= 1e30 for value in values):
            raise self.error(key, "numbers from -1e30 to 1e30", values)
        return [float(value) for value in values]

    def _list(self, key: str) -> list[Any]:
        value = self[key]
        if not isinstance(value, list):
            raise self.error(key, "a list", value)
        return value

    def require_no_others(self, ignored: Sequence[str] | None = None) -> None:
        """FormatError for a key that nobody asked for.

        ignored: patterns of keys that change nothing. With them a key that is off (null, false, 0,
        empty) passes as well.
        """
        for key, value in self._given.items():
            if key in self._read:
                continue
            if ignored is None or (value and not _matches(key, ignored)):
                raise self.error(key, "no such key, as nothing reads it (remove it if it changes "
                                      "no result)", value)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _matches(key: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(key, pattern) for pattern in patterns)
