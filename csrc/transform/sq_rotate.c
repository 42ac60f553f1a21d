/* SPDX-License-Identifier: Apache-2.0 */
/* Givens angles (ART, URT, uniformity sweeps), chains of rotations, and their application to
 * activations as a Kronecker product.
 *
 * Source: Ji et al., "SingleQuant: Efficient Quantization of Large Language Models in a Single
 * Pass", arXiv 2511.22316. With z = v_i + i v_j a rotation by theta is z <- e^(i theta) z. */
#include <math.h>
#include <stdatomic.h>
#include <string.h>

#include "core/sq_internal.h"
#include "kernels/sq_kernels.h"
#include "core/sq_threads.h"

#define SQ_PI 3.1415926535897932384626433832795
/* Rotations by less are not worth recording: they move a pair by less than the tests can see. */
#define SQ_ANGLE_MIN 1e-12
/* Fourth powers of larger values, summed over rows and columns, could overflow: (2^200)^4 = 2^800
 * leaves a factor of 2^224 for the sums. */
#define SQ_SWEEP_ABS_MAX 0x1p200
/* Rotations whose cosines and sines are computed at a time, and elements of one chunk of rows. */
#define SQ_CHAIN_TILE 256
#define SQ_CHAIN_GRAIN 32768
/* Elements of one block of rows in the Kronecker application: input, half-way and result, 128 KiB
 * of float32 each, stay in the second-level cache. */
#define SQ_ROTATE_BLOCK 32768
#define SQ_ROTATE_BLOCK_ROWS 64
/* Multiply-adds of one strip of a token, when there are fewer tokens than threads. */
#define SQ_STRIP_WORK 65536
/* Workers that one application has scratch for. */
#define SQ_ROTATE_WORKERS 64
/* Largest k = k1 k2. A worker's scratch is at most k + 3 k doubles and, as blocks of several rows
 * hold at most SQ_ROTATE_BLOCK elements, twice max(k, SQ_ROTATE_BLOCK) floats, each rounded up to
 * SQ_ALIGN_BYTES: at most 40 k bytes and four alignments, so all of it stays far below 2^63. */
#define SQ_ROTATE_K_MAX ((int64_t)1 << 40)
_Static_assert((40 * SQ_ROTATE_K_MAX + 4 * SQ_ALIGN_BYTES) <= INT64_MAX / SQ_ROTATE_WORKERS,
               "the workspace of sq_rotate fits int64_t");

static int
all_finite(const double *x, int64_t count)
{
    int bad = 0;
    for (int64_t i = 0; i < count; i++) {
        bad |= !(fabs(x[i]) <= 0x1.fffffffffffffp1023);
    }
    return !bad;
}

/* ---- angles ----------------------------------------------------------------------------- */

double
sq_givens_angle(double a, double b)
{
    return SQ_PI / 4 - atan2(b, a);
}

static void
record(int32_t *pairs, double *angles, int64_t *steps, int64_t i, int64_t j, double angle)
{
    pairs[2 * *steps] = (int32_t)i;
    pairs[2 * *steps + 1] = (int32_t)j;
    angles[(*steps)++] = angle;
}

/* ---- chains ----------------------------------------------------------------------------- */

static int
pairs_in_range(const int32_t *pairs, int64_t steps, int64_t n)
{
    for (int64_t t = 0; t < steps; t++) {
        const int32_t i = pairs[2 * t], j = pairs[2 * t + 1];
        if (i < 0 || j < 0 || i >= n || j >= n || i == j) {
            return 0;
        }
    }
    return 1;
}

struct chain_job {
    const int32_t *pairs;
    const double *angles;
    int64_t steps, n;
    double *x;
};

/* Cosines and sines are made a tile at a time, on the stack, and serve all rows of the chunk. */
static void
chain_rows(void *context, int64_t begin, int64_t end, int thread)
{
    const struct chain_job *job = context;
    double c[SQ_CHAIN_TILE], s[SQ_CHAIN_TILE];
    (void)thread;
    for (int64_t first = 0; first < job->steps; first += SQ_CHAIN_TILE) {
        const int64_t count = sq_min_i64(SQ_CHAIN_TILE, job->steps - first);
        const int32_t *pairs = job->pairs + 2 * first;
        for (int64_t t = 0; t < count; t++) {
            c[t] = cos(job->angles[first + t]);
            s[t] = sin(job->angles[first + t]);
        }
        for (int64_t row = begin; row < end; row++) {
            double *v = job->x + row * job->n;
            for (int64_t t = 0; t < count; t++) {
                double *a = v + pairs[2 * t], *b = v + pairs[2 * t + 1];
                const double va = *a, vb = *b;
                *a = c[t] * va - s[t] * vb;
                *b = s[t] * va + c[t] * vb;
            }
        }
    }
}

sq_status
sq_chain_apply(const int32_t *pairs, const double *angles, int64_t g, double *x, int64_t rows,
               int64_t n)
{
    int64_t count;
    if (!pairs || !angles || !x) {
        return SQ_ERR_NULL;
    }
    if (g < 0 || rows < 0 || n < 0 || n > INT32_MAX || !sq_product(rows, n, &count) ||
        !pairs_in_range(pairs, g, n)) {
        return SQ_ERR_RANGE;
    }
    if (!all_finite(angles, g)) {
        return SQ_ERR_NONFINITE;
    }
    struct chain_job job = {pairs, angles, g, n, x};
    /* at least 64 rows share a tile's cosines */
    const int64_t grain = sq_max_i64(64, SQ_CHAIN_GRAIN / sq_max_i64(1, n));
    sq_parallel_for(rows, grain, chain_rows, &job);
    return SQ_OK;
}

/* ---- ART on signed extremes ------------------------------------------------------------- */

static uint64_t
magnitude_bits(double x)
{
    uint64_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits & (UINT64_MAX >> 1);
}

/* The rank-th (from 0) smallest |v|, by bisection over bit patterns: those of non-negative floats
 * are ordered as integers, so 63 counting passes do it without a copy of v. */
static double
ranked_magnitude(const double *v, int64_t n, int64_t rank)
{
    uint64_t bits = 0;
    for (uint64_t bit = (uint64_t)1 << 62; bit; bit >>= 1) {
        int64_t below = 0;
        for (int64_t i = 0; i < n; i++) {
            below += magnitude_bits(v[i]) < (bits | bit);
        }
        if (below <= rank) {
            bits |= bit;
        }
    }
    double x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* Indices of the largest and of the smallest entry of |v|, the first of equals. */
static void
largest_smallest(const double *v, int64_t n, int64_t *largest, int64_t *smallest)
{
    *largest = *smallest = 0;
    for (int64_t i = 1; i < n; i++) {
        const double x = fabs(v[i]);
        *largest = x > fabs(v[*largest]) ? i : *largest;
        *smallest = x < fabs(v[*smallest]) ? i : *smallest;
    }
}

sq_status
sq_art_extremes(double *v, int64_t n, double threshold, int64_t max_steps, int32_t *pairs,
                double *angles, int64_t *steps)
{
    if (!v || !pairs || !angles || !steps) {
        return SQ_ERR_NULL;
    }
    *steps = 0;
    if (n < 0 || n > INT32_MAX || max_steps < 0 || !(threshold >= 0)) {
        return SQ_ERR_RANGE;
    }
    if (!all_finite(v, n)) {
        return SQ_ERR_NONFINITE;
    }
    if (n < 2) {
        return SQ_OK;
    }
    const double median =
        ranked_magnitude(v, n, (n - 1) / 2) / 2 + ranked_magnitude(v, n, n / 2) / 2;
    while (*steps < max_steps) {
        int64_t i, j;
        largest_smallest(v, n, &i, &j);
        const double high = fabs(v[i]), low = fabs(v[j]);
        /* with all entries alike nothing can fall: the threshold is out of reach */
        if (!(high > threshold * median) || high - low <= SQ_ANGLE_MIN * high) {
            break;
        }
        record(pairs, angles, steps, i, j, sq_givens_angle(v[i], v[j]));
        v[i] = v[j] = hypot(v[i], v[j]) * sqrt(0.5); /* what the rotation gives, exactly equal */
    }
    return SQ_OK;
}

/* ---- ART on columns --------------------------------------------------------------------- */

/* Independent running maxima per loop, so that comparisons do not wait for one another. */
enum { N_LANES = 8 };

static double
max_lanes(const double lanes[N_LANES])
{
    double result = lanes[0];
    for (int l = 1; l < N_LANES; l++) {
        result = lanes[l] > result ? lanes[l] : result;
    }
    return result;
}

static double
column_peak(const double *x, int64_t rows)
{
    double lanes[N_LANES] = {0};
    int64_t r = 0;
    for (; r + N_LANES <= rows; r += N_LANES) {
        for (int l = 0; l < N_LANES; l++) {
            const double v = fabs(x[r + l]);
            lanes[l] = v > lanes[l] ? v : lanes[l];
        }
    }
    for (; r < rows; r++) {
        const double v = fabs(x[r]);
        lanes[0] = v > lanes[0] ? v : lanes[0];
    }
    return max_lanes(lanes);
}

/* Peaks the two columns would have after the rotation; nothing is written. */
static void
rotated_peaks(const double *a, const double *b, int64_t rows, double c, double s, double *peak_a,
              double *peak_b)
{
    double lanes_a[N_LANES] = {0}, lanes_b[N_LANES] = {0};
    int64_t r = 0;
    for (; r + N_LANES <= rows; r += N_LANES) {
        for (int l = 0; l < N_LANES; l++) {
            const double va = fabs(c * a[r + l] - s * b[r + l]);
            const double vb = fabs(s * a[r + l] + c * b[r + l]);
            lanes_a[l] = va > lanes_a[l] ? va : lanes_a[l];
            lanes_b[l] = vb > lanes_b[l] ? vb : lanes_b[l];
        }
    }
    for (; r < rows; r++) {
        const double va = fabs(c * a[r] - s * b[r]), vb = fabs(s * a[r] + c * b[r]);
        lanes_a[0] = va > lanes_a[0] ? va : lanes_a[0];
        lanes_b[0] = vb > lanes_b[0] ? vb : lanes_b[0];
    }
    *peak_a = max_lanes(lanes_a);
    *peak_b = max_lanes(lanes_b);
}

static void
rotate_columns(double *restrict a, double *restrict b, int64_t rows, double c, double s)
{
    for (int64_t r = 0; r < rows; r++) {
        const double va = a[r], vb = b[r];
        a[r] = c * va - s * vb;
        b[r] = s * va + c * vb;
    }
}

/* peaks [n]: each column's largest magnitude, kept up to date for the two columns a step touches. A
 * step that would not lower its pair's peak is not made. */
static void
art_columns(double *columns, int64_t n, int64_t rows, int64_t max_steps, double *peaks,
            int32_t *pairs, double *angles, int64_t *steps)
{
    for (int64_t i = 0; i < n; i++) {
        peaks[i] = column_peak(columns + i * rows, rows);
    }
    while (*steps < max_steps) {
        int64_t i, j, row = 0;
        largest_smallest(peaks, n, &i, &j);
        if (i == j) {
            break;
        }
        double *a = columns + i * rows, *b = columns + j * rows;
        while (fabs(a[row]) != peaks[i]) {
            row++;
        }
        const double angle = sq_givens_angle(a[row], b[row]), c = cos(angle), s = sin(angle);
        double peak_a, peak_b;
        rotated_peaks(a, b, rows, c, s, &peak_a, &peak_b);
        if (!(peak_a < peaks[i] && peak_b < peaks[i])) {
            break;
        }
        rotate_columns(a, b, rows, c, s);
        peaks[i] = peak_a;
        peaks[j] = peak_b;
        record(pairs, angles, steps, i, j, angle);
    }
}

sq_status
sq_art_columns(double *columns, int64_t n, int64_t rows, int64_t max_steps, int32_t *pairs,
               double *angles, int64_t *steps)
{
    int64_t count;
    if (!columns || !pairs || !angles || !steps) {
        return SQ_ERR_NULL;
    }
    *steps = 0;
    if (n < 0 || n > INT32_MAX || rows < 0 || max_steps < 0 || !sq_product(n, rows, &count)) {
        return SQ_ERR_RANGE;
    }
    if (!all_finite(columns, count)) {
        return SQ_ERR_NONFINITE;
    }
    if (n < 2 || rows == 0) {
        return SQ_OK;
    }
    double *peaks = sq_alloc((size_t)n * sizeof *peaks);
    if (!peaks) {
        return SQ_ERR_NOMEM;
    }
    art_columns(columns, n, rows, max_steps, peaks, pairs, angles, steps);
    free(peaks);
    return SQ_OK;
}

/* ---- URT -------------------------------------------------------------------------------- */

/* The chain on pairs (0, j) that takes v to |v| e1, zero entries skipped. Each rotation by
 * -atan2(v_j, v_0) leaves (hypot(v_0, v_j), 0), so only the running v_0 is needed. A negative v_0
 * with nothing beside it takes half a turn. */
static void
zeroing_chain(const double *v, int64_t n, int32_t *pairs, double *angles, int64_t *steps)
{
    double head = v[0];
    for (int64_t j = 1; j < n; j++) {
        if (v[j] != 0) {
            record(pairs, angles, steps, 0, j, -atan2(v[j], head));
            head = hypot(head, v[j]);
        }
    }
    if (head < 0) {
        record(pairs, angles, steps, 0, 1, -SQ_PI);
    }
}

static int
is_zero(const double *v, int64_t n)
{
    for (int64_t i = 0; i < n; i++) {
        if (v[i] != 0) {
            return 0;
        }
    }
    return 1;
}

sq_status
sq_urt(const double *v, const double *u, int64_t n, int32_t *pairs, double *angles, int64_t *steps)
{
    if (!v || !u || !pairs || !angles || !steps) {
        return SQ_ERR_NULL;
    }
    *steps = 0;
    if (n < 0 || n > INT32_MAX / 2) {
        return SQ_ERR_RANGE;
    }
    if (!all_finite(v, n) || !all_finite(u, n)) {
        return SQ_ERR_NONFINITE;
    }
    if (is_zero(v, n)) {
        return SQ_OK;
    }
    /* no rotation takes v to zero, nor a single number to its opposite */
    if (is_zero(u, n) || (n == 1 && signbit(v[0]) != signbit(u[0]))) {
        return SQ_ERR_RANGE;
    }
    if (n == 1) {
        return SQ_OK;
    }
    zeroing_chain(v, n, pairs, angles, steps);
    const int64_t middle = *steps;
    zeroing_chain(u, n, pairs, angles, steps);
    /* the inverse of u's chain: backwards, with opposite angles */
    for (int64_t t = middle; t < *steps; t++) {
        angles[t] = -angles[t];
    }
    for (int64_t lo = middle, hi = *steps - 1; lo < hi; lo++, hi--) {
        const double angle = angles[lo];
        const int32_t j = pairs[2 * lo + 1]; /* the first index is 0 everywhere */
        angles[lo] = angles[hi];
        pairs[2 * lo + 1] = pairs[2 * hi + 1];
        angles[hi] = angle;
        pairs[2 * hi + 1] = j;
    }
    return SQ_OK;
}

/* ---- a matrix as a chain ---------------------------------------------------------------- */

/* Largest entry of |M M^T - I| is below 1e-6. */
static int
is_orthogonal(const double *m, int64_t n)
{
    for (int64_t i = 0; i < n; i++) {
        for (int64_t j = 0; j <= i; j++) {
            double dot = i == j ? -1.0 : 0.0;
            for (int64_t k = 0; k < n; k++) {
                dot += m[i * n + k] * m[j * n + k];
            }
            if (!(fabs(dot) < 1e-6)) { /* NaN as well */
                return 0;
            }
        }
    }
    return 1;
}

/* With G_N ... G_1 M^T = D, a diagonal of ones but for the sign of its last entry, M = D G_N ...
 * G_1: the rotations that clear M^T below its diagonal, column by column, are the chain. They act
 * on rows of M^T, columns of M. */
sq_status
sq_chain_from_matrix(double *matrix, int64_t n, int32_t *pairs, double *angles, int64_t *steps)
{
    if (!matrix || !pairs || !angles || !steps) {
        return SQ_ERR_NULL;
    }
    if (n < 1 || n > SQ_CHAIN_MATRIX_MAX || !is_orthogonal(matrix, n)) {
        return SQ_ERR_RANGE;
    }
    *steps = 0;
    for (int64_t i = 0; i < n; i++) {
        for (int64_t j = i + 1; j < n; j++) {
            const double a = matrix[i * n + i], b = matrix[i * n + j];
            if (b == 0 && a >= 0) { /* a < 0 over zeros takes a half turn */
                continue;
            }
            const double angle = atan2(-b, a), c = cos(angle), s = sin(angle);
            for (int64_t r = i; r < n; r++) { /* above row i both entries are zero already */
                double *row = matrix + r * n;
                const double x = row[i], y = row[j];
                row[i] = c * x - s * y;
                row[j] = s * x + c * y;
            }
            pairs[2 * *steps] = (int32_t)i;
            pairs[2 * *steps + 1] = (int32_t)j;
            angles[(*steps)++] = angle;
        }
    }
    return SQ_OK;
}

/* ---- the uniformity sweep --------------------------------------------------------------- */

/* The rotation of smallest magnitude that minimises sum(a^4 + b^4) = 3/4 sum|z|^4 +
 * 1/4 Re(e^(4 i theta) sum z^4): theta = (pi - arg sum z^4) / 4, modulo pi / 2. With p = a^2 - b^2
 * and q = a b, z^4 = p^2 - 4 q^2 + 4 i p q. */
static double
uniformity_angle(const double *restrict a, const double *restrict b, int64_t rows)
{
    enum { LANES = 4 };
    double pp[LANES] = {0}, qq[LANES] = {0}, pq[LANES] = {0};
    int64_t r = 0;
    for (; r + LANES <= rows; r += LANES) {
        for (int l = 0; l < LANES; l++) {
            const double p = a[r + l] * a[r + l] - b[r + l] * b[r + l], q = a[r + l] * b[r + l];
            pp[l] += p * p;
            qq[l] += q * q;
            pq[l] += p * q;
        }
    }
    for (int l = 0; r < rows; r++, l++) {
        const double p = a[r] * a[r] - b[r] * b[r], q = a[r] * b[r];
        pp[l] += p * p;
        qq[l] += q * q;
        pq[l] += p * q;
    }
    const double re = (pp[0] + pp[2]) + (pp[1] + pp[3]) - 4 * ((qq[0] + qq[2]) + (qq[1] + qq[3]));
    const double im = 4 * ((pq[0] + pq[2]) + (pq[1] + pq[3]));
    if (re == 0 && im == 0) { /* the sum does not depend on the angle */
        return 0;
    }
    const double angle = (SQ_PI - atan2(im, re)) / 4; /* in [0, pi / 2] */
    return angle > SQ_PI / 4 ? angle - SQ_PI / 2 : angle;
}

struct sweep_job {
    double *columns;
    int64_t rows;
    const int32_t *pairs;
    double *angles;
};

static void
sweep_pairs(void *context, int64_t begin, int64_t end, int thread)
{
    const struct sweep_job *job = context;
    (void)thread;
    for (int64_t t = begin; t < end; t++) {
        double *a = job->columns + job->pairs[2 * t] * job->rows;
        double *b = job->columns + job->pairs[2 * t + 1] * job->rows;
        const double angle = uniformity_angle(a, b, job->rows);
        job->angles[t] = angle;
        if (fabs(angle) >= SQ_ANGLE_MIN) {
            rotate_columns(a, b, job->rows, cos(angle), sin(angle));
        }
    }
}

/* Pairs of one round of the circle method for an even number of players: the last one meets
 * `round`, the others meet at equal distances from it. Pairs with a player past n are byes. */
static int64_t
round_pairs(int64_t n, int64_t round, int32_t *pairs)
{
    const int64_t circle = n + n % 2 - 1;
    int64_t count = 0;
    for (int64_t d = 0; d <= circle / 2; d++) {
        int64_t i = (round + d) % circle, j = (round - d + circle) % circle;
        if (d == 0) {
            j = circle;
        }
        if (j < n) { /* only the last player can be missing */
            pairs[2 * count] = (int32_t)sq_min_i64(i, j);
            pairs[2 * count + 1] = (int32_t)sq_max_i64(i, j);
            count++;
        }
    }
    return count;
}

sq_status
sq_uniformity_sweep(double *columns, int64_t n, int64_t rows, int32_t *pairs, double *angles,
                    int64_t *steps)
{
    int64_t count;
    if (!columns || !pairs || !angles || !steps) {
        return SQ_ERR_NULL;
    }
    *steps = 0;
    if (n < 0 || n > INT32_MAX - 1 || rows < 0 || !sq_product(n, rows, &count)) {
        return SQ_ERR_RANGE;
    }
    if (!all_finite(columns, count)) {
        return SQ_ERR_NONFINITE;
    }
    for (int64_t i = 0; i < count; i++) {
        if (fabs(columns[i]) > SQ_SWEEP_ABS_MAX) {
            return SQ_ERR_RANGE;
        }
    }
    if (n < 2) {
        return SQ_OK;
    }
    for (int64_t round = 0; round < n + n % 2 - 1; round++) {
        /* before this round at most its predecessors' pairs are recorded, so its own fit behind */
        struct sweep_job job = {columns, rows, pairs + 2 * *steps, angles + *steps};
        const int64_t met = round_pairs(n, round, pairs + 2 * *steps);
        sq_parallel_for(met, 1, sweep_pairs, &job);
        for (int64_t t = 0; t < met; t++) {
            if (fabs(job.angles[t]) >= SQ_ANGLE_MIN) {
                record(pairs, angles, steps, job.pairs[2 * t], job.pairs[2 * t + 1], job.angles[t]);
            }
        }
    }
    return SQ_OK;
}

/* ---- Kronecker application -------------------------------------------------------------- */

/* A factor of order 1 that leaves its axis as it is. */
static int
is_trivial(const struct sq_factor *f)
{
    return f->order == 1 && (!f->matrix || f->matrix[0] == 1.0f);
}

static sq_status
check_factor(const struct sq_factor *f)
{
    if (f->order < 1 || f->order > INT32_MAX) {
        return SQ_ERR_SHAPE;
    }
    if (f->matrix) {
        return SQ_OK;
    }
    if (f->steps < 0) {
        return SQ_ERR_RANGE;
    }
    if (f->steps && (!f->pairs || !f->cos_sin)) {
        return SQ_ERR_NULL;
    }
    return pairs_in_range(f->pairs, f->steps, f->order) ? SQ_OK : SQ_ERR_RANGE;
}

/* 1 if k = k1 k2 is out of range or m k elements do not fit int64_t bytes. */
static int
sizes_overflow(const struct sq_factor *left, const struct sq_factor *right, int64_t m)
{
    int64_t k, all;
    return m < 0 || !sq_product(left->order, right->order, &k) || k > SQ_ROTATE_K_MAX ||
           !sq_product(m, k, &all) || all > INT64_MAX / 8;
}

/* Where the parts of one worker's scratch lie. */
struct scratch_layout {
    int64_t block; /* rows per block */
    size_t wide_bytes, transform_bytes, block_bytes, total_bytes;
};

/* For at most `rows` rows per block. */
static struct scratch_layout
scratch_layout(const struct sq_factor *left, const struct sq_factor *right, int64_t rows)
{
    const int64_t k = left->order * right->order;
    const int64_t larger = sq_max_i64(left->order, right->order);
    const int chains = !left->matrix || !right->matrix;
    const int64_t most = sq_min_i64(SQ_ROTATE_BLOCK_ROWS, SQ_ROTATE_BLOCK / k);
    struct scratch_layout s = {.block = sq_max_i64(1, sq_min_i64(most, rows))};
    s.wide_bytes = chains ? sq_align_bytes((size_t)k * sizeof(double)) : 0;
    s.transform_bytes = chains ? sq_align_bytes((size_t)(3 * larger) * sizeof(double)) : 0;
    s.block_bytes = sq_align_bytes((size_t)(s.block * k) * sizeof(float));
    s.total_bytes = s.wide_bytes + s.transform_bytes + 2 * s.block_bytes;
    return s;
}

/* Grows with m; a call of fewer rows, or on fewer workers, needs no more. */
size_t
sq_rotate_workspace_bytes(const struct sq_factor *left, const struct sq_factor *right, int64_t m)
{
    if (!left || !right || left->order < 1 || right->order < 1 || sizes_overflow(left, right, m)) {
        return SIZE_MAX / 2;
    }
    return (size_t)sq_min_i64(SQ_ROTATE_WORKERS, m) * scratch_layout(left, right, m).total_bytes;
}

void
sq_transpose(const float *restrict a, int64_t n, float *restrict out)
{
    enum { TILE = 16 };
    for (int64_t i0 = 0; i0 < n; i0 += TILE) {
        for (int64_t j0 = 0; j0 < n; j0 += TILE) {
            for (int64_t i = i0; i < sq_min_i64(i0 + TILE, n); i++) {
                for (int64_t j = j0; j < sq_min_i64(j0 + TILE, n); j++) {
                    out[j * n + i] = a[i * n + j];
                }
            }
        }
    }
}

/* wide [count][order] <- chain(H v) for each row, in float64: a chain may be thousands of steps. */
static void
transform_wide(const struct sq_factor *f, double *wide, int64_t count, double *workspace)
{
    if (f->hadamard) { /* sizes are checked: it cannot fail */
        sq_hadamard_transform(wide, count, f->order, workspace);
    }
    for (int64_t r = 0; r < count; r++) {
        double *v = wide + r * f->order;
        for (int64_t t = 0; t < f->steps; t++) {
            double *a = v + f->pairs[2 * t], *b = v + f->pairs[2 * t + 1];
            const double c = (double)f->cos_sin[2 * t], s = (double)f->cos_sin[2 * t + 1];
            const double va = *a, vb = *b;
            *a = c * va - s * vb;
            *b = s * va + c * vb;
        }
    }
}

/* Everything a block of rows needs; y may be x. */
struct rotate_job {
    const struct sq_kernels *kernels;
    const struct sq_factor *left, *right;
    struct scratch_layout layout;
    const float *x;
    float *y; /* NULL: the rows go to fn */
    sq_rows_fn fn;
    void *context;
    int64_t m;
    char *scratch; /* one layout.total_bytes per worker */
    _Atomic int64_t next;
};

/* out [k1][k2] = L x; out is not x. */
static void
apply_left(const struct rotate_job *job, const float *x, float *out, double *wide,
           double *workspace)
{
    const int64_t k1 = job->left->order, k2 = job->right->order;
    if (is_trivial(job->left)) {
        memcpy(out, x, (size_t)k2 * sizeof *out);
        return;
    }
    if (job->left->matrix) {
        job->kernels->gemm_f32(k1, k2, k1, job->left->matrix, k1, x, k2, out, k2);
        return;
    }
    for (int64_t i = 0; i < k1; i++) {
        for (int64_t j = 0; j < k2; j++) {
            wide[j * k1 + i] = (double)x[i * k2 + j];
        }
    }
    transform_wide(job->left, wide, k2, workspace);
    for (int64_t i = 0; i < k1; i++) {
        for (int64_t j = 0; j < k2; j++) {
            out[i * k2 + j] = (float)wide[j * k1 + i];
        }
    }
}

/* out [rows][k1][k2] = x R^T for a block of rows at once; out is not x. */
static void
apply_right(const struct rotate_job *job, const float *x, int64_t rows, float *out, double *wide,
            double *workspace)
{
    const int64_t k1 = job->left->order, k2 = job->right->order, k = k1 * k2;
    if (is_trivial(job->right)) {
        memcpy(out, x, (size_t)(rows * k) * sizeof *out);
        return;
    }
    if (job->right->matrix) {
        job->kernels->gemm_f32(rows * k1, k2, k2, x, k2, job->right->matrix_t, k2, out, k2);
        return;
    }
    for (int64_t r = 0; r < rows; r++, x += k, out += k) {
        for (int64_t i = 0; i < k; i++) {
            wide[i] = (double)x[i];
        }
        transform_wide(job->right, wide, k1, workspace);
        for (int64_t i = 0; i < k; i++) {
            out[i] = (float)wide[i];
        }
    }
}

static void
rotate_block(const struct rotate_job *job, int64_t block, char *scratch)
{
    const struct scratch_layout *layout = &job->layout;
    const int64_t k = job->left->order * job->right->order, first = block * layout->block;
    const int64_t rows = sq_min_i64(layout->block, job->m - first);
    double *wide = (double *)scratch;
    double *workspace = (double *)(scratch + layout->wide_bytes);
    float *half = (float *)(scratch + layout->wide_bytes + layout->transform_bytes);
    for (int64_t r = 0; r < rows; r++) {
        apply_left(job, job->x + (first + r) * k, half + r * k, wide, workspace);
    }
    float *out = job->y ? job->y + first * k : half + layout->block_bytes / sizeof(float);
    apply_right(job, half, rows, out, wide, workspace);
    if (!job->y) {
        job->fn(job->context, first, rows, out);
    }
}

/* Workers are items, so that their scratch does not depend on who runs them; they draw blocks. */
static void
rotate_worker(void *context, int64_t begin, int64_t end, int thread)
{
    struct rotate_job *job = context;
    const int64_t blocks = sq_ceil_div(job->m, job->layout.block);
    (void)thread;
    for (int64_t worker = begin; worker < end; worker++) {
        char *scratch = job->scratch + (size_t)worker * job->layout.total_bytes;
        for (int64_t b; (b = atomic_fetch_add(&job->next, 1)) < blocks;) {
            rotate_block(job, b, scratch);
        }
    }
}

/* Rows begin .. end - 1 of one token's L X R^T: each needs its own row of L only. */
static void
rotate_strip(void *context, int64_t begin, int64_t end, int thread)
{
    const struct rotate_job *job = context;
    const int64_t k1 = job->left->order, k2 = job->right->order, rows = end - begin;
    float *half = (float *)(void *)job->scratch + begin * k2;
    float *out = half + job->layout.block_bytes / sizeof(float);
    (void)thread;
    job->kernels->gemm_f32(rows, k2, k1, job->left->matrix + begin * k1, k1, job->x, k2, half, k2);
    job->kernels->gemm_f32(rows, k2, k2, half, k2, job->right->matrix_t, k2, out, k2);
}

/* Fewer tokens than threads: the rows of one token at a time are shared out. */
static void
rotate_few(struct rotate_job *job)
{
    const int64_t k1 = job->left->order, k2 = job->right->order, m = job->m;
    const int64_t grain = sq_ceil_div(SQ_STRIP_WORK, k2 * (k1 + k2));
    const float *out = (float *)(void *)(job->scratch + job->layout.block_bytes);
    for (int64_t i = 0; i < m; i++, job->x += k1 * k2) {
        sq_parallel_for(k1, grain, rotate_strip, job);
        job->fn(job->context, i, 1, out);
    }
}

static sq_status
rotate(const struct sq_factor *left, const struct sq_factor *right, const float *x, int64_t m,
       float *y, sq_rows_fn fn, void *context, int64_t workers_max, void *workspace)
{
    if (!left || !right || !x || !workspace || (right->matrix && !right->matrix_t)) {
        return SQ_ERR_NULL;
    }
    SQ_TRY(check_factor(left));
    SQ_TRY(check_factor(right));
    if (sizes_overflow(left, right, m)) {
        return SQ_ERR_RANGE;
    }
    if (m == 0) {
        return SQ_OK;
    }
    const int64_t workers = sq_min_i64(sq_min_i64(sq_get_num_threads(), workers_max), m);
    struct rotate_job job = {.kernels = sq_kernels_active(),
                             .left = left,
                             .right = right,
                             .layout = scratch_layout(left, right, sq_ceil_div(m, workers)),
                             .x = x,
                             .y = y,
                             .fn = fn,
                             .context = context,
                             .m = m,
                             .scratch = workspace};
    if (!y && m < sq_get_num_threads() && left->matrix && right->matrix) {
        rotate_few(&job);
    }
    else {
        sq_parallel_for(workers, 1, rotate_worker, &job);
    }
    return SQ_OK;
}

sq_status
sq_rotate(const struct sq_factor *left, const struct sq_factor *right, const float *x, int64_t m,
          float *y, void *workspace)
{
    return y ? rotate(left, right, x, m, y, NULL, NULL, SQ_ROTATE_WORKERS, workspace) : SQ_ERR_NULL;
}

size_t
sq_rotation_workspace_bytes(const struct sq_rotation *rotation, int64_t k, int64_t m)
{
    switch (rotation ? rotation->kind : SQ_UNROTATED) {
        case SQ_KRONECKER:
            return sq_rotate_workspace_bytes(&rotation->left, &rotation->right, m);
        case SQ_BLOCKS:
            return sq_rotate_blocks_workspace_bytes(k, m);
        default:
            return 0;
    }
}

sq_status
sq_rotate_each(const struct sq_rotation *rotation, const float *x, int64_t m, sq_rows_fn fn,
               void *context, void *workspace)
{
    if (!rotation || !fn) {
        return SQ_ERR_NULL;
    }
    switch (rotation->kind) {
        case SQ_KRONECKER:
            return rotate(&rotation->left, &rotation->right, x, m, NULL, fn, context,
                          SQ_ROTATE_WORKERS, workspace);
        case SQ_BLOCKS:
            return sq_rotate_blocks_each(&rotation->blocks, x, m, fn, context, workspace);
        default:
            return SQ_ERR_RANGE;
    }
}

size_t
sq_rotation_serial_bytes(const struct sq_rotation *rotation, int64_t k, int64_t m)
{
    const struct sq_factor *left = &rotation->left, *right = &rotation->right;
    switch (rotation->kind) {
        case SQ_KRONECKER:
            if (left->order < 1 || right->order < 1 || sizes_overflow(left, right, m)) {
                return SIZE_MAX / 2;
            }
            return scratch_layout(left, right, m).total_bytes;
        case SQ_BLOCKS:
            return sq_rotate_blocks_serial_bytes(k, m);
        default:
            return 0;
    }
}

sq_status
sq_rotate_serially(const struct sq_rotation *rotation, float *x, int64_t m, void *workspace)
{
    switch (rotation->kind) {
        case SQ_KRONECKER:
            return rotate(&rotation->left, &rotation->right, x, m, x, NULL, NULL, 1, workspace);
        case SQ_BLOCKS:
            return sq_rotate_blocks_serially(&rotation->blocks, x, m, workspace);
        default:
            return SQ_OK;
    }
}
