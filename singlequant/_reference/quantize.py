# SPDX-License-Identifier: Apache-2.0
"""Scales, codes, GPTQ and packing in plain NumPy."""

import ml_dtypes
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


def grid(x, bits, symmetric, clip, bfloat16=False):
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
    if bfloat16:
        scale = F32(ml_dtypes.bfloat16(scale))
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


def quantize(x, bits=4, group=0, symmetric=True, clip=1.0, search=False, bfloat16=False):
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
            best, least = grid(part, bits, symmetric, clips[0], bfloat16), None
            for c in clips:
                candidate = scale, _, low, high = grid(part, bits, symmetric, c, bfloat16)
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


ROW_BLOCK = 32  # inputs of a row of codes that share a scale


def bfloat16_bits(x):
    """The bits [...] uint16 of the bfloat16 nearest to a scale; 0 where it is no normal number."""
    x = np.asarray(x, F32)
    x = np.where(np.abs(x) < np.finfo(F32).tiny, F32(0), x)
    return x.astype(ml_dtypes.bfloat16).view(np.uint16)


def rows_of_codes(codes, scales, bits, k):
    """The table [n, k] in float64 of what quantize_rows gives."""
    wide = np.asarray(scales).astype(np.uint16).view(ml_dtypes.bfloat16).astype(np.float64)
    codes = np.asarray(codes).astype(np.uint8)
    if bits == 8:
        return codes.view(np.int8) * np.repeat(wide, ROW_BLOCK, 1)[:, :k]
    blocks = codes.reshape(len(codes), -1, ROW_BLOCK * bits // 8)
    low, high = blocks[..., :16], blocks[..., 16:]
    values = np.concatenate([low & 15, low >> 4], -1)
    if bits == 6:
        values |= np.concatenate([high >> shift & 3 for shift in (0, 2, 4, 6)], -1) << 4
    values = values.astype(np.float64) - 2 ** (bits - 1)
    return (values * wide[..., None]).reshape(len(codes), -1)[:, :k]


def quantize_rows(table, bits):
    table = to_float32(table, reject=True)
    n, k = table.shape
    blocks = np.zeros((n, -(-k // ROW_BLOCK) * ROW_BLOCK), F32)
    blocks[:, :k] = table
    blocks = blocks.reshape(-1, ROW_BLOCK)
    if bits == 8:
        stored = bfloat16_bits(np.abs(blocks).max(1) / F32(127))
        scale = stored.view(ml_dtypes.bfloat16).astype(F32)
        codes = [rounded(x, s, -128, 127) if s else 0 * x
                 for x, s in zip(blocks, scale, strict=True)]
        codes = np.array(codes).astype(np.int8).view(np.uint8).reshape(n, -1)
        return np.ascontiguousarray(codes[:, :k]), stored.reshape(n, -1)
    half = 2 ** (bits - 1)
    values, scales = np.zeros(blocks.shape, np.uint8), np.zeros(len(blocks), np.uint16)
    for i, x in enumerate(blocks):
        least = None
        for sign in (F32(1), F32(-1)):
            stored = bfloat16_bits(quantize(sign * x[None], bits, search=True)[1])[0, 0]
            scale = stored.view(ml_dtypes.bfloat16).astype(F32)
            code = rounded(sign * x, scale, -half, half - 1) if scale else 0 * x
            error = sum_of_lanes((sign * x - scale * code).astype(np.float64) ** 2)
            if least is None or error < least:
                least, values[i] = error, (code + half).astype(np.uint8)
                scales[i] = stored | (np.uint16(0x8000) if sign < 0 else np.uint16(0))
    packed = values[:, :16] & 15 | values[:, 16:] << 4
    if bits == 6:
        quarters = np.split(values >> 4, 4, axis=1)
        high = sum(quarter << 2 * j for j, quarter in enumerate(quarters)).astype(np.uint8)
        packed = np.concatenate([packed, high], 1)
    return packed.reshape(n, -1), scales.reshape(n, -1)


def pack(codes, bits=4):
    """Bit by bit: a row is a stream, code + half of each input, then codes 0 up to a whole word."""
    codes, half = np.asarray(codes), 2 ** (bits - 1)
    if codes.size and (codes.min() < -half or codes.max() >= half):
        raise ValueError(f"codes: expected values in {-half} .. {half - 1}, got others")
    n, k = codes.shape
    padded = np.full((n, k + 32), half, np.int64)
    padded[:, :k] = codes.astype(np.int64) + half
    stream = (padded[:, :, None] >> np.arange(bits) & 1).reshape(n, -1).astype(np.uint8)
    stream = np.ascontiguousarray(stream[:, : -(-k * bits // 32) * 32])
    return np.packbits(stream, axis=1, bitorder="little").view("<u4").view(np.int32)


def unpack(words, k, bits=4):
    words = np.ascontiguousarray(words, np.int32)
    stream = np.unpackbits(words.view(np.uint8), axis=1, bitorder="little")[:, : k * bits]
    values = stream.reshape(len(words), k, bits).astype(np.int64) << np.arange(bits)
    return (values.sum(-1) - 2 ** (bits - 1)).astype(np.int8)


TOKENS_OF_A_BLOCK = 2048


def gram(x, out=None, bits=32, rotation=None, columns=None):
    """rotation: the dense [k, k] that x meets as x @ rotation.T."""
    x = np.asarray(x, np.float64)
    x = x if columns is None else x * columns
    x = x if rotation is None else x @ rotation.T
    sums = x.T @ x if bits == 32 else np.zeros((x.shape[1],) * 2)
    for first in range(0, len(x) if bits == 8 else 0, TOKENS_OF_A_BLOCK):
        block = x[first : first + TOKENS_OF_A_BLOCK]
        square = np.mean(block**2, axis=1)
        block, square = block[square > 0], square[square > 0]
        sizes = (np.floor(np.log2(square)) + 1100) // 6
        for size in np.unique(sizes):
            part = block[sizes == size]
            scale = np.abs(part).max(axis=0) / 127
            codes = np.rint(part / np.where(scale > 0, scale, 1))
            sums += codes.T @ codes * np.outer(scale, scale)
    return sums + (0 if out is None else out)


def gptq_factor(gram, damping=0.01, order=False, overwrite=False):
    """float64, whether overwrite is set or not; gram is never written."""
    h = np.array(gram, np.float64)
    h += damping * np.mean(np.diag(h)) * np.eye(len(h))
    h[np.diag_indices_from(h)] = np.where(np.diag(h) == 0, 1, np.diag(h))
    p = np.arange(len(h))[::-1]
    if order:
        p = p[np.argsort(np.diag(gram)[p], kind="stable")]
    return np.linalg.cholesky(h[np.ix_(p, p)]), p.astype(np.int32)


def gptq_feedback(factor):
    """The factor, which `gptq_round` then takes in codes of 8 bits."""
    return np.asarray(factor, np.float64)


def gptq_round(
    weights, factor, permutation, bits=4, group=0, search=False, bfloat16=False, feedback=None
):
    """The paper's algorithm 1 as its authors run it: errors go through the inverse's factor.

    With feedback in the form of LDL feedback (QuIP, theorem 6).
    """
    if feedback is not None:
        return _round_in_codes(weights, feedback, permutation, bits, group,
                               {"search": search, "bfloat16": bfloat16})
    order = np.asarray(permutation)[::-1]
    static = not group or not np.array_equal(order, np.arange(len(order)))
    factor = np.asarray(factor, np.float64)[::-1, ::-1]
    upper = np.linalg.inv(factor)  # U with U^T U = H^-1
    w = np.array(weights, np.float64)
    group = group or w.shape[1]
    given = {"search": search, "bfloat16": bfloat16}
    codes, scales = np.zeros(w.shape, np.int8), quantize(w, bits, group, **given)[1]
    half = 2 ** (bits - 1)
    for i, column in enumerate(order):
        g = column // group
        if not static and column % group == 0:
            scales[:, [g]] = quantize(w[:, column : column + group], bits, **given)[1]
        scale = scales[:, g].astype(np.float64)
        safe = np.where(scale > 0, scale, np.inf)
        code = np.clip(np.rint(w[:, column] / safe), -half, half - 1)
        error = (w[:, column] - scale * code) / upper[i, i]
        w[:, order[i:]] -= np.outer(error, upper[i, i:])
        codes[:, column] = code
    return codes, scales


def _rounded(x):
    """Rows of x with codes of 8 bits, a scale for each, as what they stand for."""
    return dequantize(*quantize(np.ascontiguousarray(x, F32), 8)[:2]).astype(np.float64)


def _round_in_codes(weights, lower, permutation, bits, group, given):
    """Columns in the factor's order. What errors do in other blocks of 128 columns comes of errors
    and a factor in codes of 8 bits."""
    weights = np.asarray(weights, F32)
    k = len(lower)
    order = np.asarray(permutation)
    static = not group or not np.array_equal(order, np.arange(k)[::-1])
    group = group or k
    codes = np.zeros(weights.shape, np.int8)
    scales = quantize(weights, bits, group, **given)[1]
    values, errors = weights[:, order].astype(np.float64), np.zeros(weights.shape)
    half = 2 ** (bits - 1)

    def sums_of(begin, end):
        total = np.zeros((len(weights), end - begin))
        for stop in range(k, end, -512):  # a run of blocks has one scale
            run = [column for b in range(stop, max(stop - 512, end), -128)
                   for column in range(b - 128, b)]
            total += _rounded(errors[:, run]) @ _rounded(lower[run, begin:end].T).T
        return total

    for end in range(k, 0, -128):
        block = max(0, end - 128)
        sums = sums_of(block, end)
        for j in range(end - 1, block - 1, -1):
            if not static and (j + 1) % group == 0:  # a group's first column
                first = j + 1 - group
                known = sums[:, first - block :][:, :group] if first >= block else sums_of(
                    first, j + 1)
                turned = np.linalg.solve(lower[first : j + 1, first : j + 1].T, known.T).T
                now = (values[:, first : j + 1] + turned)[:, ::-1]
                scales[:, [order[j] // group]] = quantize(now.astype(F32), bits, **given)[1]
            scale = scales[:, order[j] // group].astype(np.float64)
            code = values[:, j] + sums[:, j - block] / lower[j, j]
            code = code / np.where(scale, scale, np.inf)
            codes[:, order[j]] = code = np.clip(np.rint(code), -half, half - 1)
            errors[:, j] = values[:, j] - scale * code
            sums[:, : j - block] += np.outer(errors[:, j], lower[j, block:j])
    return codes, scales


def transform_weight(weight, rotation=None, columns=None, rows=None):
    """Like the core, in float32; the rotation in float64."""
    x = to_float32(weight, reject=True)
    if columns is not None:
        x = x * np.asarray(columns, F32)
    if rows is not None:
        x = x * np.asarray(rows, F32)[:, None]
    return x if rotation is None else rotate(x, rotation)


def quantize_weight(
    weight, group=0, search=False, rotation=None, columns=None, rows=None, bits=4, bfloat16=False
):
    x = transform_weight(weight, rotation, columns, rows)
    codes, scales, _ = quantize(x, bits, group, True, 1.0, search, bfloat16)
    return pack(codes, bits), scales


def decode_fp8(codes, scales, block_rows, block_columns):
    """e4m3 codes [count, n, k] times their block's scale, as the bits of bfloat16."""
    n, k = codes.shape[1:]
    values = codes.view(ml_dtypes.float8_e4m3fn).astype(F32)
    spread = np.repeat(np.repeat(scales, block_rows, 1)[:, :n], block_columns, 2)[..., :k]
    with np.errstate(invalid="ignore", over="ignore"):
        return (values * spread).astype(ml_dtypes.bfloat16).view(np.uint16)


def decode_mxfp4(blocks, scales):
    """e2m1 codes [count, rows, groups, 16] times powers of two, transposed, as bfloat16's bits."""
    count, rows, groups, _ = blocks.shape
    codes = np.stack([blocks & 15, blocks >> 4], -1).reshape(count, rows, groups, 32)
    values = codes.view(ml_dtypes.float4_e2m1fn).astype(F32)
    powers = scales.view(ml_dtypes.float8_e8m0fnu).astype(F32)[..., None]
    with np.errstate(invalid="ignore", over="ignore"):
        out = (values * powers).reshape(count, rows, groups * 32).astype(ml_dtypes.bfloat16)
    return np.ascontiguousarray(out.transpose(0, 2, 1)).view(np.uint16)
