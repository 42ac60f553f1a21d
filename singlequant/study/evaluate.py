"""Perplexity of a model, and its divergence from a reference model."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from .. import _C
from ..distributed import Call, Workers
from ..files import json_values, not_finite
from ..html import facts_html
from ..rows import token_ids
from ..runtime.model import Model

TOKENS_PER_STEP = 2048  # windows are grouped into calls of about this many tokens
HEAD_ROWS = 256  # rows of logits alive at once
BEYOND = "infinite: the mean negative log-likelihood is above 709 nats"


class LogitsError(ValueError):
    """A model's logits are NaN or Inf, so that it has no perplexity."""


class Scorer(Protocol):
    """The two methods that a model must have to be evaluated."""

    def hidden_states(self, windows: NDArray[np.int64]) -> NDArray[np.float32]: ...
    def logits(self, hidden: NDArray[np.float32]) -> NDArray[np.float32]: ...


class CachedScorer:
    """A reference model that computes the hidden states of each set of windows only once.

    It is for a reference with which many models are compared on the same windows. It keeps the
    final hidden states in float32, tokens * hidden * 4 bytes. It keeps no logits: it computes
    those anew, block by block.
    """

    def __init__(self, model: Scorer) -> None:
        self.model = model
        self._states: dict[bytes, NDArray[np.float32]] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled without the states: a worker keeps those of the windows that it has."""
        return cached_scorer, (self.model,)

    def hidden_states(self, windows: NDArray[np.int64]) -> NDArray[np.float32]:
        """The model's hidden states [count, length, hidden]; not to be written to."""
        windows = np.ascontiguousarray(windows, np.int64)
        key = hashlib.sha256(f"{windows.shape}".encode() + windows.tobytes()).digest()
        if key not in self._states:
            states = self.model.hidden_states(windows)
            states.flags.writeable = False
            self._states[key] = states
        return self._states[key]

    def logits(self, hidden: NDArray[np.float32]) -> NDArray[np.float32]:
        """The model's logits [..., vocab] of hidden states [..., hidden]."""
        return self.model.logits(hidden)


@lru_cache(maxsize=1)
def cached_scorer(model: Scorer) -> CachedScorer:
    """`CachedScorer` of a model; in one process, the same again."""
    return CachedScorer(model)


@dataclass(frozen=True)
class Evaluation:
    """Result of one evaluation. Without a reference model, the last four fields are None.

    perplexity is exp of the mean negative log-likelihood (nats) over `predictions` predictions. It
    is infinite where exp is too large for a float64.
    tokens is the number of tokens in all windows of seq_len tokens. seconds is the wall time.
    kl_mean and kl_p99 are the mean and the 99th percentile of the Kullback-Leibler divergence from
    the reference to the model, in nats per token. top1_agreement is the share of predictions at
    which both models have the same most likely token.
    """

    perplexity: float
    tokens: int
    predictions: int
    seq_len: int
    seconds: float
    kl_mean: float | None = None
    kl_p99: float | None = None
    top1_agreement: float | None = None
    reference_perplexity: float | None = None

    def to_json(self) -> dict[str, float | int | str | None]:
        """The fields that are not None, as JSON values.

        A number that is not finite is null, and NAME_reason beside it says why.
        """
        known = {k: v for k, v in asdict(self).items() if v is not None}
        found: dict[str, Any] = json_values(known)
        return found | {key: BEYOND for key in found if key.endswith("perplexity_reason")}

    def __repr__(self) -> str:
        text = f"Evaluation(perplexity={self.perplexity:.4f}, predictions={self.predictions}"
        if self.kl_mean is not None:
            text += f", kl_mean={self.kl_mean:.5f}, top1_agreement={self.top1_agreement:.3f}"
        return text + ")"

    def _repr_html_(self) -> str:
        facts: dict[str, object] = {"perplexity": perplexity_text(self.perplexity, ".3f")}
        if self.kl_mean is not None and self.reference_perplexity is not None:
            facts["perplexity of the reference"] = perplexity_text(self.reference_perplexity, ".3f")
            facts["KL to the reference"] = (
                f"{self.kl_mean:.5f} nats per token, 99th percentile {self.kl_p99:.4f}")
            facts["same most likely token"] = f"{self.top1_agreement:.1%}"
        facts["measured on"] = (f"{self.predictions} predictions, windows of {self.seq_len} "
                                f"tokens, {self.seconds:.1f} s")
        return facts_html("Evaluation", facts, bold=["perplexity", "KL to the reference"])


def default_seq_len(model: Model) -> int:
    """Tokens of an evaluation window where none are asked: the model's maximum, 2048 at most."""
    return min(2048, model.spec.max_position_embeddings)


def split_windows(tokens: NDArray[np.int64], seq_len: int) -> NDArray[np.int64]:
    """Cut tokens into windows [count, seq_len] without overlap, as GPTQ and QuaRot do.

    The tokens after the last whole window are left out. ValueError if there is no whole window, or
    if seq_len is below 2.
    """
    if seq_len < 2:
        raise ValueError(f"seq_len: expected at least 2, got {seq_len}")
    count = len(tokens) // seq_len
    if count == 0:
        raise ValueError(f"text: expected at least one window of {seq_len} tokens, "
                         f"got {len(tokens)} tokens")
    return token_ids(tokens[: count * seq_len], "tokens").reshape(count, seq_len)


def evaluate(
    model: Scorer,
    tokens: NDArray[np.int64],
    seq_len: int,
    reference: Scorer | None = None,
    progress: Callable[[int, int], None] | None = None,
    workers: Workers | None = None,
) -> Evaluation:
    """The perplexity of a model on all whole windows of tokens [count].

    seq_len: tokens of a window. reference: a model from which the divergences are measured.
    progress(done, total) is called after each group of windows, with numbers of windows. An
    exception in it ends the evaluation. workers: of `singlequant.distributed`, which run the
    groups; the figures are the same. LogitsError, a ValueError, if a model's logits are not finite.
    """
    start = time.perf_counter()
    windows = split_windows(tokens, seq_len)
    groups: dict[int, Scores] = {}

    def scored(first: int, scores: Scores) -> tuple[()]:
        groups[first] = scores
        if progress:
            progress(sum(len(windows[i : i + step]) for i in groups), len(windows))
        return ()

    step = group_step(seq_len)
    calls = [Call(score_windows, (model, reference, windows[first : first + step]), (first,),
                  partial(scored, first)) for first in range(0, len(windows), step)]
    if workers is None:
        for call in calls:
            call.then(call.function(*call.arguments))
    else:
        workers.run(calls)
    return evaluation_of([groups[first] for first in sorted(groups)], windows,
                         time.perf_counter() - start)


def group_step(seq_len: int) -> int:
    """Windows that a model runs at a time."""
    return max(1, TOKENS_PER_STEP // seq_len)


@dataclass(frozen=True)
class Scores:
    """What a group of windows gives, an entry per prediction; the last three with a reference."""

    nll: NDArray[np.float64]
    reference_nll: NDArray[np.float64] | None
    kl: NDArray[np.float64] | None
    same: NDArray[np.bool_] | None


def score_windows(
    model: Scorer, reference: Scorer | None, windows: NDArray[np.int64]
) -> Scores:
    """The scores of a group of windows [count, seq_len], which is run in one call."""
    nll, reference_nll, kl, same = [], [], [], []
    for target, logits, expected in _predictions(model, reference, windows):
        likelihood = _C.negative_log_likelihood(logits, target)
        nll.append(_finite(likelihood, "model", model, windows))
        if expected is not None:
            likelihood = _C.negative_log_likelihood(expected, target)
            reference_nll.append(_finite(likelihood, "reference", reference, windows))
            divergence, agree = _C.kl_divergence(expected, logits)
            kl.append(divergence)
            same.append(agree)
    others = (np.concatenate(x) if kl else None for x in (reference_nll, kl, same))
    return Scores(np.concatenate(nll), *others)


def evaluation_of(
    groups: Sequence[Scores], windows: NDArray[np.int64], seconds: float
) -> Evaluation:
    """The evaluation of all groups of some windows [count, seq_len], in their order."""
    nll = np.concatenate([group.nll for group in groups])
    result: dict[str, Any] = {"perplexity": _exp(nll.mean())}
    kl = [group.kl for group in groups if group.kl is not None]
    if kl:
        divergence = np.concatenate(kl)
        same, likelihood = (np.concatenate([getattr(group, name) for group in groups])
                            for name in ("same", "reference_nll"))
        result |= {
            "kl_mean": float(divergence.mean()),
            "kl_p99": float(np.quantile(divergence, 0.99)),
            "top1_agreement": float(same.mean()),
            "reference_perplexity": _exp(likelihood.mean()),
        }
    return Evaluation(tokens=int(windows.size), predictions=len(nll), seq_len=windows.shape[1],
                      seconds=seconds, **result)


def perplexity(
    model: Model,
    text: str | NDArray[np.int64],
    seq_len: int | None = None,
    reference: Model | None = None,
    progress: Callable[[int, int], None] | None = None,
    workers: Workers | None = None,
) -> Evaluation:
    """Perplexity on a text or on token ids, by the protocol of GPTQ and QuaRot.

    The text is tokenized once and cut into windows of seq_len tokens (default: the model's maximum,
    2048 at most) without overlap; see `evaluate`. reference: a model with the same vocabulary, for
    the divergences. ValueError when the text is shorter than a window.
    """
    tokens = model.encode(text) if isinstance(text, str) else token_ids(text, "text")
    seq_len = default_seq_len(model) if seq_len is None else seq_len
    if reference is not None and reference.spec.vocab != model.spec.vocab:
        raise ValueError(f"reference: expected a vocabulary of {model.spec.vocab}, "
                         f"got {reference.spec.vocab}")
    return evaluate(model, tokens, seq_len, reference, progress, workers)


def _finite(
    nll: NDArray[np.float64], who: str, model: Any, windows: NDArray[np.int64]
) -> NDArray[np.float64]:
    """nll itself; LogitsError when a model's logits made it NaN or Inf, with the first layer that
    has such activations where the model can tell."""
    if not np.isfinite(nll).all():
        tell = getattr(model, "first_not_finite", None)
        where = tell(windows) if tell else None
        first = f" (first in the activations of {where})" if where else ""
        raise LogitsError(f"{who}: expected finite logits, found NaN or Inf{first}")
    return nll


def _exp(mean: float) -> float:
    """exp(mean), infinite where a float64 has no such number."""
    with np.errstate(over="ignore"):
        return float(np.exp(mean))


def perplexity_text(value: float, form: str = ".4f") -> str:
    """A perplexity for people: the number, or why there is none."""
    return format(value, form) if not_finite(value) is None else BEYOND


def _predictions(
    model: Scorer, reference: Scorer | None, windows: NDArray[np.int64]
) -> Iterator[tuple[NDArray, NDArray, NDArray | None]]:
    """Blocks of (targets, logits, reference logits) over the predictions of some windows."""
    target = windows[:, 1:].reshape(-1)
    hidden = model.hidden_states(windows)[:, :-1].reshape(len(target), -1)
    expected = None
    if reference is not None:
        expected = reference.hidden_states(windows)[:, :-1].reshape(len(target), -1)
    for first in range(0, len(target), HEAD_ROWS):
        rows = slice(first, first + HEAD_ROWS)
        yield (
            target[rows],
            model.logits(hidden[rows]),
            None if expected is None else reference.logits(expected[rows]),
        )
