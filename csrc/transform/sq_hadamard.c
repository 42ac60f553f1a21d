/* SPDX-License-Identifier: Apache-2.0 */
/* Factor sizes, and an orthonormal near-flat matrix of every order with its fast transform.
 *
 * The matrix of order n = 2^s * odd is core kron Sylvester(n / core), over sqrt(n). The core is
 *   1                 when odd = 1;
 *   Paley's matrix    of the smallest order p = odd * 2^r <= SQ_PALEY_MAX, 2 <= r <= s, for which
 *                     q = p - 1 is prime (construction I; p = 0 mod 4 makes q = 3 mod 4) or, tried
 *                     next, q = p / 2 - 1 is prime and r = 2 (construction II; p = 4 mod 8 makes
 *                     q = 1 mod 4); prime powers are left out;
 *   Hartley's matrix  cas(2 pi i j / odd), cas = cos + sin, otherwise: its entries are at most
 *                     sqrt(2) times a flat one.
 * The smallest core leaves the largest power of two to the O(n log n) part; the core costs O(n
 * core), which is why Paley orders end at SQ_PALEY_MAX (and Hartley takes over with its smaller
 * core). R. E. A. C. Paley, "On orthogonal matrices", 1933; R. N. Bracewell, "Discrete Hartley
 * transform", 1983. */
#include <math.h>
#include <string.h>

#include "core/sq_internal.h"
#include "core/sq_threads.h"

#define SQ_PALEY_MAX 1024
/* Elements of one chunk of rows in the parallel loop. */
#define SQ_TRANSFORM_GRAIN 16384
#define SQ_TWO_PI 6.283185307179586476925286766559

/* ---- factor sizes ----------------------------------------------------------------------- */

/* Among k2 = base * 2^i that divide k, the one with the smallest larger factor (the product is
 * fixed, so also the smallest ratio); ties go to the larger k2. Returns 0 if base does not divide
 * k. */
static int64_t
nearest_factor(int64_t k, int64_t base)
{
    int64_t best = 0;
    for (int64_t k2 = base; k % k2 == 0; k2 *= 2) {
        if (!best || sq_max_i64(k2, k / k2) <= sq_max_i64(best, k / best)) {
            best = k2;
        }
        if (k2 > k / 2) { /* the next one cannot divide, and might overflow */
            break;
        }
    }
    return best;
}

sq_status
sq_factor_sizes(int64_t k, int64_t *k1, int64_t *k2)
{
    if (!k1 || !k2) {
        return SQ_ERR_NULL;
    }
    if (k < 1) {
        return SQ_ERR_RANGE;
    }
    int64_t best = nearest_factor(k, 1);
    int64_t best_max = sq_max_i64(best, k / best);
    /* halved at least: 2 * other_max <= best_max, without the overflow */
    const int64_t limit = best_max / 2;
    static const int64_t bases[] = {12, 20};
    for (int b = 0; b < 2; b++) {
        const int64_t other = nearest_factor(k, bases[b]);
        if (!other) {
            continue;
        }
        const int64_t other_max = sq_max_i64(other, k / other);
        if (other_max <= limit && other_max < best_max) {
            best = other;
            best_max = other_max;
        }
    }
    *k1 = k / best;
    *k2 = best;
    return SQ_OK;
}

/* ---- which matrix ----------------------------------------------------------------------- */

enum core_kind { CORE_ONE, CORE_PALEY1, CORE_PALEY2, CORE_HARTLEY };

struct plan {
    enum core_kind kind;
    int64_t core;  /* order of the core */
    int64_t width; /* order of the Sylvester part, n / core */
    int64_t
        table; /* entries of the core's table: q values of the character, or odd values of cas */
};

static int
is_prime(int64_t n)
{
    if (n < 2) {
        return 0;
    }
    for (int64_t d = 2; d * d <= n; d++) {
        if (n % d == 0) {
            return 0;
        }
    }
    return 1;
}

static struct plan
make_plan(int64_t n)
{
    const int64_t two = n & -n, odd = n / two;
    if (odd == 1) {
        return (struct plan){CORE_ONE, 1, n, 0};
    }
    for (int64_t r = 4; r <= two && odd <= SQ_PALEY_MAX / r; r *= 2) {
        const int64_t p = odd * r;
        if (is_prime(p - 1)) {
            return (struct plan){CORE_PALEY1, p, n / p, p - 1};
        }
        if (r == 4 && is_prime(p / 2 - 1)) {
            return (struct plan){CORE_PALEY2, p, n / p, p / 2 - 1};
        }
    }
    return (struct plan){CORE_HARTLEY, odd, two, odd};
}

/* The quadratic character of Z_q (0 at 0, +1 on squares, -1 elsewhere), or cas(2 pi t / odd). */
static void
fill_table(const struct plan *plan, double *table)
{
    const int64_t q = plan->table;
    if (plan->kind == CORE_HARTLEY) {
        for (int64_t t = 0; t < q; t++) {
            const double angle = SQ_TWO_PI * (double)t / (double)q;
            table[t] = cos(angle) + sin(angle);
        }
        return;
    }
    for (int64_t t = 0; t < q; t++) {
        table[t] = -1.0;
    }
    table[0] = 0.0;
    for (int64_t t = 1; t < q; t++) {
        table[t * t % q] = 1.0;
    }
}

/* Paley's bordered Jacobsthal matrix of order q + 1 off its diagonal: 1 in the first row, border in
 * the first column, chi(i - j) elsewhere. */
static inline double
bordered(const double *chi, int64_t q, double border, int64_t i, int64_t j)
{
    if (i == 0) {
        return 1.0;
    }
    if (j == 0) {
        return border;
    }
    return chi[i >= j ? i - j : i - j + q];
}

/* Paley's core entry (i, j): I: I + S, S skew. II: C kron [[1, 1], [1, -1]] + I kron
 * [[1, -1], [-1, -1]], C symmetric with a zero diagonal. */
static inline double
paley_entry(const struct plan *plan, const double *chi, int64_t i, int64_t j)
{
    if (plan->kind == CORE_PALEY1) {
        return i == j ? 1.0 : bordered(chi, plan->table, -1.0, i, j);
    }
    if (i / 2 == j / 2) {
        return i % 2 || j % 2 ? -1.0 : 1.0;
    }
    const double c = bordered(chi, plan->table, 1.0, i / 2, j / 2);
    return i % 2 && j % 2 ? -c : c;
}

static double
core_entry(const struct plan *plan, const double *table, int64_t i, int64_t j)
{
    switch (plan->kind) {
        case CORE_ONE:
            return 1.0;
        case CORE_HARTLEY:
            return table[i * j % plan->core];
        case CORE_PALEY1:
        case CORE_PALEY2:
            break;
    }
    return paley_entry(plan, table, i, j);
}

/* Orders are axis lengths, and the chains that follow index them with int32_t. With n in 31 bits
 * the products i * j and t * t above stay inside 62 bits. */
#define SQ_HADAMARD_MAX INT32_MAX
_Static_assert((int64_t)SQ_HADAMARD_MAX <= INT64_MAX / SQ_HADAMARD_MAX, "i * j fits int64_t");

sq_status
sq_hadamard_matrix(int64_t n, double *h)
{
    if (!h) {
        return SQ_ERR_NULL;
    }
    if (n < 1 || n > SQ_HADAMARD_MAX) {
        return SQ_ERR_RANGE;
    }
    const struct plan plan = make_plan(n);
    double *table = sq_alloc((size_t)plan.table * sizeof *table);
    if (!table) {
        return SQ_ERR_NOMEM;
    }
    fill_table(&plan, table);
    const double scale = 1.0 / sqrt((double)n);
    for (int64_t i = 0; i < n; i++) {
        for (int64_t j = 0; j < n; j++) {
            const double core = core_entry(&plan, table, i / plan.width, j / plan.width);
            const int64_t common = (i % plan.width) & (j % plan.width);
            h[i * n + j] = (__builtin_parityll((uint64_t)common) ? -core : core) * scale;
        }
    }
    free(table);
    return SQ_OK;
}

/* ---- the fast transform ----------------------------------------------------------------- */

/* x [n] <- Sylvester(n) x without the scale; n is a power of two. Two stages at a time while they
 * fit: half the loads and stores. */
static void
sylvester(double *x, int64_t n)
{
    int64_t h = 1;
    for (; 4 * h <= n; h *= 4) {
        for (int64_t i = 0; i < n; i += 4 * h) {
            double *restrict p = x + i, *restrict q = p + h, *restrict r = q + h,
                             *restrict s = r + h;
            for (int64_t j = 0; j < h; j++) {
                const double a = p[j] + q[j], b = p[j] - q[j];
                const double c = r[j] + s[j], d = r[j] - s[j];
                p[j] = a + c;
                q[j] = b + d;
                r[j] = a - c;
                s[j] = b - d;
            }
        }
    }
    if (h < n) {
        double *restrict p = x, *restrict q = x + h;
        for (int64_t j = 0; j < h; j++) {
            const double a = p[j], b = q[j];
            p[j] = a + b;
            q[j] = a - b;
        }
    }
}

static inline void
add_scaled(double *restrict y, double scale, const double *restrict x, int64_t n)
{
    for (int64_t i = 0; i < n; i++) {
        y[i] += scale * x[i];
    }
}

/* Row i of the core. */
static void
core_row(const struct plan *plan, const double *table, int64_t i, double *row)
{
    if (plan->kind == CORE_HARTLEY) {
        int64_t t = 0; /* i * j mod core, exactly */
        for (int64_t j = 0; j < plan->core; j++) {
            row[j] = table[t];
            t += i;
            t -= t >= plan->core ? plan->core : 0;
        }
        return;
    }
    for (int64_t j = 0; j < plan->core; j++) {
        row[j] = paley_entry(plan, table, i, j);
    }
}

/* y [width] = row [p] x [p][width] for widths too short for vectors of their own: four partial
 * sums. */
static inline void
mix_narrow(const double *restrict row, const double *restrict x, int64_t p, int width,
           double *restrict y)
{
    enum { LANES = 4, WIDTH_MAX = 2 };
    double sum[LANES][WIDTH_MAX] = {{0}};
    int64_t j = 0;
    for (; j + LANES <= p; j += LANES) {
        for (int l = 0; l < LANES; l++) {
            for (int c = 0; c < width; c++) {
                sum[l][c] += row[j + l] * x[(j + l) * width + c];
            }
        }
    }
    for (int l = 0; j < p; j++, l++) {
        for (int c = 0; c < width; c++) {
            sum[l][c] += row[j] * x[j * width + c];
        }
    }
    for (int c = 0; c < width; c++) {
        y[c] = (sum[0][c] + sum[2][c]) + (sum[1][c] + sum[3][c]);
    }
}

/* out [core][width] = core matrix times x [core][width]; row [core] is scratch. */
static void
mix_core(const struct plan *plan, const double *table, const double *x, double *row, double *out)
{
    const int64_t p = plan->core, width = plan->width;
    for (int64_t i = 0; i < p; i++, out += width) {
        core_row(plan, table, i, row);
        if (width == 1) {
            mix_narrow(row, x, p, 1, out);
        }
        else if (width == 2) {
            mix_narrow(row, x, p, 2, out);
        }
        else {
            memset(out, 0, (size_t)width * sizeof *out);
            for (int64_t j = 0; j < p; j++) {
                add_scaled(out, row[j], x + j * width, width);
            }
        }
    }
}

struct transform_job {
    double *x;
    int64_t n;
    double scale;
};

static void
sylvester_rows(void *context, int64_t begin, int64_t end, int thread)
{
    const struct transform_job *job = context;
    (void)thread;
    for (int64_t row = begin; row < end; row++) {
        double *x = job->x + row * job->n;
        sylvester(x, job->n);
        for (int64_t i = 0; i < job->n; i++) {
            x[i] *= job->scale;
        }
    }
}

sq_status
sq_hadamard_transform(double *x, int64_t rows, int64_t n, double *workspace)
{
    int64_t count;
    if (!x || !workspace) {
        return SQ_ERR_NULL;
    }
    if (n < 1 || n > SQ_HADAMARD_MAX || rows < 0) {
        return SQ_ERR_RANGE;
    }
    if (!sq_product(rows, n, &count)) {
        return SQ_ERR_RANGE;
    }
    const struct plan plan = make_plan(n);
    const double scale = 1.0 / sqrt((double)n);
    if (plan.kind == CORE_ONE) {
        struct transform_job job = {x, n, scale};
        sq_parallel_for(rows, sq_max_i64(1, SQ_TRANSFORM_GRAIN / n), sylvester_rows, &job);
        return SQ_OK;
    }
    double *table = workspace, *coefficients = workspace + n, *out = workspace + 2 * n;
    fill_table(&plan, table);
    for (int64_t row = 0; row < rows && !sq_stopped(); row++, x += n) {
        for (int64_t block = 0; block < plan.core; block++) {
            sylvester(x + block * plan.width, plan.width);
        }
        mix_core(&plan, table, x, coefficients, out);
        for (int64_t i = 0; i < n; i++) {
            x[i] = scale * out[i];
        }
    }
    return SQ_OK;
}
