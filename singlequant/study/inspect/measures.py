# SPDX-License-Identifier: Apache-2.0
"""How hard a site's inputs are to quantize: the figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ... import _C

MASSIVE = (100.0, 1000.0)  # times the median magnitude
NORMAL = 6.0  # times the token's root mean square
NORMAL_SHARE = 0.06  # of the tokens

Sample = NDArray[np.float32]  # [tokens, k]


@dataclass(frozen=True)
class Measures:
    """How hard one site's inputs x [tokens, channels] are to quantize; tokens of zeros left out.

    massive: for each threshold T the number of entries beyond T times the median magnitude of all
    entries, in whatever scale that is ("Massive Activations in Large Language Models",
    arXiv 2402.17762, asks for about 1000 times the median, and for more than 100 in the hidden
    state, where a scale is given). largest: the largest magnitude over that median.
    normal: channels that exceed 6 times the token's rms in at least 6 % of the tokens (LLM.int8(),
    arXiv 2208.07339: a magnitude of 6 in 6 % of the sequence, on inputs of about unit rms).
    peak: mean over tokens of (max|x| / rms)^2, which the error of a quantizer that reaches the
    maximum is proportional to. 1 at equal magnitudes.
    kurtosis: mean over tokens of mean(x^4) / mean(x^2)^2; Gaussian 3, uniform 1.8.
    utilization: of the quantization space, the share of its bits that the codes carry: mean over
    tokens of the entropy of a token's codes / bits. 1 where all codes are used equally often.
    fill: mean over tokens of mean|x| / (max|x| / 2): 1 for values spread evenly up to the maximum,
    near 0 where a few entries claim the range. Rotations keep the volume that the data take
    (the determinant of their covariance), so that OSTQuant's volume ratio (arXiv 2501.13987) moves
    with the maximum alone.
    flatness: distance of the channels' norms from equal ones, |d - g| / |d|, d [channels], g the
    constant vector of the same length (after FlatQuant, arXiv 2410.09426). 0 is flat.
    activation_error: sum (x - Q(x))^2 / sum x^2 of the runtime's symmetric per-token quantizer.
    """

    massive: tuple[int, ...]
    largest: float
    normal: int
    peak: float
    kurtosis: float
    utilization: float
    fill: float
    flatness: float
    activation_error: float


def measure(
    x: Sample,
    bits: int = 4,
    clip: float = 1.0,
    massive: Sequence[float] = MASSIVE,
    normal: float = NORMAL,
    normal_share: float = NORMAL_SHARE,
) -> Measures:
    """The `Measures` of inputs x [tokens, k] under a `bits`-bit quantizer with that clip.

    massive, normal and normal_share are the thresholds of `Measures`. ValueError for x that is not
    a matrix with entries, that holds NaN or Inf, or for a threshold that is not above 0.
    """
    x = np.asarray(x, np.float32)
    if x.ndim != 2 or x.size == 0:
        raise ValueError(f"x: expected (tokens, k) with entries, found {x.shape}")
    check_thresholds(massive, normal, normal_share)
    codes, scales, _ = _C.quantize(x, bits, 0, True, clip)
    tokens, channel_sum2, above = _C.outliers(x, codes, scales[:, 0], normal)
    magnitudes = np.abs(x)
    median = float(np.median(magnitudes))
    peak, total, sum2, sum4, error, entropy = tokens[tokens[:, 2] > 0].T
    k, energy = x.shape[1], float(sum2.sum())
    norms = np.sqrt(channel_sum2)
    flat = np.sqrt(energy / k)
    return Measures(
        massive=tuple(int(np.count_nonzero(magnitudes > t * median)) for t in massive),
        largest=float(peak.max(initial=0.0)) / median if median > 0 else 0.0,
        normal=int(np.count_nonzero(above >= max(1.0, normal_share * len(x)))),
        peak=_mean(peak**2 * k / sum2),
        kurtosis=_mean(sum4 * k / sum2**2),
        utilization=_mean(entropy) / bits,
        fill=_mean(2 * total / (k * peak)),
        flatness=float(np.linalg.norm(norms - flat) / np.sqrt(energy)) if energy else 0.0,
        activation_error=float(error.sum()) / energy if energy else 0.0,
    )


def _mean(values: NDArray[np.float64]) -> float:
    """The mean; 0 of nothing."""
    return float(values.mean()) if values.size else 0.0


def check_thresholds(massive: Sequence[float], normal: float, normal_share: float) -> None:
    if not massive:
        raise ValueError("massive: expected at least one threshold, found none")
    for name, values in (("massive", massive), ("normal", [normal])):
        for value in values:
            if not 0 < value < np.inf:
                raise ValueError(f"{name}: expected a finite number above 0, found {value!r}")
    if not 0 < normal_share <= 1:
        raise ValueError(f"normal_share: expected a number in (0, 1], found {normal_share!r}")
