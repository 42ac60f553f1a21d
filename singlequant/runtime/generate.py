# SPDX-License-Identifier: Apache-2.0
"""New tokens behind prompts: prefill and sampling."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from .. import _C
from .session import Session

if TYPE_CHECKING:
    from .model import Model

LARGEST, SMALLEST = float(np.finfo(np.float32).max), float(np.finfo(np.float32).tiny)
PREFILL_TOKENS = 2048  # prompt tokens per call


def generate(
    model: Model,
    prompts: Sequence[NDArray[np.int64]],
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int,
    stop_tokens: Sequence[int],
    on_token: Callable[[int, int], bool | None] | None = None,
) -> list[list[int]]:
    """New tokens of each prompt; see `Model.generate`."""
    check_sampling(max_new_tokens, temperature, top_k, top_p, seed)
    lengths = [len(p) for p in prompts]
    if min(lengths) == 0:
        raise ValueError(f"prompt {lengths.index(0)}: expected at least one token, got none")
    limit = model.spec.max_position_embeddings
    if max(lengths) >= limit:
        raise ValueError(f"prompt {int(np.argmax(lengths))}: expected fewer than {limit} tokens "
                         f"(max_position_embeddings), got {max(lengths)}")
    temperature, top_p = min(temperature, LARGEST), max(top_p, SMALLEST)  # as the core takes them
    top_k = min(top_k, model.spec.vocab)
    session = model.new_session(len(prompts), min(limit, max(lengths) + max_new_tokens),
                                sliding=True)
    # one stream of random numbers per sequence, so that the batch's make-up changes nothing
    streams = [np.random.default_rng((seed, i)) for i in range(len(prompts))]
    out: list[list[int]] = [[] for _ in prompts]
    stop = set(stop_tokens)
    last = _prefill(session, prompts)
    alive = list(range(len(prompts)))
    for step in range(max_new_tokens):
        logits = model.logits(last)
        remaining, fed = [], []
        for row, index in enumerate(alive):
            try:
                token = _C.sample(logits[row], temperature, top_k, top_p, streams[index].random())
            except ValueError:  # the arguments are right
                raise ValueError(f"{model.checkpoint.path.name}: expected finite logits, found NaN "
                                 f"or Inf") from None
            if token in stop:
                continue
            out[index].append(token)
            if on_token and on_token(index, token):
                continue
            if session.lengths[index] < session.capacity:
                remaining.append(index)
                fed.append(np.array([token], np.int64))
        for index in set(alive) - set(remaining):
            session.end(index)
        alive = remaining
        if not alive or step + 1 == max_new_tokens:
            break
        last = session.append(fed, alive)
    return out


def _prefill(session: Session, prompts: Sequence[NDArray[np.int64]]) -> NDArray[np.float32]:
    """Feed prompts, many or pieces of one to a call; each one's last hidden state [m, hidden]."""
    last = np.empty((len(prompts), session.model.spec.width), np.float32)
    for call in _prefill_calls([len(p) for p in prompts]):
        hidden = session.append([prompts[i][begin:end] for i, begin, end in call],
                                [i for i, _, _ in call])
        ends = np.cumsum([end - begin for _, begin, end in call])
        last[[i for i, _, _ in call]] = hidden[ends - 1]  # a later piece of i comes later
    return last


def _prefill_calls(lengths: Sequence[int]) -> Iterator[list[tuple[int, int, int]]]:
    """Lists of (sequence, begin, end) of PREFILL_TOKENS tokens in all, the last one of fewer."""
    call: list[tuple[int, int, int]] = []
    room = PREFILL_TOKENS
    for index, length in enumerate(lengths):
        begin = 0
        while begin < length:
            end = min(length, begin + room)
            call.append((index, begin, end))
            room -= end - begin
            begin = end
            if room == 0:
                yield call
                call, room = [], PREFILL_TOKENS
    if call:
        yield call


def check_sampling(
    max_new_tokens: int, temperature: float, top_k: int, top_p: float, seed: int
) -> None:
    """ValueError that names the argument, the expected and the found."""
    for name, value in (("max_new_tokens", max_new_tokens), ("seed", seed), ("top_k", top_k)):
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            raise ValueError(f"{name}: expected an integer, got {value!r:.80}")
    for name, value in (("temperature", temperature), ("top_p", top_p)):
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise ValueError(f"{name}: expected a number, got {value!r:.80}")
    checks = (
        ("max_new_tokens", max_new_tokens, max_new_tokens >= 1, "at least 1"),
        ("seed", seed, seed >= 0, "at least 0"),
        ("temperature", temperature, 0 <= temperature < math.inf, "a finite number of at least 0"),
        ("top_k", top_k, top_k >= 0, "at least 0"),
        ("top_p", top_p, 0 < top_p <= 1, "in (0, 1]"),
    )
    for name, value, good, expected in checks:
        if not good:
            raise ValueError(f"{name}: expected {expected}, got {value!s:.80}")
