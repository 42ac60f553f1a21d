# SPDX-License-Identifier: Apache-2.0
"""Log-likelihoods of continuations, equal contexts run once. Needs no lm_eval."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import _C
from ..runtime.model import Model

TOKENS_PER_STEP = 1024  # KV slots of a batch: all layers' keys and values live at once
HEAD_ROWS = 256  # rows of logits alive at once

# A context, and each distinct continuation of it with the requests that asked for it.
Group = tuple[tuple[int, ...], dict[tuple[int, ...], list[int]]]


def score_continuations(
    model: Model, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], max_length: int
) -> Iterator[tuple[int, float, bool]]:
    """Yield (index of the pair, log-likelihood in nats, greedy) for (context, continuation) tokens.

    greedy: every token of the continuation is the most likely one. A pair of more than
    max_length + 1 tokens loses the first ones of its context. Equal contexts are run once; the
    longest pairs come first. The order of the pairs does not change a bit of a score, which other
    pairs there are only its rounding (OpenBLAS's in the 16-bit layers). ValueError for an empty
    context or continuation, for a continuation beyond max_length and for NaN or Inf.
    """
    groups: dict[tuple[int, ...], dict[tuple[int, ...], list[int]]] = {}
    for index, (context, continuation) in enumerate(pairs):
        if not len(context) or not 1 <= len(continuation) <= max_length:
            raise ValueError(f"pair {index}: expected a context of at least one token and a "
                             f"continuation of 1 to {max_length}, got {len(context)} and "
                             f"{len(continuation)}")
        kept = tuple(context)[-(max_length + 1 - len(continuation)) :]
        groups.setdefault(kept, {}).setdefault(tuple(continuation), []).append(index)
    ordered = ((context, dict(sorted(continuations.items(), key=lambda c: (-len(c[0]), c[0]))))
               for context, continuations in groups.items())
    for batch in _batches(ordered):
        for (_, continuations), scores in zip(batch, _score_batch(model, batch), strict=True):
            for indices, score in zip(continuations.values(), scores, strict=True):
                for index in indices:
                    yield index, *score


def _slots(group: Group) -> int:
    """KV slots of a group: the last token of a continuation is never fed."""
    return len(group[0]) + max(len(c) for c in group[1]) - 1


def _batches(groups: Iterable[Group]) -> Iterator[list[Group]]:
    """Groups, longest first, in batches of TOKENS_PER_STEP slots or of one group."""
    batch: list[Group] = []
    for group in sorted(groups, key=lambda g: (-_slots(g), g[0])):
        if batch and (len(batch) + 1) * _slots(batch[0]) > TOKENS_PER_STEP:
            yield batch
            batch = []
        batch.append(group)
    if batch:
        yield batch


def _score_batch(model: Model, batch: Sequence[Group]) -> list[list[tuple[float, bool]]]:
    """(log-likelihood, greedy) of each group's continuations, in order.

    The first continuation is fed together with its context. For each other one the sequence is
    taken back to the end of the context: the keys and values there are the same for all.
    """
    contexts = np.array([len(context) for context, _ in batch])
    continuations = [list(group[1]) for group in batch]
    session = model.new_session(len(batch), _slots(batch[0]))
    scores: list[list[tuple[float, bool]]] = [[] for _ in batch]
    first = [np.array(c + k[0][:-1], np.int64)
             for (c, _), k in zip(batch, continuations, strict=True)]
    hidden = np.split(session.append(first), np.cumsum([len(f) for f in first])[:-1])
    rows = [h[n - 1 :] for h, n in zip(hidden, contexts, strict=True)]
    last = [r[:1] for r in rows]
    for turn in range(max(len(k) for k in continuations)):
        chosen = [i for i, k in enumerate(continuations) if turn < len(k)]
        if turn > 0:
            rows = _branch(session, contexts, last,
                           {i: continuations[i][turn][:-1] for i in chosen})
        targets = [continuations[i][turn] for i in chosen]
        for i, score in zip(chosen, _score_rows(model, rows, targets), strict=True):
            scores[i].append(score)
    return scores


def _branch(
    session: Any,
    contexts: NDArray[np.int64],
    last: Sequence[NDArray[np.float32]],
    tokens: dict[int, tuple[int, ...]],
) -> list[NDArray[np.float32]]:
    """Hidden states [1 + len(tokens), hidden] from the last of the context on, per sequence."""
    fed = [i for i, t in tokens.items() if t]
    rows = {i: last[i] for i in tokens}
    if fed:
        session.lengths[fed] = contexts[fed]
        hidden = session.append([np.array(tokens[i], np.int64) for i in fed], fed)
        parts = np.split(hidden, np.cumsum([len(tokens[i]) for i in fed])[:-1])
        rows |= {i: np.concatenate([last[i], part]) for i, part in zip(fed, parts, strict=True)}
    return list(rows.values())


def _score_rows(
    model: Model, rows: Sequence[NDArray[np.float32]], targets: Sequence[tuple[int, ...]]
) -> list[tuple[float, bool]]:
    """(sum of log-likelihoods, all greedy) per sequence; rows[i] [len(targets[i]), hidden]."""
    hidden, target = np.concatenate(rows), np.concatenate(targets).astype(np.int64)
    nll, agree = np.empty(len(target)), np.empty(len(target), bool)
    for first in range(0, len(target), HEAD_ROWS):
        block = slice(first, first + HEAD_ROWS)
        logits = model.logits(hidden[block])
        nll[block] = _C.negative_log_likelihood(logits, target[block])
        agree[block] = logits.argmax(axis=1) == target[block]
    if not np.isfinite(nll).all():
        raise ValueError("model: expected finite logits, found NaN or Inf")
    ends = np.cumsum([len(t) for t in targets])
    return [(-float(nll[end - len(t) : end].sum()), bool(agree[end - len(t) : end].all()))
            for end, t in zip(ends, targets, strict=True)]
