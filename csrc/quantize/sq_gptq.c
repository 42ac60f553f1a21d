/* SPDX-License-Identifier: Apache-2.0 */
/* GPTQ: the Cholesky factor of a Gram matrix (sq_gram.c); sq_gptq_round.c rounds with it.
 *
 * GPTQ (arXiv 2210.17323) rounds column i of W, divides the error by U_ii and subtracts it times
 * U_i,j from every later column j, where U^T U = H^-1, U upper triangular. With R = U^-1, which is
 * upper triangular and H = R R^T, the same values come without any inverse: before column i is
 * rounded it has become
 *     w_i + (sum over earlier j of e_j R_ji) / R_ii,    e_j = w_j - its rounded value,
 * (QuIP, arXiv 2307.13304, theorem 6: GPTQ is LDL feedback). Where a whole group of later columns
 * must be known as GPTQ would have them by then, they are W + T R_GG^-1, T = the sums above.
 *
 * LAPACK factors into lower times upper, so everything is kept in reverse order: row i of L is the
 * i-th last column to be rounded, L L^T = P H P^T, and columns are rounded from k - 1 down. */
#include "core/sq_internal.h"

#include <math.h>
#include <stdatomic.h>

#include "core/sq_blas.h"
#include "core/sq_scratch.h"
#include "core/sq_threads.h"
#include "kernels/sq_kernels.h"
#include "quantize/sq_tiles.h"

enum {
    TILE = 256,
    DEPTH = 512, /* columns of a panel of the factor */
    SQUARE = 16,
    LD_PANEL = DEPTH + SQUARE /* or rows would share cache sets */
};

/* ---- order ------------------------------------------------------------------------------ */

struct ranked {
    float diagonal;
    int32_t index;
};

/* Rising diagonal, since the last row is rounded first; of equals the smaller index goes first,
 * which is to stand last. */
static int
compare_ranked(const void *a, const void *b)
{
    const struct ranked *p = a, *q = b;
    if (p->diagonal != q->diagonal) {
        return p->diagonal < q->diagonal ? -1 : 1;
    }
    return p->index > q->index ? -1 : 1;
}

static sq_status
order_by_diagonal(const float *gram, int64_t k, int32_t *permutation)
{
    struct ranked *ranked = sq_alloc((size_t)k * sizeof *ranked);
    if (!ranked) {
        return SQ_ERR_NOMEM;
    }
    for (int64_t i = 0; i < k; i++) {
        ranked[i] = (struct ranked){gram[i * k + i], (int32_t)i};
    }
    qsort(ranked, (size_t)k, sizeof *ranked, compare_ranked);
    for (int64_t i = 0; i < k; i++) {
        permutation[i] = ranked[i].index;
    }
    free(ranked);
    return SQ_OK;
}

struct permute_job {
    float *gram, *scratch; /* scratch [threads][k] */
    int64_t k;
    const int32_t *permutation;
};

static void
permute_columns(void *context, int64_t begin, int64_t end, int thread)
{
    const struct permute_job *job = context;
    const int64_t k = job->k;
    float *scratch = job->scratch + thread * k;
    for (int64_t r = begin; r < end; r++) {
        float *row = job->gram + r * k;
        memcpy(scratch, row, (size_t)k * sizeof *row);
        for (int64_t c = 0; c < k; c++) {
            row[c] = scratch[job->permutation[c]];
        }
    }
}

/* gram <- P gram P^T in place: columns row by row, then rows along the permutation's cycles. */
static sq_status
permute(float *gram, int64_t k, const int32_t *permutation)
{
    float *scratch = sq_alloc((size_t)(SQ_THREADS_MAX * k) * sizeof *scratch);
    uint8_t *moved = calloc((size_t)k, 1);
    if (!scratch || !moved) {
        free(scratch);
        free(moved);
        return SQ_ERR_NOMEM;
    }
    struct permute_job job = {gram, scratch, k, permutation};
    sq_parallel_for(k, 16, permute_columns, &job);
    const size_t bytes = (size_t)k * sizeof *gram;
    for (int64_t start = 0; start < k && !sq_stopped(); start++) {
        if (moved[start]) {
            continue;
        }
        memcpy(scratch, gram + start * k, bytes);
        int64_t r = start;
        for (; permutation[r] != start && !sq_stopped(); r = permutation[r]) {
            memcpy(gram + r * k, gram + permutation[r] * k, bytes);
            moved[r] = 1;
        }
        memcpy(gram + r * k, scratch, bytes);
        moved[r] = 1;
    }
    free(scratch);
    free(moved);
    return SQ_OK;
}

/* ---- factor ----------------------------------------------------------------------------- */

struct factor_job {
    const struct sq_kernels *kernels;
    float *a;
    int64_t k, pivot; /* first row of the square that was just factored */
    /* The panel's tiles below it, and the same turned: rows as columns. */
    float *panel;  /* [tiles][TILE][LD_PANEL] */
    float *turned; /* [tiles][DEPTH][TILE] */
    atomic_int no_memory;
};

/* Rows of the panel below the square: A_i,p <- A_i,p L_pp^-T, and copies. */
static void
solve_panel(void *context, int64_t begin, int64_t end, int thread)
{
    const struct factor_job *job = context;
    const int64_t k = job->k, p = job->pivot;
    (void)thread;
    for (int64_t t = begin; t < end; t++) {
        const int64_t i = p + DEPTH + t * TILE, rows = sq_min_i64(TILE, k - i);
        float *tile = job->a + i * k + p, *turned = job->turned + t * DEPTH * TILE;
        sq_blas_trsm(1, rows, DEPTH, job->a + p * k + p, k, tile, k);
        for (int64_t r0 = 0; r0 < rows; r0 += SQUARE) {
            const int64_t r1 = sq_min_i64(rows, r0 + SQUARE);
            for (int64_t c = 0; c < DEPTH; c++) {
                for (int64_t r = r0; r < r1; r++) {
                    turned[c * TILE + r] = tile[r * k + c];
                }
            }
            for (int64_t r = r0; r < r1; r++) {
                memcpy(job->panel + (t * TILE + r) * LD_PANEL, tile + r * k, DEPTH * sizeof *tile);
            }
        }
    }
}

/* Tiles of the trailing lower triangle: A_i,j -= A_i,p A_j,p^T. */
static void
update_trailing(void *context, int64_t begin, int64_t end, int thread)
{
    struct factor_job *job = context;
    const int64_t k = job->k, p = job->pivot;
    (void)thread;
    float *product = sq_thread_scratch(TILE * TILE * sizeof *product);
    if (!product) {
        atomic_store(&job->no_memory, 1);
        return;
    }
    for (int64_t t = begin; t < end; t++) {
        int64_t row, column;
        sq_tile_place(t, &row, &column);
        const int64_t i = p + DEPTH + row * TILE, j = p + DEPTH + column * TILE;
        const int64_t ni = sq_min_i64(TILE, k - i), nj = sq_min_i64(TILE, k - j);
        job->kernels->gemm_f32(ni, nj, DEPTH, job->panel + row * TILE * LD_PANEL, LD_PANEL,
                               job->turned + column * DEPTH * TILE, TILE, product, TILE);
        for (int64_t r = 0; r < ni; r++) {
            float *to = job->a + (i + r) * k + j;
            const float *from = product + r * TILE;
            for (int64_t c = 0; c < (i == j ? r + 1 : nj); c++) {
                to[c] -= from[c];
            }
        }
    }
}

/* Lower triangle of a [k][k] <- its Cholesky factor, panel by panel, the trailing tiles updated
 * after each. The upper triangle stays. SQ_OK, also where the call is stopped, SQ_ERR_RANGE when a
 * is not positive definite, or SQ_ERR_NOMEM. */
static sq_status
cholesky(float *a, int64_t k)
{
    const int64_t tiles = sq_ceil_div(k, TILE);
    struct factor_job job = {.kernels = sq_kernels_active(), .a = a, .k = k};
    job.panel = sq_alloc((size_t)(tiles * TILE * LD_PANEL) * sizeof *job.panel);
    job.turned = sq_alloc((size_t)(tiles * TILE * DEPTH) * sizeof *job.turned);
    sq_status status = job.panel && job.turned ? SQ_OK : SQ_ERR_NOMEM;
    for (; job.pivot < k && status == SQ_OK && !sq_stopped(); job.pivot += DEPTH) {
        const int64_t size = sq_min_i64(DEPTH, k - job.pivot);
        if (sq_blas_potrf(size, a + job.pivot * (k + 1), k)) {
            status = SQ_ERR_RANGE;
            break;
        }
        const int64_t below = sq_ceil_div(k - job.pivot - size, TILE);
        sq_parallel_for(below, 1, solve_panel, &job);
        sq_parallel_for(sq_tiles(below), 1, update_trailing, &job);
        status = atomic_load(&job.no_memory) ? SQ_ERR_NOMEM : SQ_OK;
    }
    free(job.panel);
    free(job.turned);
    return status;
}

struct double_job {
    double *a;
    int64_t k, pivot;
};

static void
solve_panel_double(void *context, int64_t begin, int64_t end, int thread)
{
    const struct double_job *job = context;
    const int64_t k = job->k, p = job->pivot;
    (void)thread;
    for (int64_t t = begin; t < end; t++) {
        const int64_t i = p + (t + 1) * TILE;
        sq_blas_trsm_double(sq_min_i64(TILE, k - i), TILE, job->a + p * k + p, job->a + i * k + p,
                            k);
    }
}

/* Tiles on the diagonal are updated whole: nothing reads what is above it. */
static void
update_trailing_double(void *context, int64_t begin, int64_t end, int thread)
{
    const struct double_job *job = context;
    const int64_t k = job->k, p = job->pivot;
    (void)thread;
    for (int64_t t = begin; t < end; t++) {
        int64_t i, j;
        sq_tile_place(t, &i, &j);
        i = p + (i + 1) * TILE;
        j = p + (j + 1) * TILE;
        sq_blas_gemm_sub_double(sq_min_i64(TILE, k - i), sq_min_i64(TILE, k - j), TILE,
                                job->a + i * k + p, job->a + j * k + p, job->a + i * k + j, k);
    }
}

/* cholesky() of float64; the upper triangle is spoiled. */
static int
factor_double(double *a, int64_t k)
{
    struct double_job job = {a, k, 0};
    for (; job.pivot < k && !sq_stopped(); job.pivot += TILE) {
        const int64_t size = sq_min_i64(TILE, k - job.pivot);
        if (sq_blas_potrf_double(size, a + job.pivot * (k + 1), k)) {
            return 1;
        }
        const int64_t below = sq_ceil_div(k - job.pivot - size, TILE);
        sq_parallel_for(below, 1, solve_panel_double, &job);
        sq_parallel_for(sq_tiles(below), 1, update_trailing_double, &job);
    }
    return 0;
}

/* The same in float64, from the upper triangle that cholesky() left alone and the diagonal. */
static sq_status
cholesky_double(float *a, int64_t k, const float *diagonal)
{
    double *wide = sq_alloc((size_t)(k * k) * sizeof *wide);
    if (!wide) {
        return SQ_ERR_NOMEM;
    }
    for (int64_t i = 0; i < k && !sq_stopped(); i++) {
        for (int64_t j = 0; j < i; j++) {
            wide[i * k + j] = a[j * k + i];
        }
        wide[i * k + i] = diagonal[i];
    }
    const int failed = factor_double(wide, k);
    for (int64_t i = 0; i < k && !failed && !sq_stopped(); i++) {
        for (int64_t j = 0; j <= i; j++) {
            a[i * k + j] = (float)wide[i * k + j];
        }
    }
    free(wide);
    return failed ? SQ_ERR_RANGE : SQ_OK;
}

/* Adds damping * mean to the diagonal and copies it out; where all of an input is zero, and nothing
 * is added, 1 stands in for it. */
static sq_status
damp(float *a, int64_t k, float damping, float *diagonal)
{
    double sum = 0.0;
    for (int64_t i = 0; i < k; i++) {
        sum += a[i * (k + 1)];
    }
    const double added = damping * (sum / (double)k);
    for (int64_t i = 0; i < k; i++) {
        float *value = a + i * (k + 1);
        *value = (float)(*value + added);
        *value = *value == 0.0f ? 1.0f : *value;
        diagonal[i] = *value;
    }
    return sq_all_finite(diagonal, k) ? SQ_OK : SQ_ERR_NONFINITE;
}

int
sq_gptq_factor_usable(const float *factor, int64_t k)
{
    for (int64_t i = 0; i < k; i++) {
        if (!isnormal(factor[i * (k + 1)]) || factor[i * (k + 1)] < 0.0f) {
            return 0;
        }
    }
    return 1;
}

static sq_status
factor_in_place(float *a, int64_t k, float damping)
{
    float *diagonal = sq_alloc((size_t)k * sizeof *diagonal);
    if (!diagonal) {
        return SQ_ERR_NOMEM;
    }
    sq_status status = damp(a, k, damping, diagonal);
    if (status == SQ_OK) {
        status = cholesky(a, k);
        status = status == SQ_ERR_RANGE ? cholesky_double(a, k, diagonal) : status;
    }
    free(diagonal);
    SQ_TRY(sq_stop_status());
    if (status == SQ_OK && !sq_gptq_factor_usable(a, k)) {
        status = SQ_ERR_RANGE;
    }
    for (int64_t i = 0; i < k && status == SQ_OK; i++) {
        memset(a + i * k + i + 1, 0, (size_t)(k - i - 1) * sizeof *a);
    }
    return status;
}

static void
reverse(float *x, int64_t count)
{
    for (int64_t i = 0, j = count - 1; i < j && (i % SQ_STOP_STEP || !sq_stopped()); i++, j--) {
        const float swap = x[i];
        x[i] = x[j];
        x[j] = swap;
    }
}

sq_status
sq_gptq_factor(float *gram, int64_t k, float damping, int by_diagonal, int32_t *permutation)
{
    if (!gram || !permutation) {
        return SQ_ERR_NULL;
    }
    if (k < 1 || k > SQ_GPTQ_K_MAX || !(damping >= 0.0f) || !isfinite(damping)) {
        return SQ_ERR_RANGE;
    }
    if (!sq_all_finite(gram, k * k)) {
        return SQ_ERR_NONFINITE;
    }
    if (by_diagonal) {
        SQ_TRY(order_by_diagonal(gram, k, permutation));
        SQ_TRY(permute(gram, k, permutation));
    }
    else { /* P reverses: so does the flat array */
        reverse(gram, k * k);
        for (int64_t i = 0; i < k; i++) {
            permutation[i] = (int32_t)(k - 1 - i);
        }
    }
    return factor_in_place(gram, k, damping);
}
