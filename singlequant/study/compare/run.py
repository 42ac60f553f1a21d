# SPDX-License-Identifier: Apache-2.0
"""Methods x schemes on one model, in one run that can be stopped and started again."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ...checkpoint.folder import Checkpoint, open_model
from ...config import QuantConfig
from ...distributed import Workers
from ...export.partial import source_digest
from ...files import folder_bytes
from ...info import __version__, kernel_names, machine_info
from ...methods.registry import METHODS
from ...methods.spinquant import load_learned
from ...sweep.measure import anonymous_bytes, measure
from ...sweep.prepare import View, check_outer, prepare
from ...sweep.spread import Spread
from ...sweep.sweep import Job, Outcome, sweep
from ...sweep.texts import calibration_windows, token_digest, written_by_model
from ..evaluate import default_seq_len
from .evaluator import FAILURES, Evaluator, folder_digest, read_texts
from .options import CompareOptions
from .rows import ROWS_FILE, STAGES, Row, RowsFile
from .table import Comparison

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .options import Changes

Sample = tuple[int, int, int]  # QuantConfig.sample


def compare(
    model: str | Path | Checkpoint,
    options: CompareOptions | None = None,
    *,
    progress: Callable[[int, int], None] | None = None,
    writing: Callable[[int, int], None] | None = None,
    workers: Workers | None = None,
    **changes: Unpack[Changes],
) -> Comparison:
    """Quantize a `save_pretrained` folder by each method and scheme, and evaluate each result.

    options: what to do (default: `CompareOptions()`). changes: fields of `CompareOptions` by name,
    such as methods=["none", "hadamard"], which win over options.

    All methods round alike, by `weights`, `clip` and `group_size`; `defaults` adds a row per scheme
    and seed with the recipe's own rounding. The model is calibrated once per seed for all rows. A
    method that cannot run is a row with the reason. With `out` a later run goes on where this one
    ended, and other models, texts or options add to the folder; without it the packed models are
    temporary, and finished rows are kept in `rows_file`, if named.
    progress(done, total) is called after each layer of a sweep and each evaluation, writing(tokens
    done, tokens) as the model writes calibration text; an exception in them cancels.
    ValueError names the argument that is wrong, or the tensor that is not finite.
    """
    if not isinstance(options, CompareOptions | None):
        raise TypeError(f"options: expected CompareOptions, found {type(options).__name__} (fields "
                        f"go by name: methods=[...])")
    options = replace(options or CompareOptions(), **changes)
    plan = _Plan(model, options, writing)
    with contextlib.ExitStack() as stack:
        rows_file = None if options.rows_file is None else Path(options.rows_file)
        if options.out is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="singlequant-")))
        else:
            folder = Path(options.out)
            folder.mkdir(parents=True, exist_ok=True)
            rows_file = rows_file or folder / ROWS_FILE
        rows = stack.enter_context(RowsFile(rows_file))
        found = _Runner(plan, rows, folder, options.out is not None, progress, workers).rows()
    quantized = [replace(found[plan.key(config)], default=default)
                 for config, default in plan.recipes]
    return Comparison(
        model=plan.checkpoint.name,
        fingerprint=plan.checkpoint.fingerprint,
        texts=tuple(text.name for text in plan.texts),
        seq_len=plan.seq_len,
        calibration="bundled" if options.calibration is None else str(options.calibration),
        rows=(found[plan.original_key], *quantized),
        machine=machine_info(),
    )


class _Plan:
    """What a comparison is made from: model, texts, calibration windows, and a key per row.

    Two runs give a row the same key when nothing that changes its figures differs.
    """

    def __init__(self, model: str | Path | Checkpoint, options: CompareOptions,
                 writing: Callable[[int, int], None] | None) -> None:
        self.recipes = options.recipes()
        self._learned_digest = None
        if options.learned is not None:
            load_learned(options.learned)
            self._learned_digest = hashlib.sha256(Path(options.learned).read_bytes()).hexdigest()
        self.checkpoint = checkpoint = open_model(model)
        checkpoint.require_unquantized()
        if (options.head_bits, options.embedding_bits) != (None, None):
            self.recipes = [(c.settled(checkpoint.spec.tied), d) for c, d in self.recipes]
        self.seq_len = _seq_len(checkpoint, options.seq_len)
        self.texts = read_texts(checkpoint, options.texts, self.seq_len, options.windows)
        check_outer(checkpoint)
        samples = {c.sample: c for c, _ in self.recipes}
        self.windows: dict[Sample, NDArray[np.int64]] = {
            sample: calibration_windows(checkpoint, c, options.calibration, writing)
            for sample, c in samples.items()
        }
        self.written = written_by_model(options.calibration)
        self.evaluator = Evaluator(checkpoint, self.texts, self.seq_len, options.tasks,
                                   options.task_folder)
        self._facts = {
            "model": checkpoint.fingerprint, "version": __version__, "seq_len": self.seq_len,
            "texts": [text.digest for text in self.texts], "tasks": list(options.tasks),
            "task_folder": folder_digest(options.task_folder), "config": None,
        }
        if (options.out, options.rows_file) != (None, None):  # rows of another run may be there
            self._facts |= {"content": source_digest(checkpoint), "kernels": kernel_names()}
        if options.tasks:  # rows of before pairs were made have no answers
            self._facts["paired"] = True
        self.original_key = _digest(self._facts)
        self.wanted = {self.key(config): config for config, _ in self.recipes}

    def key(self, config: QuantConfig) -> str:
        """The key of a config's row."""
        values = config.to_json()
        if config.learned is not None:  # its content counts, not its name
            values["learned"] = self._learned_digest
        tokens = token_digest(self.windows[config.sample])
        return _digest({**self._facts, "config": values, "calibration": tokens})


def _seq_len(checkpoint: Checkpoint, asked: int | None) -> int:
    """Tokens of an evaluation window. ValueError when the model cannot take so many."""
    seq_len = default_seq_len(checkpoint) if asked is None else asked
    limit = checkpoint.spec.max_position_embeddings
    if not 2 <= seq_len <= limit:
        raise ValueError(f"seq_len: expected 2 to {limit} tokens, the model's maximum, "
                         f"found {seq_len}")
    return seq_len


def _digest(facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


class _Runner:
    """Makes and evaluates the rows that are not in the file yet, group by group."""

    def __init__(self, plan: _Plan, rows: RowsFile, folder: Path, keep: bool,
                 progress: Callable[[int, int], None] | None, workers: Workers | None) -> None:
        self._plan, self._checkpoint, self._evaluator = plan, plan.checkpoint, plan.evaluator
        self._workers = workers
        self._rows, self._folder, self._keep, self._progress = rows, folder, keep, progress
        self._done = self._total = 0
        self._views: dict[tuple, View] = {}
        self._memory = anonymous_bytes()

    def rows(self) -> dict[str, Row]:
        """All rows by key, the original's first."""
        original, wanted = self._plan.original_key, self._plan.wanted
        failed: dict[str, Row] = {}
        groups: dict[tuple[int, Sample], dict[str, QuantConfig]] = {}
        views: dict[int, View] = {}
        for key, config in wanted.items():
            if key in self._rows.rows:
                continue
            sample = config.sample
            prepared = measure(self._view, config, self._plan.windows[sample], failures=FAILURES)
            if prepared.error:
                failed[key] = Row(config, error=prepared.error)
                continue
            view = prepared.value
            views[id(view)] = view
            groups.setdefault((id(view), sample), {})[key] = config
        missing = sum(map(len, groups.values()))
        self._total = missing + len(groups) * self._checkpoint.spec.layers
        if original not in self._rows.rows:
            self._total += 1
            self._rows.add(original, "row", self._evaluator.original(self._workers).to_json())
            self._step()
        for (view, sample), configs in groups.items():
            failed |= self._group(views[view], self._plan.windows[sample], configs)
        finished = {key: Row.from_json(self._rows.rows[key])
                    for key in (original, *wanted) if key in self._rows.rows}
        return finished | failed

    def _view(self, config: QuantConfig, windows: NDArray[np.int64]) -> View:
        """What `prepare` makes of the checkpoint; rows of one method and seed share it."""
        key = config.method, config.seed, config.activation_bits, config.learned
        if key not in self._views:
            self._views[key] = prepare(self._checkpoint, config, windows)
        return self._views[key]

    def _step(self, *_: int) -> None:
        self._done += 1
        if self._progress:
            self._progress(self._done, self._total)

    def _group(self, view: View, windows: NDArray[np.int64],
               configs: Mapping[str, QuantConfig]) -> dict[str, Row]:
        """Makes and evaluates rows that share statistics; returns those that failed."""
        folders = {key: self._folder / _folder_name(key, config)
                   for key, config in configs.items()}
        errors = self._build(view, windows, configs, folders)
        original = Row.from_json(self._rows.rows[self._plan.original_key])
        made = [folders[key] for key in configs if not errors.get(key)]
        scored = self._evaluator.spread(made, self._workers) if self._workers else {}
        failed = {}
        for key, config in configs.items():
            if errors.get(key):
                row = Row(config, error=errors[key])
            else:
                row = self._evaluator.quantized(
                    folders[key], Row(config, **self._rows.built[key]), original,
                    scored.get(folders[key]))
            if row.error:
                failed[key] = row
            else:
                self._rows.add(key, "row", row.to_json())
            if not self._keep:
                shutil.rmtree(folders[key], ignore_errors=True)
            self._step()
        return failed

    def _build(self, view: View, windows: NDArray[np.int64], configs: Mapping[str, QuantConfig],
               folders: Mapping[str, Path]) -> dict[str, str | None]:
        """Makes the packed folders that are missing, in one sweep; the error of each of them."""
        jobs = {key: Job(config, folders[key], scratch=True) for key, config in configs.items()
                if not (key in self._rows.built and folders[key].is_dir())}
        before, held = self._done, anonymous_bytes() - self._memory
        outcomes = ()
        if jobs:
            with self._spread(configs.values()) as spread:
                outcomes = sweep(view, windows, list(jobs.values()), failures=FAILURES,
                                 progress=self._step, written=self._plan.written, spread=spread)
        for _ in range(before + view.spec.layers - self._done):
            self._step()  # layers that nobody needed any more
        for (key, job), outcome in zip(jobs.items(), outcomes, strict=True):
            if outcome.error is None:
                learning = getattr(view, "seconds", 0.0)  # of learned rotations
                self._rows.add(key, "built", _cost(outcome, job.out, learning, held),
                               durable=self._keep)
        return {key: outcome.error for key, outcome in zip(jobs, outcomes, strict=True)}


    def _spread(self, configs: Iterable[QuantConfig]) -> AbstractContextManager[Spread | None]:
        """How the layers of these rows go to workers; a context of None where they stay here."""
        if self._workers is None or any(METHODS[config.method].trains for config in configs):
            return contextlib.nullcontext()
        return Spread(self._workers, self._folder, "compare")


def _cost(outcome: Outcome, out: Path, learning: float, held: int) -> dict[str, Any]:
    """Seconds, bytes of memory beyond what the run held before, and size, as RowsFile keeps it."""
    seconds = {**dict.fromkeys(STAGES, 0.0), **outcome.seconds}
    seconds["solve"] += learning
    return {"seconds": seconds, "peak_memory": max(0, outcome.peak_memory - held),
            "bytes_on_disk": folder_bytes(out)}


def _folder_name(key: str, config: QuantConfig) -> str:
    """Of a packed model in OUT: readable, and unlike that of any other row."""
    return f"{config.scheme}-{config.method}-{config.weights}-{key[:12]}"
