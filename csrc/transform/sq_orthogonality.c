/* SPDX-License-Identifier: Apache-2.0 */
/* How far matrices are from orthogonal. */
#include <math.h>
#include <stdatomic.h>
#include <stdlib.h>

#include "core/sq_blas.h"
#include "core/sq_internal.h"
#include "core/sq_threads.h"

/* Rows of M whose products with M are made at a time to prove it orthogonal. */
#define SQ_PROOF_ROWS 64

struct proof_job {
    const float *matrices; /* [count][n][n] */
    int64_t n, strips;     /* strips of SQ_PROOF_ROWS rows in a matrix */
    float *errors;         /* [count * strips] */
    atomic_int no_memory;
};

/* Rows first .. first + rows - 1 of M M^T, up to the diagonal. */
static void
prove_strips(void *context, int64_t begin, int64_t end, int thread)
{
    struct proof_job *job = context;
    const int64_t n = job->n;
    float *products = sq_alloc((size_t)(SQ_PROOF_ROWS * n) * sizeof *products);
    (void)thread;
    if (!products) {
        atomic_store(&job->no_memory, 1);
        return;
    }
    for (int64_t item = begin; item < end; item++) {
        const float *m = job->matrices + item / job->strips * n * n;
        const int64_t first = item % job->strips * SQ_PROOF_ROWS;
        const int64_t rows = sq_min_i64(SQ_PROOF_ROWS, n - first), columns = first + rows;
        float error = 0;
        sq_blas_gemm_nt(rows, columns, n, m + first * n, n, m, n, products, columns);
        for (int64_t i = 0; i < rows; i++) {
            products[i * columns + first + i] -= 1;
        }
        for (int64_t i = 0; i < rows * columns; i++) {
            const float e = fabsf(products[i]);
            error = e > error || isnan(e) ? e : error;
            if (isnan(error)) {
                break;
            }
        }
        job->errors[item] = error;
    }
    free(products);
}

sq_status
sq_orthogonality_error(const float *matrices, int64_t count, int64_t n, float *error)
{
    int64_t elements;
    if (!matrices || !error) {
        return SQ_ERR_NULL;
    }
    if (count < 0 || n < 1 || n > INT32_MAX / SQ_PROOF_ROWS ||
        !sq_product(n * n, count, &elements)) {
        return SQ_ERR_RANGE;
    }
    const int64_t strips = sq_ceil_div(n, SQ_PROOF_ROWS), items = count * strips;
    struct proof_job job = {.matrices = matrices, .n = n, .strips = strips};
    job.errors = sq_alloc((size_t)items * sizeof *job.errors);
    if (!job.errors) {
        return SQ_ERR_NOMEM;
    }
    sq_parallel_for(items, 1, prove_strips, &job);
    *error = 0;
    for (int64_t i = 0; i < items && !atomic_load(&job.no_memory) && !isnan(*error); i++) {
        *error = job.errors[i] > *error || isnan(job.errors[i]) ? job.errors[i] : *error;
    }
    free(job.errors);
    return atomic_load(&job.no_memory) ? SQ_ERR_NOMEM : SQ_OK;
}
