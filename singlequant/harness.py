"""Zero-shot tasks through lm-evaluation-harness: its face of a Model, and tasks of local files.

Nothing here imports lm_eval until a task is run or `SingleQuantLM` is asked for.
"""

from __future__ import annotations

import functools
import json
import logging
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import _C
from .runtime.model import Model, render_chat
from .sweep.run import load

TOKENS_PER_STEP = 1024  # KV slots of a batch: all layers' keys and values live at once
HEAD_ROWS = 256  # rows of logits alive at once
GENERATION_BATCH = 16
DEFAULT_NEW_TOKENS = 256  # the harness's own default
BOOTSTRAP_ITERATIONS = 1000  # for the few metrics without a closed-form standard error
# Loaders of `datasets` that read plain files: their data_files may be relative to the task file.
FILE_LOADERS = ("arrow", "csv", "json", "parquet", "text")
GENERATION_OPTIONS = {"until", "do_sample", "temperature", "top_k", "top_p"}
LENGTH_OPTIONS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")

logger = logging.getLogger(__name__)

# ---- scoring: needs no lm_eval ----------------------------------------------------------------

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


# ---- the harness's face of a model ------------------------------------------------------------


class _Adapter:
    """The methods of `SingleQuantLM`; mixed with lm_eval's TemplateLM on demand.

    SingleQuantLM(sq.load(DIR)) or SingleQuantLM(path="DIR"); by name, model="singlequant" with
    model_args="path=DIR". max_length: tokens of the longest input (default: the model's maximum).
    Batches are made by tokens: batch_size is accepted and has no effect. progress shows bars.
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
        if not checkpoint.tokenizer_config:
            return checkpoint.config.get("bos_token_id")
        token = checkpoint.tokenizer_config.get("bos_token")
        token = token["content"] if isinstance(token, dict) else token
        return None if token is None else self.model.tokenizer.token_to_id(token)

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
        follows continues it.
        """
        if add_generation_prompt:
            return render_chat(self.model.checkpoint, chat_history)
        opened = render_chat(self.model.checkpoint, chat_history[:-1])
        return opened + chat_history[-1]["content"]

    def loglikelihood(
        self, requests: list, disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """(log-likelihood in nats, greedy) of each request's (context, continuation)."""
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm or not self.progress)

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
        until = options.get("until") or []
        until = [until] if isinstance(until, str) else list(until)
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

        def text(index: int) -> str:
            return self.model.decode_after(prompts[index], new[index])

        def stopped(index: int, token: int) -> bool:
            new[index].append(token)
            return bool(until) and any(stop in text(index) for stop in until)

        self.model.generate(prompts, **sampling, seed=seed, on_token=stopped)
        texts = [text(i) for i in range(len(prompts))]
        for stop in until:
            texts = [t.split(stop, 1)[0] for t in texts]
        return texts

    def _bar(self, what: str, total: int, disabled: bool) -> Any:
        from tqdm import tqdm

        return tqdm(desc=what, total=total, unit="request", leave=False,
                    disable=True if disabled or not self.progress else None)


def _require_lm_eval() -> None:
    """ImportError that says what to install where lm_eval is missing."""
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"tasks need lm-evaluation-harness: pip install 'singlequant[evaluation]' ({error})"
        ) from error


@functools.cache
def _model_class() -> type:
    """SingleQuantLM, registered with the harness as "singlequant"."""
    _require_lm_eval()
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model

    members = {"__doc__": _Adapter.__doc__, "__module__": __name__}
    return register_model("singlequant")(type("SingleQuantLM", (_Adapter, TemplateLM), members))


def __getattr__(name: str) -> Any:
    if name == "SingleQuantLM":
        return _model_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


# ---- tasks ------------------------------------------------------------------------------------


def bundled_tasks() -> Path:
    """Folder of the tasks that travel with the package."""
    return Path(str(resources.files("singlequant") / "data" / "tasks"))


def evaluate_tasks(
    model: Model,
    tasks: Sequence[str],
    task_folder: str | Path | None = None,
    limit: int | None = None,
    progress: bool = False,
) -> dict[str, dict[str, float]]:
    """Zero-shot metrics of lm-evaluation-harness: task -> metric -> value.

    A metric's standard error is the metric `NAME_stderr`. Tasks are, in this order, those of the
    YAML files under task_folder, the package's own (`stdlib_continuation`, `stdlib_perplexity`)
    and the harness's. Local tasks touch neither the network nor the user's caches; data_files are
    relative to the YAML file that names them. limit: documents per task. ValueError for an
    unknown task, ImportError without lm_eval.
    """
    _require_lm_eval()
    tasks = list(tasks)
    if not tasks:
        raise ValueError("tasks: expected at least one, got none")
    if limit is not None and limit < 1:
        raise ValueError(f"limit: expected at least 1, got {limit}")
    if task_folder is not None and not Path(task_folder).is_dir():
        raise ValueError(f"task_folder: expected a folder, got {task_folder}")
    folders = [bundled_tasks()] + ([] if task_folder is None else [Path(task_folder)])
    configs = _local_configs(folders)
    with tempfile.TemporaryDirectory(prefix="singlequant-tasks-") as work, _quiet(not progress):
        return _run(model, tasks, configs, Path(work), limit, progress)


def _run(
    model: Model,
    tasks: list[str],
    configs: dict[Path, dict[str, Any]],
    work: Path,
    limit: int | None,
    progress: bool,
) -> dict[str, dict[str, float]]:
    import lm_eval
    from lm_eval.tasks import TaskManager

    _write_view(work, configs)
    local = {_name(config): config for config in configs.values()}
    # reading the harness's own thousands of files takes seconds: only if one may be asked for
    alone = all(_is_local(task, local) for task in tasks)
    manager = TaskManager(include_path=str(work), include_defaults=not alone)
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        raise ValueError(f"tasks: expected names of lm-evaluation-harness or local ones "
                         f"({', '.join(sorted(local))}), got {', '.join(unknown)}")
    results = lm_eval.simple_evaluate(
        model=_model_class()(model, progress=progress), tasks=tasks, task_manager=manager,
        limit=limit, bootstrap_iters=BOOTSTRAP_ITERATIONS, log_samples=False,
    )
    return {task: _numbers(metrics) for task, metrics in results["results"].items()}


def _numbers(metrics: dict[str, Any]) -> dict[str, float]:
    """'acc,none': 0.5 -> 'acc': 0.5; a filter other than none stays in the name."""
    return {
        key.removesuffix(",none"): float(value)
        for key, value in metrics.items()
        if "," in key and isinstance(value, (int, float, np.number))
    }


class _quiet:
    """Switches the bars of `datasets` off while it is open."""

    def __init__(self, active: bool) -> None:
        from datasets.utils import logging as bars

        self._bars = bars if active and bars.is_progress_bar_enabled() else None

    def __enter__(self) -> None:
        if self._bars:
            self._bars.disable_progress_bar()

    def __exit__(self, *exception: object) -> None:
        if self._bars:
            self._bars.enable_progress_bar()


def _local_configs(folders: Sequence[Path]) -> dict[Path, dict[str, Any]]:
    """Each YAML file that defines a task or a group; of equal names the last folder's."""
    found: dict[str, tuple[Path, dict[str, Any]]] = {}
    for folder in folders:
        for path in sorted(folder.rglob("*.yaml")):
            config = _read_task_file(path.resolve())
            name = _name(config)
            if name is not None:
                found[name] = path.resolve(), config
    return dict(found.values())


def _name(config: dict[str, Any]) -> str | None:
    """What a task or group file defines; None for one that is only included."""
    task = config.get("task")
    return task if isinstance(task, str) else config.get("group")


def _is_local(name: str, local: dict[str, dict[str, Any]]) -> bool:
    """Whether a task, or all the members of a group, are defined by these files."""
    if name not in local:
        return False
    members = local[name].get("task") or []
    return isinstance(members, str) or all(
        isinstance(member, str) and _is_local(member, local) for member in members
    )


def _read_task_file(path: Path) -> dict[str, Any]:
    """A task file with its includes merged; plain data files made absolute, functions left out."""
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_multi_constructor("!", lambda *_: None)
    try:
        config = yaml.load(path.read_text("utf-8"), Loader)  # noqa: S506
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise ValueError(f"{path}: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path}: expected a mapping, found {type(config).__name__}")
    arguments = config.get("dataset_kwargs")
    if isinstance(arguments, dict) and "data_files" in arguments:
        files = _absolute(arguments["data_files"], path.parent)
        config["dataset_kwargs"] = {**arguments, "data_files": files}
    merged: dict[str, Any] = {}
    includes = config.get("include") or []
    for include in [includes] if isinstance(includes, str) else includes:
        merged |= _read_task_file((path.parent / include).resolve())
    return merged | config


def _absolute(files: Any, folder: Path) -> Any:
    """data_files (a name, a list or a mapping of them) relative to a folder; addresses stay."""
    if isinstance(files, dict):
        return {split: _absolute(value, folder) for split, value in files.items()}
    if isinstance(files, list):
        return [_absolute(value, folder) for value in files]
    return files if "://" in files else str(folder / files)


def _write_view(work: Path, configs: dict[Path, dict[str, Any]]) -> None:
    """One file per task that includes the original and says where its data lie.

    The harness hands data_files to `datasets` as they stand, relative to the working directory; an
    `include` by absolute path is the documented way to overwrite them. `datasets` keeps what it
    makes of them under `work`.
    """
    for number, (path, config) in enumerate(configs.items()):
        view = {key: config[key] for key in ("task", "group", "tag") if key in config}
        arguments = config.get("dataset_kwargs")
        if config.get("dataset_path") in FILE_LOADERS and isinstance(arguments, dict):
            view["dataset_kwargs"] = {"cache_dir": str(work / "cache"), **arguments}
        # JSON is YAML
        (work / f"{number}.yaml").write_text(json.dumps({"include": str(path), **view}), "utf-8")
