# SPDX-License-Identifier: Apache-2.0
"""Scales, codes, GPTQ and packing in plain NumPy."""

import numpy as np

from .transform import rotate, to_float32

F32 = np.float32

CLIP_RATIOS = [np.float32(100 - 2 * i) / np.float32(100) for i in range(41)]


def sum_of_lanes(terms):
    """Sum of float64 terms [..., k] in the kernels' order: 8 lanes by index mod 8, then a tree."""
    terms = np.asarray(terms, np.float64)
    padding = -terms.shape[-1] % 8
    terms = np.concatenate([terms, np.zeros((*terms.shape[:-1], padding))], -1)
    # cumsum adds one row after the other, where sum would go pairwise
    lane = np.cumsum(terms.reshape(*terms.shape[:-1], -1, 8), axis=-2)[..., -1, :]
    lane = np.moveaxis(lane, -1, 0)
    return ((lane[0] + lane[4]) + (lane[2] + lane[6])) + ((lane[1] + lane[5]) + (lane[3] + lane[7]))


def grid(x, bits, symmetric, clip):
    """(scale, zero, low, high) of one group; code - zero lies in [low, high]."""
    clip = F32(clip)
    if symmetric:
        half = 2 ** (bits - 1)
        scale, low, high = F32(clip * np.abs(x).max()) / F32(half - 1), -half, half - 1
    else:
        lo, hi = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
        scale = F32(float(clip) * (hi - lo) / (2**bits - 1))
    if scale < np.finfo(F32).tiny:
        scale = F32(0)
    zero = 0
    if not symmetric:
        if scale > 0:
            zero = int(min(max(np.rint(-float(clip) * lo / float(scale)), 0), 2**bits - 1))
        low, high = -zero, 2**bits - 1 - zero
    return scale, zero, low, high


def rounded(x, scale, low, high):
    with np.errstate(over="ignore"):  # a tiny clip: Inf is clamped
        return np.rint(np.clip(x * (F32(1) / scale), F32(low), F32(high)))


def fixed_errors(part):
    """The clip search's integer squared error of each clip ratio, for one group [k] of floats.

    Values are rounded to 1 / 10150 of the largest magnitude: ratio (50 - i) / 50 has the integer
    step 29 (50 - i). The code's quotient is rounded to 1/256, then to a whole number.
    """
    u = np.rint(part * (F32(10150) / np.abs(part).max())).astype(np.int64)
    magnitude, most = np.abs(u), np.where(u < 0, 8, 7)
    errors = []
    for i in range(len(CLIP_RATIOS)):
        step = 29 * (50 - i)
        inverse = (2**23 + step // 2) // step
        code = np.minimum(((magnitude * inverse + 2**14 >> 15) + 128) >> 8, most)
        errors.append(int(np.sum((magnitude - step * code) ** 2)))
    return errors


def quantize(x, bits=4, group=0, symmetric=True, clip=1.0, search=False):
    """search="exact": without the integer sums that rule out most clip ratios."""
    x = np.asarray(x, F32)
    if not np.isfinite(x).all():
        raise ValueError("x: NaN or Inf found")
    m, k = x.shape
    g = group or k
    codes = np.zeros((m, k), np.int8)
    scales = np.zeros((m, k // g), F32)
    zeros = np.zeros((m, k // g), np.int32)
    for i in range(m):
        for j in range(k // g):
            part = x[i, j * g : (j + 1) * g]
            clips = [F32(clip) * r for r in CLIP_RATIOS] if search else [clip]
            integers = bits == 4 and symmetric and clip == 1 and np.abs(part).max() > F32(1e-30)
            if search and search != "exact" and integers:
                errors = fixed_errors(part)
                bound = min(errors) + (min(errors) >> 9)
                clips = [c for c, error in zip(clips, errors, strict=True) if error <= bound]
            best, least = grid(part, bits, symmetric, clips[0]), None
            for c in clips:
                candidate = scale, _, low, high = grid(part, bits, symmetric, c)
                if scale == 0:
                    break
                with np.errstate(over="ignore"):  # the largest floats, rounded up: Inf loses
                    error = (part - scale * rounded(part, scale, low, high)).astype(np.float64)
                error = sum_of_lanes(error * error)
                if least is None or error < least:
                    best, least = candidate, error
            scale, zero, low, high = best
            scales[i, j], zeros[i, j] = scale, zero
            if scale > 0:
                code = rounded(part, scale, low, high).astype(np.int32) + zero
                codes[i, j * g : (j + 1) * g] = code.astype(np.uint8).view(np.int8)
    return codes, scales, None if symmetric else zeros


def dequantize(codes, scales, zeros=None):
    codes, scales = np.asarray(codes), np.asarray(scales, F32)
    m, k = codes.shape
    steps = codes.astype(np.int8).astype(np.int32)
    if zeros is not None:
        unsigned = codes.astype(np.int8).view(np.uint8).astype(np.int32)
        steps = unsigned - np.repeat(np.asarray(zeros), k // scales.shape[1], axis=1)
    return np.repeat(scales, k // scales.shape[1], axis=1) * steps.astype(F32)


def pack(codes):
    codes = np.asarray(codes)
    if codes.size and (codes.min() < -8 or codes.max() > 7):
        raise ValueError("codes: expected values in -8 .. 7, got others")
    n, k = codes.shape
    nibbles = np.full((n, -(-k // 8) * 8), 8, np.uint32)
    nibbles[:, :k] = codes.astype(np.int64) + 8
    words = np.zeros((n, nibbles.shape[1] // 8), np.uint32)
    for j in range(8):
        words |= nibbles[:, j::8] << np.uint32(4 * j)
    return words.view(np.int32)


def unpack(words, k):
    words = np.asarray(words, np.int32).view(np.uint32)
    codes = np.zeros((len(words), words.shape[1] * 8), np.int8)
    for j in range(8):
        codes[:, j::8] = (words >> np.uint32(4 * j) & np.uint32(15)).astype(np.int8) - 8
    return codes[:, :k].copy()


def gram(x, out=None):
    x = np.asarray(x, np.float64)
    return x.T @ x + (0 if out is None else out)


def gptq_factor(gram, damping=0.01, order=False, overwrite=False):
    """float64, whether overwrite is set or not; gram is never written."""
    h = np.array(gram, np.float64)
    h += damping * np.mean(np.diag(h)) * np.eye(len(h))
    h[np.diag_indices_from(h)] = np.where(np.diag(h) == 0, 1, np.diag(h))
    p = np.arange(len(h))[::-1]
    if order:
        p = p[np.argsort(np.diag(gram)[p], kind="stable")]
    return np.linalg.cholesky(h[np.ix_(p, p)]), p.astype(np.int32)


def gptq_round(weights, factor, permutation, bits=4, group=0, search=False):
    """The paper's algorithm 1 as its authors run it: errors go through the inverse's factor."""
    order = np.asarray(permutation)[::-1]
    static = not group or not np.array_equal(order, np.arange(len(order)))
    factor = np.asarray(factor, np.float64)[::-1, ::-1]
    upper = np.linalg.inv(factor)  # U with U^T U = H^-1
    w = np.array(weights, np.float64)
    group = group or w.shape[1]
    codes, scales = np.zeros(w.shape, np.int8), quantize(w, bits, group, search=search)[1]
    half = 2 ** (bits - 1)
    for i, column in enumerate(order):
        g = column // group
        if not static and column % group == 0:
            scales[:, [g]] = quantize(w[:, column : column + group], bits, search=search)[1]
        scale = scales[:, g].astype(np.float64)
        safe = np.where(scale > 0, scale, np.inf)
        code = np.clip(np.rint(w[:, column] / safe), -half, half - 1)
        error = (w[:, column] - scale * code) / upper[i, i]
        w[:, order[i:]] -= np.outer(error, upper[i, i:])
        codes[:, column] = code
    return codes, scales


def transform_weight(weight, rotation=None, columns=None, rows=None):
    """Like the core, in float32; the rotation in float64."""
    x = to_float32(weight, reject=True)
    if columns is not None:
        x = x * np.asarray(columns, F32)
    if rows is not None:
        x = x * np.asarray(rows, F32)[:, None]
    return x if rotation is None else rotate(x, rotation)


def quantize_weight(weight, group=0, search=False, rotation=None, columns=None, rows=None):
    x = transform_weight(weight, rotation, columns, rows)
    codes, scales, _ = quantize(x, 4, group, True, 1.0, search)
    return pack(codes), scales
