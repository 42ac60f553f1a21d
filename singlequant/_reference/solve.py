# SPDX-License-Identifier: Apache-2.0
"""Statistics and the closed forms that follow from them, in plain NumPy."""

import math

import numpy as np

from .transform import as_chain, chain_apply

F32 = np.float32


def givens_angle(a, b):
    return math.pi / 4 - math.atan2(b, a)


def art_extremes(v, threshold, max_steps):
    v = np.array(v, dtype=np.float64)
    pairs, angles = [], []
    limit = threshold * np.median(np.abs(v)) if len(v) else 0.0
    while len(v) > 1 and len(pairs) < max_steps:
        i, j = int(np.argmax(np.abs(v))), int(np.argmin(np.abs(v)))
        if not abs(v[i]) > limit or abs(v[i]) - abs(v[j]) <= 1e-12 * abs(v[i]):
            break
        pairs.append((i, j))
        angles.append(givens_angle(v[i], v[j]))
        v[i] = v[j] = np.hypot(v[i], v[j]) * math.sqrt(0.5)
    return as_chain(pairs, angles)


def art_columns(columns, max_steps):
    columns = np.array(columns, dtype=np.float64)
    pairs, angles = [], []
    while columns.shape[0] > 1 and columns.shape[1] and len(pairs) < max_steps:
        peaks = np.abs(columns).max(axis=1)
        i, j = int(np.argmax(peaks)), int(np.argmin(peaks))
        if i == j:
            break
        row = int(np.argmax(np.abs(columns[i])))
        angle = givens_angle(columns[i, row], columns[j, row])
        rotated = chain_apply([(0, 1)], [angle], columns[[i, j]].T).T
        if not np.abs(rotated).max() < peaks[i]:
            break
        columns[[i, j]] = rotated
        pairs.append((i, j))
        angles.append(angle)
    return as_chain(pairs, angles)


def zeroing_chain(v):
    """Rotations on pairs (0, j) that take v to |v| e1, zero entries skipped."""
    v = np.array(v, dtype=np.float64)
    pairs, angles = [], []
    for j in range(1, len(v)):
        if v[j] != 0:
            pairs.append((0, j))
            angles.append(-math.atan2(v[j], v[0]))
            v[0] = math.hypot(v[0], v[j])
    if v[0] < 0:
        pairs.append((0, 1))
        angles.append(-math.pi)
    return pairs, angles


def urt(v, u):
    v, u = np.asarray(v, dtype=np.float64), np.asarray(u, dtype=np.float64)
    if not v.any():
        return as_chain([], [])
    if not u.any() or (len(v) == 1 and np.sign(v[0]) != np.sign(u[0])):
        raise ValueError("u: no rotation takes v onto it")
    pairs_v, angles_v = zeroing_chain(v)
    pairs_u, angles_u = zeroing_chain(u)
    return as_chain(pairs_v + pairs_u[::-1], angles_v + [-a for a in angles_u[::-1]])


def round_robin(n):
    """Rounds of disjoint pairs, each pair once; for an odd n one index rests per round."""
    circle = n + n % 2 - 1
    for round_ in range(circle):
        pairs = [(round_, circle)]
        for d in range(1, (circle + 1) // 2):
            pairs.append(((round_ + d) % circle, (round_ - d) % circle))
        yield [(min(p), max(p)) for p in pairs if max(p) < n]


def uniformity_angle(a, b):
    total = ((a + 1j * b) ** 4).sum()
    if total == 0:
        return 0.0
    angle = (math.pi - math.atan2(total.imag, total.real)) / 4
    return angle - math.pi / 2 if angle > math.pi / 4 else angle


def uniformity_sweep(columns, sweeps=1):
    columns = np.array(columns, dtype=np.float64)
    pairs, angles = [], []
    for _ in range(sweeps if len(columns) > 1 else 0):
        for disjoint in round_robin(len(columns)):
            for i, j in disjoint:
                angle = uniformity_angle(columns[i], columns[j])
                if abs(angle) >= 1e-12:
                    columns = chain_apply([(i, j)], [angle], columns.T).T
                    pairs.append((i, j))
                    angles.append(angle)
    return *as_chain(pairs, angles), np.ascontiguousarray(columns)


def axis_gram(x, k1, k2):
    tokens = np.asarray(x, dtype=np.float32).astype(np.float64).reshape(-1, k1, k2)
    return np.einsum("tic,tjc->ij", tokens, tokens)


def block_gram(x, b, gram=None):
    tokens = np.asarray(x, dtype=np.float32).astype(np.float64)
    blocks = tokens.reshape(len(tokens), tokens.shape[1] // b, b)
    return np.einsum("tni,tnj->nij", blocks, blocks) + (0 if gram is None else gram)


def block_energy(gram, m):
    return np.trace(np.swapaxes(m, 1, 2) @ gram @ m, axis1=1, axis2=2)


def aligned_energy(x_gram, w_gram):
    """The least trace(M^T x M) trace(M^-1 w M^-T) of any M [count, b, b] by its definition:

    the square of the trace of (x^1/2 w x^1/2)^1/2, summed over the blocks.
    """
    roots = (_power(x, 0.5) for x in x_gram)
    means = (_power(root @ w @ root, 0.5) for root, w in zip(roots, w_gram, strict=True))
    return sum(map(np.trace, means)) ** 2


def align_blocks(x_gram, w_gram, damping, symmetric=False):
    """M and M^-T from the geometric mean x_gram^-1 # w_gram by its definition."""
    found = [_align(*(_damped(g, damping) for g in pair), symmetric)
             for pair in zip(x_gram, w_gram, strict=True)]
    return tuple(np.stack(parts) for parts in zip(*found, strict=True))


def _damped(gram, damping):
    gram = (gram + gram.T) / 2
    diagonal = np.diag(gram)
    typical = np.sort(diagonal)[len(diagonal) // 2] or diagonal.mean() or 1.0
    return gram + np.diag(damping * diagonal + 1e-2 * typical)


def _align(x, w, symmetric):
    root = _power(x, 0.5)
    mean = _power(root @ w @ root, 0.5)
    mean = np.linalg.solve(root, np.linalg.solve(root, mean).T)  # x^-1/2 (...)^1/2 x^-1/2
    m = _power(mean, 0.5)
    if not symmetric:  # M Q with the eigenvectors of what both Gram matrices become
        m = m @ principal_directions(m @ x @ m).T
    return m, np.linalg.inv(m).T


def _power(matrix, power):
    values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
    return (vectors * np.maximum(values, 0) ** power) @ vectors.T


def statistics_update(x, state=None):
    x = np.asarray(x, dtype=np.float32).astype(np.float64)
    zeros = np.zeros(x.shape[1])
    extremes = (x.min(axis=0), x.max(axis=0)) if len(x) else (zeros, zeros)
    update = (len(x), *extremes, (x**2).sum(axis=0))
    return update if state is None else statistics_merge(state, update)


def statistics_merge(a, b):
    if a[0] == 0 or b[0] == 0:
        return a if b[0] == 0 else b
    sums = [p + q for p, q in zip(a[3:], b[3:], strict=True)]
    return a[0] + b[0], np.minimum(a[1], b[1]), np.maximum(a[2], b[2]), *sums


def chain_from_matrix(matrix):
    """Givens rotations that clear matrix^T below its diagonal, column by column."""
    rest = np.array(matrix, np.float64).T
    pairs, angles = [], []
    for i in range(len(rest)):
        for j in range(i + 1, len(rest)):
            if rest[j, i] == 0 and rest[i, i] >= 0:
                continue
            angle = np.arctan2(-rest[j, i], rest[i, i])
            c, s = np.cos(angle), np.sin(angle)
            rest[[i, j]] = np.array([[c, -s], [s, c]]) @ rest[[i, j]]
            pairs.append((i, j))
            angles.append(angle)
    return np.array(pairs, np.int32).reshape(-1, 2), np.array(angles, np.float64)


def principal_directions(gram):
    """Eigenvectors as rows, eigenvalues falling; each up to its sign."""
    return np.linalg.eigh(np.asarray(gram, float))[1][:, ::-1].T


def column_moments(weight):
    """Largest magnitude and sum of squares of each column."""
    weight = np.asarray(weight, np.float64)
    return np.abs(weight).max(axis=0, initial=0.0), (weight**2).sum(axis=0)


def block_peaks(weight, scale, block):
    """Of each block of inputs, the rows' squared peaks by the input that has them."""
    scaled = np.abs(np.asarray(weight, np.float64) * np.asarray(scale, np.float64))
    n, k = scaled.shape
    blocks = scaled.reshape(n, k // block, block)
    at = blocks.argmax(axis=2)
    peaks = np.zeros((k // block, block))
    for row in range(n):
        peaks[np.arange(k // block), at[row]] += blocks[row].max(axis=1) ** 2
    return peaks.reshape(k)


def random_word(seed, i):
    """splitmix64 of a counter, vectorised over either argument."""
    with np.errstate(over="ignore"):
        z = np.uint64(seed) + (np.asarray(i, np.uint64) + np.uint64(1)) * np.uint64(
            0x9E3779B97F4A7C15
        )
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def random_normals(seed, count):
    """The first standard normals of a stream, by Box and Muller."""
    words = random_word(seed, np.arange(2 * count)) >> np.uint64(11)
    uniform = np.minimum((words.astype(float) + 0.5) * 2.0**-53, 1 - 2.0**-53)
    return np.sqrt(-2 * np.log(uniform[::2])) * np.cos(2 * np.pi * uniform[1::2])


def reflection(v):
    return np.eye(len(v)) - 2 * np.outer(v, v) / (v @ v)


def random_orthogonal(n, seed):
    """Stewart 1980: from order 1 upwards, H diag(s, Q) with H e_0 = s x / |x|, x Gaussian."""
    normals = random_normals(seed, n * (n + 1) // 2)
    q = np.zeros((0, 0))
    for order in range(1, n + 1):
        v, normals = normals[:order].copy(), normals[order:]
        s = 1.0 if v[0] < 0 else -1.0
        v[0] -= s * np.linalg.norm(v)
        q = reflection(v) @ np.block(
            [[np.full((1, 1), s), np.zeros((1, order - 1))], [np.zeros((order - 1, 1)), q]]
        )
    return q


def duquant_steps(b, count, seed):
    """R~ diag(1, Q'), R~ the reflection that swaps e_0 and (1, ..., 1) / sqrt(b)."""
    flat = np.full(b, b**-0.5)
    flat[0] -= 1
    steps = np.zeros((count, b, b))
    for i in range(count):
        steps[i, 0, 0] = 1
        if b > 1:
            steps[i, 1:, 1:] = random_orthogonal(b - 1, random_word(seed, i))
            steps[i] = reflection(flat) @ steps[i]
    return steps.astype(F32)


def duquant_blocks(sample, steps):
    """Equations 2 and 3 block by block: R^i = E_d steps[i] E_d, the product of lowest peak."""
    b, k = steps.shape[1], sample.shape[1]
    blocks, peaks = [], []
    for j in range(0, k, b):
        x, product = np.asarray(sample[:, j : j + b], float), np.eye(b)
        found = [(np.abs(x).max(initial=0.0), product)]
        for step in steps.astype(float):
            d = int(np.argmax(np.abs(x).max(axis=0, initial=0.0)))
            switch = np.eye(b)
            switch[[0, d]] = switch[[d, 0]]
            r = switch @ step @ switch
            x, product = x @ r, product @ r
            found.append((np.abs(x).max(initial=0.0), product))
        peaks.append([peak for peak, _ in found])
        blocks.append(found[int(np.argmin(peaks[-1]))][1])
    return np.array(blocks, F32), np.array(peaks, F32)


def zigzag(maxima, b):
    """Deals of one channel per block, every other deal in reverse."""
    order = np.argsort(-np.asarray(maxima, float), kind="stable").reshape(b, -1)
    order[1::2] = order[1::2, ::-1]
    return order.T.reshape(-1).astype(np.int32)


def outliers(x, codes, scales, normal):
    x, codes = np.asarray(x, F32).astype(np.float64), np.asarray(codes)
    k = x.shape[1]
    rest = x - np.asarray(scales, F32).astype(np.float64)[:, None] * codes
    entropy = np.zeros(len(x))
    for t, row in enumerate(codes):
        share = np.unique(row, return_counts=True)[1] / k
        entropy[t] = -np.sum(share * np.log2(share))
    size, sum2 = np.abs(x), np.sum(x**2, axis=1)
    tokens = [size.max(axis=1), size.sum(axis=1), sum2, np.sum(x**4, axis=1),
              np.sum(rest**2, axis=1), entropy]
    above = size > normal * np.sqrt(sum2 / k)[:, None]
    return np.stack(tokens, axis=1), np.sum(x**2, axis=0), above.sum(axis=0)
