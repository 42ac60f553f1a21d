"""A folder, quantized or not -> logits and text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from functools import lru_cache
from typing import TYPE_CHECKING, Any, overload

import numpy as np
from numpy.typing import NDArray

from .. import _C
from .._C import FormatError
from ..checkpoint.chat import render_chat
from ..checkpoint.tokenizer_errors import tokenizer_errors
from ..html import facts_html
from ..rows import token_ids
from .generate import generate
from .layers import build_layer
from .session import Session
from .windows import WindowModel

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from ..checkpoint.folder import Checkpoint


@lru_cache(maxsize=2)
def loaded(
    checkpoint: Checkpoint, kv_bits: int | None = None, kv_hadamard: bool = True,
    kv_dtype: str | None = None,
) -> Model:
    """`Model` of the same arguments; in one process, the same again."""
    return Model(checkpoint, kv_bits, kv_hadamard, kv_dtype)


class Model(WindowModel):
    """A decoder ready to run: packed int4 linears, or 16- and 32-bit ones through OpenBLAS.

    Made by `load`. The weights stay memory-mapped. Packed linears are copied to panels, and the
    pages of their files are given back. kv_bits: 32, 16, 8 or 4 bits for cached keys and values
    (default: the folder's; 32 if it is not quantized), which hidden_states keeps to as well.
    kv_hadamard: below 16 bits, queries and keys take a Hadamard after the rotary embedding.
    kv_dtype: the cache's 16-bit floats, "float16" or "bfloat16" (default: the folder's).
    ValueError for others. A RuntimeWarning, once, says when keys or values were beyond what the
    cache holds.
    """

    def __init__(
        self, checkpoint: Checkpoint, kv_bits: int | None = None, kv_hadamard: bool = True,
        kv_dtype: str | None = None,
    ) -> None:
        super().__init__(checkpoint, kv_bits, kv_hadamard, kv_dtype)
        self.outer.hold_head(checkpoint)
        self._layers = [build_layer(checkpoint, i) for i in range(self.spec.layers)]
        self._decoder = _C.Decoder(self._layers)

    def layer(self, index: int) -> _C.DecoderLayer:
        """A layer of those that the model keeps."""
        return self._layers[index]

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled as the folder that it is of: a worker loads that once."""
        return loaded, (self.checkpoint, self.kv_bits, self.kv_hadamard, self.kv_dtype)

    def __repr__(self) -> str:
        kind = "quantized" if self.checkpoint.quantized else "unquantized"
        return (
            f"Model({self.checkpoint.path.name!r}, {kind}, layers={self.spec.layers}, "
            f"hidden={self.spec.hidden}, vocab={self.spec.vocab}, kv_bits={self.kv_bits})"
        )

    def _repr_html_(self) -> str:
        facts = self.checkpoint.facts()
        return facts_html("Model", facts | {"KV cache": f"{self.kv_bits} bits"})

    @property
    def tokenizer(self) -> Tokenizer:
        """The folder's tokenizers.Tokenizer."""
        return self.checkpoint.tokenizer

    def encode(self, text: str, special: bool = True) -> NDArray[np.int64]:
        """Token ids [count] of a text; special adds the tokenizer's own special tokens (BOS)."""
        return self.checkpoint.encode(text, special)

    def decode_after(self, prompt: Sequence[int], new: Sequence[int], special: bool = False) -> str:
        """The text that new tokens add behind a prompt's, its first space included.

        special: with the texts of special tokens, which are left out otherwise.
        """
        decode = self.tokenizer.decode  # its own errors name the file
        with tokenizer_errors(self.checkpoint.path):
            before = decode(list(prompt), skip_special_tokens=not special)
            whole = decode([*prompt, *new], skip_special_tokens=not special)
        return whole[len(before) :]

    def new_session(
        self, sequences: int, capacity: int, limit: int = 0, sliding: bool = False
    ) -> Session:
        """A KV cache for so many sequences of at most `capacity` tokens, and their lengths.

        limit: bytes that its pages may take, 0 for any number. sliding: give back what windows
        have left, see `Session`.
        """
        return Session(self, sequences, capacity, limit, sliding)

    @overload
    def generate(  # type: ignore[overload-overlap]  # a str is a Sequence[str]
        self,
        prompts: str,
        max_new_tokens: int = ...,
        temperature: float = ...,
        top_k: int = ...,
        top_p: float = ...,
        seed: int = ...,
        stop_tokens: Sequence[int] | None = ...,
        on_token: Callable[[int, int], bool | None] | None = ...,
    ) -> str: ...

    @overload
    def generate(
        self,
        prompts: Sequence[int] | NDArray[np.integer[Any]],
        max_new_tokens: int = ...,
        temperature: float = ...,
        top_k: int = ...,
        top_p: float = ...,
        seed: int = ...,
        stop_tokens: Sequence[int] | None = ...,
        on_token: Callable[[int, int], bool | None] | None = ...,
    ) -> list[int]: ...

    @overload
    def generate(
        self,
        prompts: Sequence[str],
        max_new_tokens: int = ...,
        temperature: float = ...,
        top_k: int = ...,
        top_p: float = ...,
        seed: int = ...,
        stop_tokens: Sequence[int] | None = ...,
        on_token: Callable[[int, int], bool | None] | None = ...,
    ) -> list[str]: ...

    @overload
    def generate(
        self,
        prompts: Sequence[Sequence[int]] | Sequence[NDArray[np.integer[Any]]],
        max_new_tokens: int = ...,
        temperature: float = ...,
        top_k: int = ...,
        top_p: float = ...,
        seed: int = ...,
        stop_tokens: Sequence[int] | None = ...,
        on_token: Callable[[int, int], bool | None] | None = ...,
    ) -> list[list[int]]: ...

    def generate(
        self,
        prompts: str | Sequence[int] | Sequence[str] | Sequence[Sequence[int]] | NDArray[Any]
        | Sequence[NDArray[Any]],
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        stop_tokens: Sequence[int] | None = None,
        on_token: Callable[[int, int], bool | None] | None = None,
    ) -> str | list[int] | list[str] | list[list[int]]:
        """Continue one prompt or a batch; text in, text out, token ids in, token ids out.

        temperature 0 takes the most likely token; top_k 0 and top_p 1 are off. A sequence ends at a
        stop token (default: the folder's end-of-sequence ids) or after max_new_tokens. The same
        seed gives the same tokens; with packed linears and a head in 16 bits or less a sequence
        does not depend on its neighbours in the batch (unquantized linears go through BLAS, whose
        last bits follow the batch).
        on_token(sequence, token) is called as tokens appear; True ends the sequence, an exception
        cancels.
        ValueError when a prompt is empty or longer than the model's maximum.
        """
        if isinstance(prompts, (Mapping, Set)) or not hasattr(prompts, "__len__") or (
                isinstance(prompts, np.ndarray) and prompts.ndim == 0):
            raise ValueError(f"prompts: expected a text, token ids, or a list of either, found a "
                             f"{type(prompts).__name__}")
        single = isinstance(prompts, str) or (
            len(prompts) > 0 and isinstance(prompts[0], (int, np.integer))
        )
        batch = [prompts] if single else list(prompts)
        if not batch:
            raise ValueError("prompts: expected at least one prompt, got none")
        as_text = isinstance(batch[0], str)
        if any(isinstance(p, str) != as_text for p in batch):
            raise ValueError("prompts: expected texts alone or token ids alone, got both")
        stop = token_ids(self.stop_tokens if stop_tokens is None else stop_tokens, "stop_tokens")
        if stop.ndim != 1:
            raise ValueError(f"stop_tokens: expected a list of token ids, found "
                             f"{stop_tokens!r:.80}")
        tokens = [self.encode(p) if as_text else token_ids(p, f"prompt {i}")
                  for i, p in enumerate(batch)]
        new = generate(self, tokens, max_new_tokens, temperature, top_k, top_p, seed,
                       stop.tolist(), on_token)
        if as_text:
            new = [self.decode_after(p, ids) for p, ids in zip(tokens, new, strict=True)]
        return new[0] if single else new

    @property
    def stop_tokens(self) -> list[int]:
        """End-of-sequence ids of generation_config.json, or else of config.json."""
        for config in (self.checkpoint.generation_config, self.checkpoint.config):
            found = config.get("eos_token_id")
            if found is not None:
                ids = found if isinstance(found, list) else [found]
                if not all(type(i) is int for i in ids):
                    raise FormatError(f"{self.checkpoint.path}: eos_token_id: expected token ids, "
                                      f"found {found!r}")
                return ids
        return []

    def chat_tokens(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> list[int]:
        """Token ids of a conversation under the folder's chat template, for `generate`.

        messages: [{"role": "user", "content": ...}, ...]. options: those of `render_chat`, such as
        tools, and variables of the template. The template writes the special tokens itself.
        ValueError without a template.
        """
        text = render_chat(self.checkpoint, messages, **options)
        return self.encode(text, special=False).tolist()
