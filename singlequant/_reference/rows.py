# SPDX-License-Identifier: Apache-2.0
"""Twin of runtime/sq_rows_linear.c: tokens and rows of codes."""

import numpy as np

from .quantize import F32, rows_of_codes


def token_blocks(x):
    """Codes [m, blocks, 32] and scales [m, blocks] of float32 x [m, blocks, 32], and what they
    leave of x."""
    largest = np.abs(x).max(-1, initial=0, keepdims=True)
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        inverse = F32(127) / largest
        coded = inverse <= np.finfo(F32).max
        codes = np.where(coded, np.clip(np.rint(x * inverse), -127, 127), 0).astype(F32)
    scales = np.where(coded, largest / F32(127), F32(0)).astype(F32)
    return codes, scales[..., 0], x - scales * codes


def linear_rows(x, codes, scales, bits, activation_bits=16):
    """float32, operation for operation: sums over blocks of 32 inputs are exact integers."""
    x, k = np.asarray(x, F32), np.shape(x)[-1]
    blocks = scales.shape[-1]
    ones = np.full(scales.shape, 0x3F80, np.uint16)  # bfloat16 1
    weights = np.zeros((len(codes), blocks * 32))
    weights[:, :k] = rows_of_codes(codes, ones, bits, k)
    left = np.zeros((len(x), blocks * 32), F32)
    left[:, :k] = x
    left = left.reshape(len(x), blocks, 32)
    result = None
    for _ in range(activation_bits // 8):
        x_codes, x_scales, left = token_blocks(left)
        y = np.zeros((len(x), len(codes)), F32)
        for b in range(blocks):
            sums = x_codes[:, b].astype(np.float64) @ weights[:, 32 * b : 32 * b + 32].T
            w_scales = (scales[:, b].astype(np.uint32) << 16).view(F32)
            y += (w_scales * x_scales[:, b, None]) * sums.astype(F32)
        result = y if result is None else result + y
    return result


def linear_rows_bound(x, codes, scales, bits, activation_bits=16):
    """What linear_rows may differ by from exact products [m, n]: half a step of x's codes for every
    input, and 2^-22 of the products' magnitudes for the float32 sums of up to 100 blocks."""
    x, k = np.asarray(x, np.float64), np.shape(x)[-1]
    weights = np.abs(rows_of_codes(codes, scales, bits, k))
    padded = np.zeros((len(x), scales.shape[-1] * 32))
    padded[:, :k] = np.abs(x)
    largest = padded.reshape(len(x), -1, 32).max(-1).repeat(32, axis=-1)[:, :k]
    step = largest / (127 * 254 ** (activation_bits // 8 - 1))
    return (step / 2 * 1.001) @ weights.T + 100 * 2.0**-23 * (np.abs(x) @ weights.T) + 1e-36


def gather_codes(codes, scales, bits, width, index):
    return rows_of_codes(codes, scales, bits, width)[np.asarray(index)].astype(F32)
