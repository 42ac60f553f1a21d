# SPDX-License-Identifier: Apache-2.0
"""lm-evaluation-harness's face of a Model; lm_eval is imported when `model_class` is called."""

from __future__ import annotations

import bisect
import functools
import json
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from math import prod
from pathlib import Path
from typing import Any

from ..checkpoint.chat import ChatTemplateError, reads_roles, render_chat
from ..checkpoint.special_tokens import special_tokens
from ..info import runtime_info
from ..progress import new_bar
from ..runtime.model import Model
from ..runtime.open import load
from .scoring import score_continuations

GENERATION_BATCH = 16
DEFAULT_NEW_TOKENS = 256  # the harness's own default
GENERATION_OPTIONS = {"until", "do_sample", "temperature", "top_k", "top_p"}
LENGTH_OPTIONS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")

logger = logging.getLogger("singlequant.harness")


class Adapter:
    """The methods of `SingleQuantLM`; mixed with lm_eval's TemplateLM on demand.

    SingleQuantLM(sq.load(DIR)) or SingleQuantLM(path="DIR"); by name, model="singlequant" with
    model_args="path=DIR". max_length: tokens of the longest input (default: the model's maximum).
    Batches are made by tokens: batch_size is accepted and has no effect. progress shows bars.
    chat_template_args and enable_thinking go to the chat template, as with the harness's own hf.
    `seconds` counts by task how long its requests took.
    """

    def __init__(
        self,
        model: Model | str | Path | None = None,
        *,
        path: str | Path | None = None,
        max_length: int | None = None,
        progress: bool = True,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
        enable_thinking: bool | None = None,
        chat_template_args: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if (model is None) == (path is None):
            raise ValueError("SingleQuantLM: expected a model or path=DIR, one of the two")
        if device not in (None, "cpu"):
            raise ValueError(f"device: expected cpu, got {device}")
        model = path if model is None else model
        self.model = load(str(model)) if isinstance(model, (str, Path)) else model
        limit = self.model.spec.max_position_embeddings
        self.max_length = limit if max_length is None else int(max_length)
        if not 1 <= self.max_length <= limit:
            raise ValueError(f"max_length: expected 1 to {limit}, got {max_length}")
        self.progress = progress
        self.seconds: dict[str | None, float] = defaultdict(float)
        self.chat_template_args = dict(chat_template_args or {})
        if enable_thinking is not None:
            self.chat_template_args["enable_thinking"] = enable_thinking

    @property
    def eot_token_id(self) -> int:
        """The first end-of-sequence id."""
        if not self.model.stop_tokens:
            raise ValueError(f"{self.model.checkpoint.path}: expected an eos_token_id in "
                             "generation_config.json or config.json, found none")
        return self.model.stop_tokens[0]

    @property
    def prefix_token_id(self) -> int:
        """What an empty context stands for: the tokenizer's BOS, or else the end of text."""
        return self.eot_token_id if self._bos_token_id is None else self._bos_token_id

    @functools.cached_property
    def _bos_token_id(self) -> int | None:
        checkpoint = self.model.checkpoint
        token = special_tokens(checkpoint).named.get("bos_token")
        if token is not None:
            return self.model.tokenizer.token_to_id(token)
        return None if checkpoint.tokenizer_config else checkpoint.config.get("bos_token_id")

    @property
    def tokenizer_name(self) -> str:
        """The folder, as part of a file's name: the harness files its request caches under it."""
        return str(self.model.checkpoint.path).replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Token ids; special ones unless told otherwise or the text begins with BOS already."""
        if add_special_tokens is None:
            bos = self._bos_token_id
            bos_text = None if bos is None else self.model.tokenizer.id_to_token(bos)
            add_special_tokens = not (bos_text and string.startswith(bos_text))
        return self.model.encode(string, add_special_tokens).tolist()

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation under the folder's chat template.

        Without add_generation_prompt the last message, the assistant's, stays open: the text that
        follows continues it. A template that reads no roles has no turn for an assistant, so the
        generation prompt opens it. A template that refuses system messages goes without them.
        """
        checkpoint = self.model.checkpoint
        if not add_generation_prompt and not reads_roles(checkpoint):
            return self.apply_chat_template(chat_history[:-1]) + chat_history[-1]["content"]
        variables = {**self.chat_template_args, "continue_final_message": not add_generation_prompt}
        try:
            return render_chat(checkpoint, chat_history, **variables)
        except ChatTemplateError:
            others = [message for message in chat_history if message.get("role") != "system"]
            if len(others) == len(chat_history):
                raise
            logger.warning("the chat template refused the messages: without the system's now")
            return render_chat(checkpoint, others, **variables)

    def get_model_info(self) -> dict[str, Any]:
        """What a results file of the harness says of the model in its `config`."""
        checkpoint, spec = self.model.checkpoint, self.model.spec
        config = checkpoint.quant_config
        return {"model_num_parameters": sum(prod(shape) for _, shape in spec.tensors()),
                "model_dtype": checkpoint.dtype if config is None else config.scheme,
                "kv_bits": self.model.kv_bits, "task_seconds": dict(self.seconds),
                "singlequant": runtime_info()}

    def _by_task(self, requests: list, answered: Callable[[list], list]) -> list:
        """The answers to requests, a task after the other: so the seconds of each are known."""
        tasks, answers = defaultdict(list), [None] * len(requests)
        for index, request in enumerate(requests):
            tasks[getattr(request, "task_name", None)].append(index)
        for task, indices in tasks.items():
            begin = time.perf_counter()
            found = answered([requests[index] for index in indices])
            self.seconds[task] += time.perf_counter() - begin
            for index, answer in zip(indices, found, strict=True):
                answers[index] = answer
        return answers

    def loglikelihood(
        self, requests: list, disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """(log-likelihood in nats, greedy) of each request's (context, continuation)."""
        whole, hidden = super().loglikelihood, disable_tqdm or not self.progress
        return self._by_task(requests, lambda some: whole(some, disable_tqdm=hidden))

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        **_: Any,
    ) -> list[tuple[float, bool]]:
        scores: list[Any] = [None] * len(requests)
        pairs = [(context, continuation) for _, context, continuation in requests]
        with self._bar("scoring", len(requests), disable_tqdm) as bar:
            for index, *score in score_continuations(self.model, pairs, self.max_length):
                scores[index] = tuple(score)
                if requests[index][0] is not None:  # a text of its own, not a rolling window
                    self.cache_hook.add_partial("loglikelihood", requests[index][0], scores[index])
                bar.update()
        return scores

    def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood in nats of each whole text, behind the prefix token.

        Texts beyond max_length go in the harness's windows, each token predicted once. No special
        token is predicted.
        """
        return self._by_task(requests, lambda some: self._rolling(some, disable_tqdm))

    def _rolling(self, requests: list, disable_tqdm: bool) -> list[float]:
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        windows, owners = [], []
        for owner, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0], add_special_tokens=False)
            found = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, 1)
            new = [(None, *make_disjoint_window(window)) for window in found]
            windows += new
            owners += [owner] * len(new)
        sums = [0.0] * len(requests)
        scores = self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm)
        for owner, (likelihood, _) in zip(owners, scores, strict=True):
            sums[owner] += likelihood
        for request, total in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return sums

    def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
        """What each (context, options) is continued with, up to the first of its stop strings.

        Options: until, max_gen_toks, do_sample, temperature, top_k, top_p. A context that leaves
        no room for max_gen_toks loses its first tokens.
        """
        return self._by_task(requests, lambda some: self._generate_until(some, disable_tqdm))

    def _generate_until(self, requests: list, disable_tqdm: bool) -> list[str]:
        arguments = [request.args for request in requests]
        alike = defaultdict(list)
        for index, (_, options) in enumerate(arguments):
            alike[json.dumps(options, sort_keys=True)].append(index)
        texts = [""] * len(requests)
        with self._bar("generating", len(requests), disable_tqdm) as bar:
            for indices in alike.values():
                until, sampling = self._generation(arguments[indices[0]][1])
                room = self.max_length - sampling["max_new_tokens"]
                prompts = {i: (self.tok_encode(arguments[i][0]) or [self.prefix_token_id])[-room:]
                           for i in indices}
                order = sorted(indices, key=lambda i, p=prompts: (-len(p[i]), p[i]))
                for first in range(0, len(order), GENERATION_BATCH):
                    batch = order[first : first + GENERATION_BATCH]
                    new = self._continue([prompts[i] for i in batch], until, sampling, first)
                    for i, text in zip(batch, new, strict=True):
                        texts[i] = text
                        self.cache_hook.add_partial("generate_until", arguments[i], text)
                    bar.update(len(batch))
        return texts

    def _generation(self, options: dict[str, Any]) -> tuple[list[str], dict[str, Any]]:
        """(stop strings, arguments of Model.generate) from a task's generation_kwargs."""
        unknown = set(options) - GENERATION_OPTIONS - set(LENGTH_OPTIONS)
        if unknown:
            logger.warning("generation options without effect: %s", ", ".join(sorted(unknown)))
        options = {name: value for name, value in options.items() if value is not None}
        until = options.get("until") or []
        until = [until] if isinstance(until, str) else list(until)
        if not all(stop is None or isinstance(stop, str) for stop in until):
            raise ValueError(f"until: expected texts, got {until!r:.80}")
        default = min(DEFAULT_NEW_TOKENS, self.max_length // 2)
        count = int(next((options[n] for n in LENGTH_OPTIONS if options.get(n)), default))
        if not 1 <= count < self.max_length:
            raise ValueError(f"max_gen_toks: expected 1 to {self.max_length - 1}, fewer than the "
                             f"model's maximum, got {count}")
        sample = options.get("do_sample", float(options.get("temperature", 0)) > 0)
        return [stop for stop in until if stop], {
            "max_new_tokens": count,
            "temperature": float(options.get("temperature", 1.0)) if sample else 0.0,
            "top_k": int(options.get("top_k", 0)) if sample else 0,
            "top_p": float(options.get("top_p", 1.0)) if sample else 1.0,
        }

    def _continue(
        self, prompts: list[list[int]], until: list[str], sampling: dict[str, Any], seed: int
    ) -> list[str]:
        """Texts behind a batch of prompts, each cut before its first stop string."""
        new: list[list[int]] = [[] for _ in prompts]
        added = self.model.tokenizer.get_added_tokens_decoder()
        ends = {i for i, token in added.items() if token.content in until}
        names = [token.content for token in added.values() if token.special]
        special = [stop for stop in until if any(name in stop for name in names)]

        def text(index: int, count: int | None = None, special: bool = False) -> str:
            return self.model.decode_after(prompts[index], new[index][:count], special)

        def stopped(index: int, token: int) -> bool:
            if token in ends:  # a decoder may write it in another way
                return True
            new[index].append(token)
            return (bool(until) and any(stop in text(index) for stop in until)
                    or bool(special) and _first(text(index, special=True), special) is not None)

        self.model.generate(prompts, **sampling, seed=seed, on_token=stopped)
        texts = []
        for i, tokens in enumerate(new):
            at = _first(text(i, special=True), special) if special else None
            count = None if at is None else bisect.bisect_right(
                range(1, len(tokens) + 1), at, key=lambda k, i=i: len(text(i, k, special=True)))
            found = text(i, count)  # the tokens before a stop string of special ones
            texts.append(found[: _first(found, until)])
        return texts

    def _bar(self, what: str, total: int, disabled: bool) -> Any:
        return new_bar(disabled or not self.progress, desc=what, total=total, unit="request")


def _first(text: str, stops: list[str]) -> int | None:
    """Where the first of the stop strings begins in text; None if there is none."""
    return min((text.index(stop) for stop in stops if stop in text), default=None)


def require_lm_eval() -> None:
    """ImportError that says what to install where lm_eval is missing."""
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"tasks need lm-evaluation-harness: pip install 'singlequant[evaluation]' ({error})"
        ) from error


@functools.cache
def model_class() -> type:
    """SingleQuantLM, registered with the harness as "singlequant"."""
    require_lm_eval()
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model

    members = {"__doc__": Adapter.__doc__, "__module__": "singlequant.harness"}
    return register_model("singlequant")(type("SingleQuantLM", (Adapter, TemplateLM), members))
