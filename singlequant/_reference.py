"""NumPy twins of the C core's array functions, in stage order: the tests' truth, slow and plain."""

import math

import numpy as np

CLIP_RATIOS = [np.float32(100 - 2 * i) / np.float32(100) for i in range(41)]
F32 = np.float32


# ---- rotate, statistics ----


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


def givens_angle(a, b):
    return math.pi / 4 - math.atan2(b, a)


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


def factor_matrix(factor):
    """A factor of `rotate` as a dense float64 matrix."""
    if not isinstance(factor, tuple):
        return np.asarray(factor, dtype=np.float64)
    order, hadamard, pairs, angles = factor
    start = hadamard_matrix(order) if hadamard else np.eye(order)
    return chain_apply(pairs, angles, start.T).T


def rotate(x, left, right):
    left, right = factor_matrix(left), factor_matrix(right)
    x = np.asarray(x, dtype=np.float64)
    tokens = x.reshape(-1, len(left), len(right))
    return (left @ tokens @ right.T).reshape(x.shape).astype(np.float32)


def statistics_update(x, k1, k2, state=None):
    x = np.asarray(x, dtype=np.float32).astype(np.float64)
    tokens = x.reshape(-1, k1, k2)
    update = (
        len(x),
        x.min(axis=0) if len(x) else np.zeros(k1 * k2),
        x.max(axis=0) if len(x) else np.zeros(k1 * k2),
        x.sum(axis=0),
        (x**2).sum(axis=0),
        (x**4).sum(axis=0),
        np.einsum("tic,tjc->ij", tokens, tokens),
        np.einsum("tia,tib->ab", tokens, tokens),
    )
    return update if state is None else statistics_merge(state, update)


def statistics_merge(a, b):
    if a[0] == 0 or b[0] == 0:
        return a if b[0] == 0 else b
    sums = [p + q for p, q in zip(a[3:], b[3:], strict=True)]
    return a[0] + b[0], np.minimum(a[1], b[1]), np.maximum(a[2], b[2]), *sums


# ---- quantize, pack, kernels ----


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


def packed_linear(x, words, scales, group=0, bits=4, clip=1.0, high=0):
    """The linear with exact integer sums and the kernels' float32 operations after them (4 and 8
    bits), or in float64 (16 bits). Takes the words and scales a PackedWeight was made of. The first
    `high` inputs have 8-bit codes over their own unclipped range; the two parts are added last."""
    x = np.asarray(x, F32)
    k = x.shape[-1]
    rows = x.reshape(-1, k)
    codes_w = unpack(words, k).astype(np.int64)
    n = len(codes_w)
    g = group or k
    scales = np.asarray(scales, F32).reshape(n, k // g)
    if bits == 16:
        w = dequantize(codes_w.astype(np.int8), scales).astype(np.float64)
        return (rows.astype(np.float64) @ w.T).reshape(*x.shape[:-1], n)
    y = np.zeros((len(rows), n), F32)
    for begin, end, width, ratio in ((high, k, bits, clip), (0, high, 8, 1.0)):
        if begin == end:
            continue
        codes, scale, _ = quantize(rows[:, begin:end], width, clip=ratio)
        total = np.zeros((len(rows), n), F32)
        for first in range(begin, end, group or k):
            part = slice(first, min(first + g, end))
            sums = codes[:, first - begin : part.stop - begin].astype(np.int64) @ codes_w[:, part].T
            total += scales[:, first // g] * sums.astype(F32)
        y += scale * total
    return y.reshape(*x.shape[:-1], n)


def gemm_f32(a, b):
    return np.asarray(a, np.float64) @ np.asarray(b, np.float64)


def rms_norm(x, weight, eps):
    x = np.asarray(x, F32)
    wide = x.astype(np.float64)
    inv_rms = (1 / np.sqrt(sum_of_lanes(wide * wide) / x.shape[-1] + float(F32(eps)))).astype(F32)
    return x * np.expand_dims(inv_rms, -1) * np.asarray(weight, F32)


def silu_mul(gate, up):
    gate, up = np.asarray(gate, np.float64), np.asarray(up, np.float64)
    with np.errstate(over="ignore"):
        return gate / (1 + np.exp(-gate)) * up


def softmax(x, scale=1.0):
    x = np.asarray(x, np.float64) * float(F32(scale))
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


# ---- decoder, evaluate ----


def to_float32(x, reject=False):
    y = np.asarray(x).astype(np.float32)
    if reject and not np.isfinite(y).all():
        raise ValueError("x: not finite")
    return y


def linear_dense(x, weight):
    return np.asarray(x, np.float64) @ np.asarray(weight).astype(np.float64).T


def gather_rows(table, index):
    return np.asarray(table)[np.asarray(index)].astype(np.float32)


def rms_norm_float64(x, weight, eps):
    x = np.asarray(x, np.float64)
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight


def rotary(x, position, inv_freq, rope_scale):
    """x [heads, head_dim] at one position: pair (i, i + head_dim / 2) turns by position * inv_freq.

    The angle is rounded to float32 as in the models; all else is float64.
    """
    angle = (np.float32(position) * np.asarray(inv_freq, np.float32)).astype(np.float64)
    c, s = np.cos(angle) * rope_scale, np.sin(angle) * rope_scale
    first, second = np.split(x, 2, axis=-1)
    return np.concatenate([first * c - second * s, second * c + first * s], axis=-1)


def attention(q, keys, values, position, sliding_window=0):
    """One token: q [heads, d] against keys and values [kv_heads, positions, d]."""
    group = len(q) // len(keys)
    start = max(0, position - sliding_window + 1) if sliding_window else 0
    out = np.empty_like(q)
    for head, query in enumerate(q):
        k = keys[head // group][start : position + 1]
        v = values[head // group][start : position + 1]
        out[head] = softmax(k @ query / np.sqrt(len(query))) @ v
    return out


class KVCache:
    """keys and values [layers, sequences, kv_heads, capacity, head_dim], rounded when stored."""

    def __init__(
        self, layers, sequences, kv_heads, head_dim, capacity, bits=32, hadamard=True, limit=0
    ):
        self.layers, self.sequences, self.capacity = layers, sequences, capacity
        self.bits, self.hadamard = bits, hadamard and bits < 16
        self.keys = np.zeros((layers, sequences, kv_heads, capacity, head_dim))
        self.values = np.zeros_like(self.keys)

    def turn(self, x):
        """x [heads, head_dim] as the cache's Hadamard turns it."""
        return x @ hadamard_matrix(x.shape[-1]).T if self.hadamard else x

    def store(self, layer, sequence, position, key, value):
        """key, already turned, and value [kv_heads, head_dim]."""
        where = layer, sequence, slice(None), position
        self.keys[where], self.values[where] = kv_round(key, self.bits), kv_round(value, self.bits)

    def release(self, sequence):
        self.keys[:, sequence] = self.values[:, sequence] = 0


class DecoderLayer:
    """A linear is (weight, bias or None) or, for tests of packed layers, a function of its input.

    Sites are not looked at: a function rotates and quantizes as it likes.
    """

    def __init__(self, architecture, norms, linears, sites):
        self.architecture, self.norms, self.linears = architecture, norms, linears

    def linear(self, i, x):
        if callable(self.linears[i]):
            return np.asarray(self.linears[i](x), np.float64)
        weight, bias = self.linears[i]
        return linear_dense(x, weight) + (0 if bias is None else bias)

    def forward(self, hidden, sequence, position, cache, layer, record=False):
        """hidden [m, h] float64, updated in place."""
        a = self.architecture
        m, d = len(hidden), a["head_dim"]
        normed = rms_norm_float64(hidden, self.norms[0], a["rms_eps"])
        q, k, v = (self.linear(i, normed).reshape(m, -1, d) for i in range(3))
        for t in range(m):
            turned = cache.turn(rotary(k[t], position[t], a["inv_freq"], a["rope_scale"]))
            cache.store(layer, sequence[t], position[t], turned, v[t])
        attended = np.empty((m, a["heads"] * d))
        for t in range(m):
            turned = cache.turn(rotary(q[t], position[t], a["inv_freq"], a["rope_scale"]))
            of = layer, sequence[t]
            attended[t] = attention(
                turned, cache.keys[of], cache.values[of], position[t], a["sliding_window"]
            ).ravel()
        hidden += self.linear(3, attended)
        normed_mlp = rms_norm_float64(hidden, self.norms[1], a["rms_eps"])
        gate, up = self.linear(4, normed_mlp), self.linear(5, normed_mlp)
        inner = gate / (1 + np.exp(-gate)) * up
        hidden += self.linear(6, inner)
        return (normed, attended, normed_mlp, inner) if record else None


def distribution(logits, temperature, top_k, top_p):
    """(tokens in order of the walk, their probabilities) that sample draws from."""
    logits = np.asarray(logits, np.float32).astype(np.float64)
    p = softmax(logits / np.float64(np.float32(temperature)))
    order = np.argsort(-p, kind="stable")
    if top_k:
        order = order[:top_k]
    if top_p < 1:
        mass = np.cumsum(p[order])
        order = order[: np.searchsorted(mass, np.float64(np.float32(top_p)) * mass[-1]) + 1]
    return order, p[order] / p[order].sum()


def sample(logits, temperature, top_k, top_p, uniform):
    if temperature == 0:
        return int(np.argmax(logits))
    order, p = distribution(logits, temperature, top_k, top_p)
    return int(order[min(np.searchsorted(np.cumsum(p), uniform, side="right"), len(order) - 1)])


def log_softmax(logits):
    x = np.asarray(logits, np.float32).astype(np.float64)
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def negative_log_likelihood(logits, target):
    return -log_softmax(logits)[np.arange(len(target)), target]


def kl_divergence(p, q):
    log_p, log_q = log_softmax(p), log_softmax(q)
    kl = np.sum(np.exp(log_p) * (log_p - log_q), axis=-1)
    return kl, np.argmax(p, axis=-1) == np.argmax(q, axis=-1)


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


# ---- DuQuant (arXiv 2406.01721) ----


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


def rotate_blocks(x, first, permutation, second):
    x = np.asarray(x, float)

    def multiply(y, blocks):
        parts = np.split(y, len(blocks), axis=-1)
        return np.concatenate([p @ block for p, block in zip(parts, blocks, strict=True)], -1)

    return multiply(multiply(x, first)[..., permutation], second).astype(F32)


# ---- outliers ----


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


# ---- GPTQ ----


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


# ---- weights ----


def transform_weight(weight, rotation=None, columns=None, rows=None):
    """Like the core, in float32; the rotation in float64."""
    x = to_float32(weight, reject=True)
    if columns is not None:
        x = x * np.asarray(columns, F32)
    if rows is not None:
        x = x * np.asarray(rows, F32)[:, None]
    if rotation is None:
        return x
    return (rotate if len(rotation) == 2 else rotate_blocks)(x, *rotation).astype(F32)


def quantize_weight(weight, group=0, search=False, rotation=None, columns=None, rows=None):
    x = transform_weight(weight, rotation, columns, rows)
    codes, scales, _ = quantize(x, 4, group, True, 1.0, search)
    return pack(codes), scales


# ---- KV cache ----


def float16_toward(x, direction):
    """x [m] in float16, rounded to nearest, then moved on to the next one where that is short of x
    in direction (-1: down, 1: up). Finite: at most 65504."""
    largest = np.float32(65504)
    half = np.clip(x, -largest, largest).astype(np.float16)
    short = (half.astype(np.float32) - x) * direction < 0
    with np.errstate(over="ignore"):
        moved = np.nextafter(half, np.float16(direction * np.inf))
    return np.where(short & np.isfinite(moved), moved, half)


def kv_quantize(x, bits=4):
    """Codes [m, n], scales and minima [m]: the steps of the core, in float32."""
    x = np.asarray(x, np.float32)
    finite = np.isfinite(x).all(axis=1)
    safe = np.where(finite[:, None], x, 0)
    high = np.float32(2**bits - 1)
    minima = float16_toward(safe.min(axis=1), -1)
    scales = float16_toward((safe.max(axis=1) - minima.astype(np.float32)) / high, 1)
    steps = scales.astype(np.float32)
    inverse = np.divide(1, steps, where=steps > 0, out=np.zeros_like(steps))
    above = (safe - minima.astype(np.float32)[:, None]) * inverse[:, None]
    codes = np.rint(np.clip(above, 0, high)).astype(np.uint8)
    nan = np.float16(np.nan)
    return codes * finite[:, None], np.where(finite, scales, nan), np.where(finite, minima, nan)


def kv_round(x, bits):
    """x [m, n] as the cache gives it back."""
    x = np.asarray(x)
    if bits == 32:
        return x.astype(np.float32)
    if bits == 16:
        return np.clip(x, -65504, 65504).astype(np.float16).astype(np.float32)
    codes, scales, minima = (a.astype(np.float32) for a in kv_quantize(x, bits))
    return scales[:, None] * codes + minima[:, None]


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


# ---- benchmarks ----


def read_loop(data, prefetch=0, streams=1):
    data = np.asarray(data).view(np.uint8)
    padded = np.concatenate([data, np.zeros(-len(data) % 8, np.uint8)])
    return int(np.bitwise_xor.reduce(padded.view(np.uint64), initial=np.uint64(0)))
