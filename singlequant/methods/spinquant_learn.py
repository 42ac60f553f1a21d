# SPDX-License-Identifier: Apache-2.0
"""SpinQuant's rotations (arXiv 2405.16406), learned by Cayley SGD; needs the `torch` extra.

They minimise the cross-entropy of the network whose weights and activations are rounded. Gradients
pass the rounding as if it were not there (straight-through estimator).
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save

from .. import _C
from .._C import FormatError
from ..files import write_file
from ..models.spec import ModelSpec
from .spinquant_network import Network

if TYPE_CHECKING:
    import torch

STEPS, LEARNING_RATE = 1000, 1.5  # the rate falls linearly to 0 (section 4.1 of the paper)
CAYLEY_ITERATIONS = 5  # of the fixed point, and the bound on the step: Li et al. 2020, algorithm 1
RETRACTION_ODDS = 101  # a step in so many starts from the QR factor: rounding must not pile up
NOISE_STEPS = 50  # between two probes of the loss's noise
NOISE_COPIES = 4
NOISE_ANGLE = 0.01  # rad by which a probe rotates the columns of R1
SAVE_STEPS = 10
ORTHOGONALITY_TOLERANCE = 1e-4  # largest entry of |R^T R - I|
ARRAYS = {
    "R1": np.float32, "R2": np.float32, "losses": np.float64, "step_sizes": np.float64,
    "seconds": np.float64, "cpu_seconds": np.float64, "probe_steps": np.int64,
    "probe_losses": np.float64,
}  # fmt: skip


@dataclass(frozen=True, eq=False, repr=False)
class Learned:
    """Rotations after some steps, and how they came about.

    losses[s] is the quantized network's mean cross-entropy (nats per token) on the windows of step
    s, before its update; step_sizes[s] the alpha that R1's update took: the learning rate or, if
    less, 1 / |W|_1. seconds and cpu_seconds are a step's own wall and processor time; probes are
    not in them.

    Noise: rounding makes the loss a discontinuous function of the rotations, and the
    straight-through gradient is blind to that. probe_losses[p] are losses on all windows when
    probe_steps[p] steps were done: first at the iterate itself, then at NOISE_COPIES copies of it
    whose R1 is rotated by NOISE_ANGLE in random directions (the same ones at each probe). That
    moves the activations by 1 %, a fraction of a quantization step: the rounding errors keep their
    size, but another draw of them decides the loss. The standard deviation over the draws is the
    noise (it hardly depends on the angle, from 0.001 to 0.03 rad), their mean the loss without it.
    """

    R1: NDArray[np.float32]  # [hidden, hidden]
    R2: NDArray[np.float32]  # [layers, head_dim, head_dim]
    losses: NDArray[np.float64]  # [steps done]
    step_sizes: NDArray[np.float64]  # [steps done]
    seconds: NDArray[np.float64]  # [steps done]
    cpu_seconds: NDArray[np.float64]  # [steps done]
    probe_steps: NDArray[np.int64]  # [probes]
    probe_losses: NDArray[np.float64]  # [probes, 1 + NOISE_COPIES]
    settings: Mapping[str, Any]  # JSON values: what a resumed run must share

    @property
    def steps(self) -> int:
        """Steps that are done."""
        return len(self.losses)

    @property
    def finished(self) -> bool:
        """Whether all steps of the schedule are done."""
        return self.steps == self.settings["steps"]

    @property
    def orthogonality_error(self) -> float:
        """Largest entry of |R^T R - I| over R1 and every R2."""
        stacks = (self.R1[None].astype(np.float64), self.R2.astype(np.float64))
        return max(
            float(np.abs(r.transpose(0, 2, 1) @ r - np.eye(r.shape[-1])).max()) for r in stacks
        )

    @property
    def smooth_losses(self) -> NDArray[np.float64]:
        """[probes] loss without the noise of rounding; see the class."""
        return self.probe_losses.mean(axis=1)

    @property
    def noise(self) -> NDArray[np.float64]:
        """[probes] standard deviation of the loss under rotations too small to matter."""
        return self.probe_losses.std(axis=1, ddof=1)

    def __repr__(self) -> str:
        last = f", loss {self.losses[0]:.4f} -> {self.losses[-1]:.4f}" if self.steps else ""
        return f"Learned({self.steps} of {self.settings['steps']} steps{last})"


# ---- the optimiser -------------------------------------------------------------------------------


def cayley_step(
    x: torch.Tensor, gradient: torch.Tensor, rate: float
) -> tuple[torch.Tensor, float]:
    """One step of Cayley SGD on orthogonal x [n, n]; returns the new matrix and alpha.

    Li et al. 2020 (arXiv 2002.01113), algorithm 1 without momentum, as SpinQuant uses it: with
    X = x^T and V = -gradient^T, W = A - A^T for A = V X^T - X (X^T V X^T) / 2; then
    Y = X + alpha / 2 W (X + Y) by fixed-point iteration from X + alpha V, alpha = min(rate,
    1 / |W|_1), which makes the iteration a contraction. Rows of x are divided by their lengths
    first.
    """
    import torch

    x = x / torch.linalg.vector_norm(x, dim=1, keepdim=True)
    start, v = x.T, -gradient.T
    a = v @ x
    a = a - 0.5 * (start @ (x @ a))
    w = a - a.T
    alpha = min(rate, 1.0 / (float(w.abs().sum(dim=0).max()) + 1e-8))
    y = start + alpha * v
    for _ in range(CAYLEY_ITERATIONS):
        y = start + (0.5 * alpha) * (w @ (start + y))
    return y.T.contiguous(), alpha


def retract(x: torch.Tensor) -> torch.Tensor:
    """The orthogonal factor of x^T's QR factorisation with a positive diagonal, transposed."""
    import torch

    q, r = torch.linalg.qr(x.T)
    return (q * torch.where(torch.diagonal(r) < 0, -1.0, 1.0)).T.contiguous()


# ---- learning -----------------------------------------------------------------------------------


def randomized_hadamard(order: int, seed: int | list[int]) -> NDArray[np.float32]:
    """diag(random signs) times the Hadamard matrix [order, order], which is where R1, R2 start."""
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], order)
    return _C.hadamard_transform(np.diag(signs)).astype(np.float32)


def starting_rotations(
    spec: ModelSpec, seed: int = 0
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """R1 [hidden, hidden] and R2 [layers, head_dim, head_dim] before the first step."""
    order = spec.attention.head_dim
    R2 = [randomized_hadamard(order, [seed, i + 1]) for i in range(spec.layers)]
    return randomized_hadamard(spec.hidden, [seed, 0]), np.stack(R2)


def learn_rotations(
    checkpoint,
    windows: NDArray[np.integer],
    steps: int = STEPS,
    learning_rate: float = LEARNING_RATE,
    batch: int | None = None,
    seed: int = 0,
    weight_bits: int = 4,
    activation_bits: int = 4,
    clip: float = 1.0,
    threads: int | None = None,
    noise: bool = True,
    progress: Callable[[int, float], None] | None = None,
    time_limit: float | None = None,
    resume: Learned | None = None,
    save: str | Path | None = None,
) -> Learned:
    """Learn R1 and R2 on windows [count, length] of token ids; the learning rate falls to 0.

    batch: windows per step, in a fixed cyclic order; None takes all of them at each step. bits 16
    leaves weights or activations as they are; clip is the activations' range as a share of the
    token's maximum. Weights are rounded to nearest, per output channel. noise: probe the loss (see
    `Learned`) every NOISE_STEPS steps. progress(steps done, loss) is called after each step; an
    exception in it cancels. time_limit: seconds after which no further step begins. resume: an
    unfinished run with the same settings; save: a file that takes the state every few steps and at
    the end. The same arguments and number of torch threads give the same rotations, resumed or
    not. ValueError for bad arguments, ImportError without torch.
    """
    import torch

    windows = _check_arguments(checkpoint, windows, steps, learning_rate, batch, seed, clip,
                               (weight_bits, activation_bits), threads)
    settings = {
        "source_sha256": checkpoint.fingerprint,
        "windows_sha256": hashlib.sha256(windows).hexdigest(),
        "windows": list(windows.shape),
        "steps": steps,
        "learning_rate": float(learning_rate),
        "batch": len(windows) if batch is None else batch,
        "seed": seed,
        "weight_bits": weight_bits,
        "activation_bits": activation_bits,
        "clip": float(clip),
        "noise": noise,
    }
    before = torch.get_num_threads()
    try:
        if threads is not None:
            torch.set_num_threads(threads)
        run = _Learning(Network(checkpoint), torch.from_numpy(windows), settings, resume)
        return run.go(progress, time_limit, None if save is None else Path(save))
    finally:
        torch.set_num_threads(before)


def _check_arguments(
    checkpoint, windows, steps, learning_rate, batch, seed, clip, bits, threads
) -> NDArray[np.int64]:
    """The windows as int64 [count, length]; ValueError names what is wrong with an argument."""
    checkpoint.require_unquantized()
    windows = np.ascontiguousarray(windows, np.int64)
    if windows.ndim != 2 or len(windows) < 1 or windows.shape[1] < 2:
        raise ValueError(
            f"windows: expected (count, length) of at least (1, 2), found {windows.shape}"
        )
    if windows.min() < 0 or windows.max() >= checkpoint.spec.vocab:
        raise ValueError(f"windows: expected token ids from 0 to {checkpoint.spec.vocab - 1}, "
                         f"found {windows.min()} to {windows.max()}")
    checks = (
        ("steps", steps, steps >= 1, "at least 1"),
        ("learning_rate", learning_rate, 0 < learning_rate < np.inf, "a number above 0"),
        ("batch", batch, batch is None or 1 <= batch <= len(windows), f"1 to {len(windows)}"),
        ("seed", seed, seed >= 0, "at least 0"),
        ("threads", threads, threads is None or threads >= 1, "None or at least 1"),
        ("clip", clip, 0 < clip <= 1, "a number in (0, 1]"),
        ("weight_bits", bits[0], bits[0] in (4, 8, 16), "4, 8 or 16"),
        ("activation_bits", bits[1], bits[1] in (4, 8, 16), "4, 8 or 16"),
    )
    for name, value, good, expected in checks:
        if not good:
            raise ValueError(f"{name}: expected {expected}, found {value!r}")
    return windows


class _Learning:
    """The state of one run of Cayley SGD."""

    def __init__(self, network: Network, windows, settings, resume: Learned | None) -> None:
        import torch

        self.network, self.windows, self.settings = network, windows, settings
        if resume is None:
            start = starting_rotations(network.spec, settings["seed"])
            self.record = {name: [] for name in ARRAYS if name not in ("R1", "R2")}
            self.R1, self.R2 = (torch.from_numpy(r) for r in start)
        else:
            for key, value in settings.items():
                if resume.settings.get(key) != value:
                    raise ValueError(f"resume: {key}: expected {value!r}, "
                                     f"found {resume.settings.get(key)!r}")
            self.record = {
                name: list(getattr(resume, name)) for name in ARRAYS if name not in ("R1", "R2")
            }
            self.R1, self.R2 = torch.tensor(resume.R1), torch.tensor(resume.R2)

    @property
    def done(self) -> int:
        return len(self.record["losses"])

    def go(self, progress, time_limit: float | None, save: Path | None) -> Learned:
        start = time.monotonic()
        self.probe()
        while self.done < self.settings["steps"]:
            if time_limit is not None and time.monotonic() - start > time_limit:
                break
            self.step()
            self.probe()
            if save is not None and self.done % SAVE_STEPS == 0:
                save_learned(self.learned(), save)
            if progress:
                progress(self.done, self.record["losses"][-1])
        learned = self.learned()
        if save is not None:
            save_learned(learned, save)
        return learned

    def step(self) -> None:
        """One update of R1 and of every R2."""
        import torch

        wall, cpu = time.perf_counter(), time.process_time()
        s, number = self.settings, self.done
        chosen = (number * s["batch"] + np.arange(s["batch"])) % len(self.windows)
        R1, R2 = (r.detach().requires_grad_() for r in (self.R1, self.R2))
        loss = self.network.loss(self.windows[chosen], R1, R2, self._bits, s["clip"])
        loss.backward()
        rate = s["learning_rate"] * (1 - number / s["steps"])
        # the published optimiser draws this at random; here the step's number seeds the draw
        retraction = np.random.default_rng([s["seed"], number]).integers(
            0, RETRACTION_ODDS, 1 + len(R2)
        )
        with torch.no_grad():
            matrices, alphas = [], []
            for r, g, odds in zip([R1, *R2], [R1.grad, *R2.grad], retraction, strict=True):
                new, alpha = cayley_step(retract(r) if odds == 0 else r, g, rate)
                matrices.append(new)
                alphas.append(alpha)
            self.R1, self.R2 = matrices[0], torch.stack(matrices[1:])
        for name, value in (
            ("losses", loss.item()), ("step_sizes", alphas[0]),
            ("seconds", time.perf_counter() - wall), ("cpu_seconds", time.process_time() - cpu),
        ):  # fmt: skip
            self.record[name].append(value)
        if not np.isfinite(self.record["losses"][-1]):
            raise ValueError(f"step {number}: expected a finite loss, found NaN or Inf")

    @property
    def _bits(self) -> tuple[int, int]:
        return self.settings["weight_bits"], self.settings["activation_bits"]

    def probe(self) -> None:
        """Losses on all windows at the iterate and at rotated copies of it, where one is due."""
        import torch

        due = self.done % NOISE_STEPS == 0 or self.done == self.settings["steps"]
        if not self.settings["noise"] or not due or self.done in self.record["probe_steps"]:
            return
        n, losses = len(self.R1), []
        generator = torch.Generator().manual_seed(self.settings["seed"])
        with torch.no_grad():
            for copy in range(1 + NOISE_COPIES):
                R1 = self.R1
                if copy:
                    skew = torch.randn(n, n, generator=generator)
                    skew = (skew - skew.T) * (NOISE_ANGLE / (2 * n) ** 0.5)
                    R1 = retract(R1 + R1 @ skew)
                self.network.rotate(R1, self.R2, self._bits[0])
                losses.append(self._loss_all())
        self.record["probe_steps"].append(self.done)
        self.record["probe_losses"].append(losses)

    def _loss_all(self) -> float:
        """Mean loss over all windows, one at a time."""
        import torch.nn.functional as F

        total = 0.0
        for window in self.windows:
            logits = self.network.logits(window[None], self._bits[1], self.settings["clip"])
            total += F.cross_entropy(logits[0, :-1], window[1:]).item()
        return total / len(self.windows)

    def learned(self) -> Learned:
        """The state so far."""
        arrays = {
            name: np.array(values, ARRAYS[name]) for name, values in self.record.items()
        }
        arrays["probe_losses"] = arrays["probe_losses"].reshape(-1, 1 + NOISE_COPIES)
        return Learned(self.R1.numpy().copy(), self.R2.numpy().copy(), **arrays,
                       settings=self.settings)


# ---- files --------------------------------------------------------------------------------------


def save_learned(learned: Learned, path: str | Path) -> None:
    """Write a safetensors file; path holds the old state or the new one, never a part."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    arrays = {name: np.ascontiguousarray(getattr(learned, name)) for name in ARRAYS}
    settings = json.dumps(dict(learned.settings), sort_keys=True, allow_nan=False)
    write_file(path, save(arrays, {"spinquant": settings}))


def load_learned(path: str | Path) -> Learned:
    """What `save_learned` wrote. FormatError names what is wrong with the file."""
    try:
        tensors = load_file(path)
        with safe_open(path, "np") as file:
            settings = json.loads((file.metadata() or {})["spinquant"])
        arrays = {name: tensors[name] for name in ARRAYS}
    except KeyError as error:
        raise FormatError(f"{path}: expected {error.args[0]}, found no such entry") from None
    except FileNotFoundError:
        raise FormatError(f"{path}: no such file") from None
    except (OSError, ValueError, SafetensorError) as error:
        raise FormatError(f"{path}: {error}") from None
    for name, array in arrays.items():
        if array.dtype != ARRAYS[name]:
            raise FormatError(f"{path}: {name}: expected {np.dtype(ARRAYS[name])}, "
                              f"found {array.dtype}")
    learned = Learned(**arrays, settings=settings)
    if not learned.orthogonality_error < ORTHOGONALITY_TOLERANCE:
        raise FormatError(f"{path}: expected orthogonal R1 and R2, "
                          f"found |R^T R - I| = {learned.orthogonality_error:.3g}")
    return learned
