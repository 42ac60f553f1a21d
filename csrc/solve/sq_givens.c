/* SPDX-License-Identifier: Apache-2.0 */
/* Givens angles: ART, URT, uniformity sweeps, and the chain of a matrix.
 *
 * Source: Ji et al., "SingleQuant: Efficient Quantization of Large Language Models in a Single
 * Pass", arXiv 2511.22316. With z = v_i + i v_j a rotation by theta is z <- e^(i theta) z. */
#include <math.h>
#include <string.h>

#include "core/sq_internal.h"
#include "core/sq_threads.h"
#include "kernels/sq_kernels.h"

#define SQ_PI 3.1415926535897932384626433832795
/* Rotations by less are not worth recording: they move a pair by less than the tests can see. */
#define SQ_ANGLE_MIN 1e-12
/* Fourth powers of larger values, summed over rows and columns, could overflow: (2^200)^4 = 2^800
 * leaves a factor of 2^224 for the sums. */
#define SQ_SWEEP_ABS_MAX 0x1p200

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
    if (!sq_all_finite_f64(v, n)) {
        return SQ_ERR_NONFINITE;
    }
    if (n < 2) {
        return SQ_OK;
    }
    const double median =
        ranked_magnitude(v, n, (n - 1) / 2) / 2 + ranked_magnitude(v, n, n / 2) / 2;
    while (*steps < max_steps && !sq_stopped()) {
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

/* peaks [n]: each column's largest magnitude, kept up to date for the two columns a step touches. A
 * step that would not lower its pair's peak is not made. */
static void
art_columns(double *columns, int64_t n, int64_t rows, int64_t max_steps, double *peaks,
            int32_t *pairs, double *angles, int64_t *steps)
{
    const struct sq_kernels *kernels = sq_kernels_active();
    for (int64_t i = 0; i < n; i++) {
        peaks[i] = column_peak(columns + i * rows, rows);
    }
    while (*steps < max_steps && !sq_stopped()) {
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
        kernels->rotate_pairs(a, b, rows, c, s);
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
    if (!sq_all_finite_f64(columns, count)) {
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
    if (!sq_all_finite_f64(v, n) || !sq_all_finite_f64(u, n)) {
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
    for (int64_t i = 0; i < n && !sq_stopped(); i++) {
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
        for (int64_t j = i + 1; j < n && !sq_stopped(); j++) {
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
uniformity_angle(const struct sq_kernels *kernels, const double *a, const double *b, int64_t rows)
{
    const struct sq_pair_sums sums = kernels->sum_pairs(a, b, rows);
    const double re = sums.pp - 4 * sums.qq, im = 4 * sums.pq;
    if (re == 0 && im == 0) { /* the sum does not depend on the angle */
        return 0;
    }
    const double angle = (SQ_PI - atan2(im, re)) / 4; /* in [0, pi / 2] */
    return angle > SQ_PI / 4 ? angle - SQ_PI / 2 : angle;
}

struct sweep_job {
    const struct sq_kernels *kernels;
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
        const double angle = uniformity_angle(job->kernels, a, b, job->rows);
        job->angles[t] = angle;
        if (fabs(angle) >= SQ_ANGLE_MIN) {
            job->kernels->rotate_pairs(a, b, job->rows, cos(angle), sin(angle));
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
    if (!sq_all_finite_f64(columns, count)) {
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
    for (int64_t round = 0; round < n + n % 2 - 1 && !sq_stopped(); round++) {
        /* before this round at most its predecessors' pairs are recorded, so its own fit behind */
        struct sweep_job job = {sq_kernels_active(), columns, rows, pairs + 2 * *steps,
                                angles + *steps};
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
