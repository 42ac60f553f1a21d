# SPDX-License-Identifier: Apache-2.0
"""Hadamard transforms, chains and rotations in plain NumPy."""

import math

import numpy as np

F32 = np.float32


def factor_sizes(k):
    """Search all admissible k2 outright; powers of two first, 12 and 20 families if they halve."""
    if k < 1:
        raise ValueError(f"k: expected at least 1, got {k}")

    def larger(k2):
        return max(k2, k // k2)

    def family(base):
        members = [base << i for i in range(k.bit_length()) if k % (base << i) == 0]
        return min(members, key=lambda k2: (larger(k2), -k2), default=None)

    best = family(1)
    limit = larger(best) // 2
    for base in (12, 20):
        other = family(base)
        if other and larger(other) <= limit and larger(other) < larger(best):
            best = other
    return k // best, best


def is_prime(n):
    return n > 1 and all(n % d for d in range(2, math.isqrt(n) + 1))


def jacobsthal(q):
    """chi(i - j) over Z_q."""
    squares = {t * t % q for t in range(1, q)}
    chi = np.array([0] + [1 if t in squares else -1 for t in range(1, q)], dtype=float)
    index = np.arange(q)
    return chi[(index[:, None] - index[None, :]) % q]


def hadamard_core(odd, two):
    """The unscaled core for n = odd * two."""
    if odd == 1:
        return np.ones((1, 1))
    r = 4
    while r <= two and odd * r <= 1024:
        p = odd * r
        if is_prime(p - 1):
            core = np.ones((p, p))
            core[1:, 0] = -1
            core[1:, 1:] = jacobsthal(p - 1) + np.eye(p - 1)
            return core
        if r == 4 and is_prime(p // 2 - 1):
            conference = np.ones((p // 2, p // 2))
            conference[0, 0] = 0
            conference[1:, 1:] = jacobsthal(p // 2 - 1)
            return np.kron(conference, [[1, 1], [1, -1]]) + np.kron(
                np.eye(p // 2), [[1, -1], [-1, -1]]
            )
        r *= 2
    index = np.arange(odd)
    angle = 2 * np.pi * (index[:, None] * index[None, :] % odd) / odd
    return np.cos(angle) + np.sin(angle)


def hadamard_matrix(n):
    two = n & -n
    core = hadamard_core(n // two, two)
    sylvester = np.ones((1, 1))
    while len(core) * len(sylvester) < n:
        sylvester = np.kron([[1, 1], [1, -1]], sylvester)
    return np.kron(core, sylvester) / math.sqrt(n)


def hadamard_transform(x):
    x = np.asarray(x, dtype=np.float64)
    return x @ hadamard_matrix(x.shape[-1]).T


def chain_apply(pairs, angles, x):
    y = np.array(x, dtype=np.float64)
    for (i, j), angle in zip(np.asarray(pairs), np.asarray(angles), strict=True):
        c, s = math.cos(angle), math.sin(angle)
        y[..., i], y[..., j] = c * y[..., i] - s * y[..., j], s * y[..., i] + c * y[..., j]
    return y


def as_chain(pairs, angles):
    return np.array(pairs, dtype=np.int32).reshape(-1, 2), np.array(angles, dtype=np.float64)


def factor_matrix(factor):
    """A factor of `rotate` as a dense float64 matrix."""
    if not isinstance(factor, tuple):
        return np.asarray(factor, dtype=np.float64)
    order, hadamard, pairs, angles = factor
    start = hadamard_matrix(order) if hadamard else np.eye(order)
    return chain_apply(pairs, angles, start.T).T


class Rotation:
    """What the core's Rotation says of itself; nothing is proved."""

    def __init__(self, k, left=None, right=None, align=None):
        self.k, self.kind, self.parts = k, "kronecker", (left, right)
        if align is not None:
            self.kind, self.parts = "aligned", (left, right, align)

    @classmethod
    def blocks(cls, first, permutation, second):
        self = cls(len(permutation))
        self.kind, self.parts = "blocks", (first, permutation, second)
        return self


def rotate(x, rotation):
    """x [..., k] by a Rotation, this one or the core's, in float64."""
    x = np.asarray(x, dtype=np.float64)
    if rotation.kind == "blocks":
        first, permutation, second = rotation.parts
        return block_product(block_product(x, first)[..., permutation], second).astype(F32)
    if rotation.kind == "aligned":
        x = block_product(x, rotation.parts[2])
    left, right = (None if f is None else factor_matrix(f) for f in rotation.parts[:2])
    if left is None:
        left = np.eye(1 if right is None else rotation.k // len(right))
    if right is None:
        right = np.eye(rotation.k // len(left))
    tokens = x.reshape(-1, len(left), len(right))
    return (left @ tokens @ right.T).reshape(x.shape).astype(F32)


def block_product(x, blocks):
    """x [..., k] times blockdiag(blocks [k / b, b, b])."""
    parts = np.split(x, len(blocks), axis=-1)
    return np.concatenate([p @ block for p, block in zip(parts, blocks, strict=True)], -1)


def to_float32(x, reject=False):
    y = np.asarray(x).astype(np.float32)
    if reject and not np.isfinite(y).all():
        raise ValueError("x: not finite")
    return y


def walsh_hadamard(x):
    """x [..., n], n a power of two, through the butterflies of the core in x's own precision."""
    shape, n = x.shape, x.shape[-1]
    width = 1
    while width < n:
        pairs = x.reshape(-1, n // (2 * width), 2, width)
        a, b = pairs[:, :, 0], pairs[:, :, 1]
        x = np.stack([a + b, a - b], axis=2)
        width *= 2
    return x.reshape(shape) * x.dtype.type(1 / np.sqrt(n))
