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
 * A Cholesky factor is lower times upper, so everything is kept in reverse order: row i of L is the
 * i-th last column to be rounded, L L^T = P H P^T, and columns are rounded from k - 1 down. */
#include "core/sq_internal.h"

#include <math.h>

#include "core/sq_threads.h"
#include "solve/sq_cholesky.h"

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

/* sq_cholesky() in float64, from the upper triangle, which that left alone, and the diagonal. */
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
    const sq_status status = sq_cholesky_double(wide, k);
    for (int64_t i = 0; i < k && status == SQ_OK && !sq_stopped(); i++) {
        for (int64_t j = 0; j <= i; j++) {
            a[i * k + j] = (float)wide[i * k + j];
        }
    }
    free(wide);
    return status;
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
        status = sq_cholesky(a, k);
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
