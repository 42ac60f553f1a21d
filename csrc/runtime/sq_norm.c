/* SPDX-License-Identifier: Apache-2.0 */
/* Norms of rows. RMSNorm is a kernel of the table; LayerNorm is one loop for all tables. */
#include "runtime/sq_norm.h"

#include <math.h>

#include "core/sq_internal.h"
#include "core/sq_threads.h"
#include "kernels/sq_kernels.h"
#include "runtime/sq_rows.h"

enum { LANES = 8 }; /* chains of a sum, in a fixed order */

struct norm_job {
    const struct sq_kernels *kernels;
    const struct sq_norm *norm;
    const float *x;
    float *y;
};

static double
sum_of_lanes(const double lane[LANES])
{
    return ((lane[0] + lane[4]) + (lane[2] + lane[6])) +
           ((lane[1] + lane[5]) + (lane[3] + lane[7]));
}

/* In float64, the mean first: the squares about it lose nothing to a large mean. */
static void
layer_norm_row(const float *x, const float *weight, int64_t n, float eps, float *y)
{
    double sums[LANES] = {0}, squares[LANES] = {0};
    for (int64_t i = 0; i < n; i++) {
        sums[i % LANES] += x[i];
    }
    const double mean = sum_of_lanes(sums) / (double)n;
    for (int64_t i = 0; i < n; i++) {
        const double d = x[i] - mean;
        squares[i % LANES] += d * d;
    }
    const double inv_deviation = 1.0 / sqrt(sum_of_lanes(squares) / (double)n + eps);
    for (int64_t i = 0; i < n; i++) {
        y[i] = (float)((x[i] - mean) * inv_deviation) * weight[i];
    }
}

static void
norm_rows(void *context, int64_t begin, int64_t end, int thread)
{
    const struct norm_job *j = context;
    const struct sq_norm *norm = j->norm;
    (void)thread;
    for (int64_t t = begin; t < end; t++) {
        const int64_t n = norm->n, at = t % norm->rows * n;
        const float *x = j->x + t * n, *weight = norm->weight + at;
        float *y = j->y + t * n;
        if (norm->kind == SQ_NORM_RMS) {
            j->kernels->rms_norm_row(x, weight, n, norm->eps, y);
        }
        else {
            layer_norm_row(x, weight, n, norm->eps, y);
        }
        for (int64_t i = 0; norm->bias && i < n; i++) {
            y[i] += norm->bias[at + i];
        }
    }
}

sq_status
sq_norm_seal(const struct sq_norm *norm, const char *name, struct sq_fault *fault)
{
    if (norm->kind == SQ_NORM_NONE) {
        return SQ_OK;
    }
    if (norm->kind != SQ_NORM_RMS && norm->kind != SQ_NORM_LAYER) {
        return sq_refuse(fault, SQ_ERR_RANGE, -1, "%s: unknown kind %d", name, (int)norm->kind);
    }
    if (norm->n < 1 || norm->rows < 1) {
        return sq_refuse(fault, SQ_ERR_SHAPE, -1,
                         "%s: expected a weight [rows][n], got [%lld][%lld]", name,
                         (long long)norm->rows, (long long)norm->n);
    }
    if (!norm->weight) {
        return sq_refuse(fault, SQ_ERR_NULL, -1, "%s: expected a weight, got none", name);
    }
    if (!(norm->eps >= 0 && norm->eps < INFINITY)) {
        return sq_refuse(fault, SQ_ERR_RANGE, -1, "%s: eps: expected at least 0, got %g", name,
                         (double)norm->eps);
    }
    return SQ_OK;
}

sq_status
sq_norm_seal_width(const struct sq_norm *norm, int64_t n, const char *name, struct sq_fault *fault)
{
    SQ_TRY(sq_norm_seal(norm, name, fault));
    if (norm->kind == SQ_NORM_NONE || (norm->n == n && norm->rows == 1)) {
        return SQ_OK;
    }
    return sq_refuse(fault, SQ_ERR_SHAPE, -1, "%s: expected a norm of %lld, got [%lld][%lld]", name,
                     (long long)n, (long long)norm->rows, (long long)norm->n);
}

void
sq_norm_rows(const struct sq_norm *norm, const float *x, int64_t m, float *y)
{
    SQ_ASSERT(norm->kind == SQ_NORM_RMS || norm->kind == SQ_NORM_LAYER);
    struct norm_job j = {.kernels = sq_kernels_active(), .norm = norm, .x = x, .y = y};
    sq_parallel_for(m, sq_row_grain(norm->n), norm_rows, &j);
}
