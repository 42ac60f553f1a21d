# SPDX-License-Identifier: Apache-2.0
"""The text that new tokens add behind a prompt, as they come."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..checkpoint.tokenizer_errors import tokenizer_errors

if TYPE_CHECKING:
    from .model import Model

CONTEXT = 16  # tokens decoded again with new ones: spaces depend on what stands before
BYTE_TOKEN = re.compile("<0x[0-9A-Fa-f]{2}>")


class TextStream:
    """Tokens behind a prompt, one by one -> the text that each completes.

    '' inside a character, whose last bytes are U+FFFD until the others follow. `finish` gives what
    still waits when no token follows. Together that is `Model.decode_after` of all tokens.

    A token costs the decoding of at most 2 * CONTEXT tokens. This is why so many are enough. A
    decoder strips spaces of its first token only. Of text from bytes that begins inside a
    character, at most three bytes are decoded in another way: a character has four at most. So
    the window's text ends as the whole text does, and the characters that wait are counted from
    the end. Tokens of single bytes, as SentencePiece has, are an exception: all bytes in a row are
    decoded together, and one bad byte spoils them all. Their text waits for the token behind them.
    """

    def __init__(self, model: Model, prompt: Sequence[int]) -> None:
        self._tokenizer, self._folder = model.tokenizer, model.checkpoint.path
        added = self._tokenizer.get_added_tokens_decoder()
        self._special = {token for token, described in added.items() if described.special}
        decoder = self._tokenizer.decoder
        with tokenizer_errors(self._folder):
            self._has_byte_tokens = decoder is not None and decoder.decode(["<0x41>"]) == "A"
        self._window: list[int] = []
        for token in reversed(prompt):
            if self._is_shown(token):
                self._window.append(int(token))
                if len(self._window) >= CONTEXT and not self._is_byte(token):
                    break
        self._window.reverse()
        self._shown = len(self._text())  # characters of the window's text

    def __call__(self, token: int) -> str:
        if not self._is_shown(token):
            return ""
        self._window.append(int(token))
        if self._is_byte(token):
            return ""
        text = self._text()
        new = self._show(text, len(text) - text.endswith("\ufffd"))
        if len(self._window) >= 2 * CONTEXT:
            del self._window[:-CONTEXT]
            self._shown += len(self._text()) - len(text)
        return new

    def finish(self) -> str:
        """The rest of the text, unfinished characters as U+FFFD."""
        text = self._text()
        return self._show(text, len(text))

    def _show(self, text: str, end: int) -> str:
        new, self._shown = text[self._shown : end], max(self._shown, end)
        return new

    def _text(self) -> str:
        with tokenizer_errors(self._folder):
            return self._tokenizer.decode(self._window)

    def _is_shown(self, token: int) -> bool:
        """Whether decoding does not leave the token out."""
        return token not in self._special and self._tokenizer.id_to_token(int(token)) is not None

    def _is_byte(self, token: int) -> bool:
        """Whether the text of the token depends on the bytes beside it."""
        return self._has_byte_tokens and bool(
            BYTE_TOKEN.fullmatch(self._tokenizer.id_to_token(int(token))))


def stream_text(model: Model, prompt: Sequence[int]) -> TextStream:
    """A function from the next token behind a prompt to the text it completes."""
    return TextStream(model, prompt)
