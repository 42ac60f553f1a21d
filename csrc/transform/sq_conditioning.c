/* SPDX-License-Identifier: Apache-2.0 */
/* How far matrices are from singular. */
#include <math.h>
#include <stdatomic.h>
#include <stdlib.h>

#include "core/sq_internal.h"
#include "core/sq_threads.h"

struct pivot_job {
    const float *matrices; /* [count][n][n] */
    int64_t n;
    double *ratios; /* [count] */
    atomic_int no_memory;
};

static void
swap_rows(double *a, int64_t n, int64_t i, int64_t j)
{
    for (int64_t c = 0; c < n && i != j; c++) {
        const double value = a[i * n + c];
        a[i * n + c] = a[j * n + c];
        a[j * n + c] = value;
    }
}

/* The quotient of the largest and the smallest pivot of a [n][n], which is spoiled. */
static double
eliminate(double *a, int64_t n)
{
    double largest = 0, smallest = INFINITY;
    for (int64_t p = 0; p < n && !sq_stopped(); p++) {
        int64_t best = p;
        for (int64_t i = p + 1; i < n; i++) {
            best = fabs(a[i * n + p]) > fabs(a[best * n + p]) ? i : best;
        }
        const double pivot = fabs(a[best * n + p]);
        largest = fmax(largest, pivot);
        smallest = fmin(smallest, pivot);
        if (!(pivot > 0)) {
            return INFINITY;
        }
        swap_rows(a, n, p, best);
        for (int64_t i = p + 1; i < n; i++) {
            const double factor = a[i * n + p] / a[p * n + p];
            for (int64_t c = p + 1; c < n; c++) {
                a[i * n + c] -= factor * a[p * n + c];
            }
        }
    }
    return largest / smallest;
}

static void
eliminate_each(void *context, int64_t begin, int64_t end, int thread)
{
    struct pivot_job *job = context;
    const int64_t size = job->n * job->n;
    double *a = sq_alloc((size_t)size * sizeof *a);
    (void)thread;
    if (!a) {
        atomic_store(&job->no_memory, 1);
        return;
    }
    for (int64_t item = begin; item < end; item++) {
        const float *matrix = job->matrices + item * size;
        if (!sq_all_finite(matrix, size)) {
            job->ratios[item] = NAN;
            continue;
        }
        for (int64_t i = 0; i < size; i++) {
            a[i] = (double)matrix[i];
        }
        job->ratios[item] = eliminate(a, job->n);
    }
    free(a);
}

sq_status
sq_pivot_ratio(const float *matrices, int64_t count, int64_t n, double *ratio)
{
    int64_t elements;
    if (!matrices || !ratio) {
        return SQ_ERR_NULL;
    }
    if (count < 0 || n < 1 || n > INT32_MAX || !sq_product(n * n, count, &elements)) {
        return SQ_ERR_RANGE;
    }
    struct pivot_job job = {.matrices = matrices, .n = n};
    job.ratios = sq_alloc((size_t)count * sizeof *job.ratios);
    if (!job.ratios) {
        return SQ_ERR_NOMEM;
    }
    sq_parallel_for(count, 1, eliminate_each, &job);
    *ratio = 1;
    for (int64_t i = 0; i < count && !atomic_load(&job.no_memory) && !isnan(*ratio); i++) {
        *ratio = job.ratios[i] > *ratio || isnan(job.ratios[i]) ? job.ratios[i] : *ratio;
    }
    free(job.ratios);
    return atomic_load(&job.no_memory) ? SQ_ERR_NOMEM : SQ_OK;
}
