/* SPDX-License-Identifier: Apache-2.0 */
/* Principal directions of an axis Gram matrix by cyclic Jacobi rotations. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "core/sq_internal.h"
#include "solve/sq_solve.h"

/* A cyclic Jacobi sweep squares the off-diagonal once it is small; 6 to 10 are usual. */
enum { MAX_SWEEPS = 60 };
/* An off-diagonal entry this small beside its two diagonal ones leaves them as they are; one this
 * small beside the whole matrix is rounding noise, which a singular matrix never runs out of. */
#define NEGLIGIBLE 1e-16

/* The rotation that clears a[p][q] of the symmetric a [n][n], by the smaller of its two angles
 * (Golub and Van Loan, 8.5.2); v's rows p and q turn with it. */
static void
jacobi_rotate(double *a, double *v, int64_t n, int64_t p, int64_t q)
{
    const double tau = (a[q * n + q] - a[p * n + p]) / (2 * a[p * n + q]);
    const double t = (tau < 0 ? -1.0 : 1.0) / (fabs(tau) + sqrt(1 + tau * tau));
    const double c = 1 / sqrt(1 + t * t), s = c * t;
    for (int64_t i = 0; i < n; i++) {
        const double x = a[p * n + i], y = a[q * n + i];
        a[p * n + i] = c * x - s * y;
        a[q * n + i] = s * x + c * y;
    }
    for (int64_t i = 0; i < n; i++) {
        const double x = a[i * n + p], y = a[i * n + q];
        a[i * n + p] = c * x - s * y;
        a[i * n + q] = s * x + c * y;
    }
    for (int64_t i = 0; i < n; i++) {
        const double x = v[p * n + i], y = v[q * n + i];
        v[p * n + i] = c * x - s * y;
        v[q * n + i] = s * x + c * y;
    }
}

static double
frobenius_norm(const double *a, int64_t n)
{
    double sum = 0;
    for (int64_t i = 0; i < n * n; i++) {
        sum += a[i] * a[i];
    }
    return sqrt(sum);
}

/* One cyclic sweep; the number of rotations made, or 0 when the call is stopped. */
static int64_t
jacobi_sweep(double *a, double *v, int64_t n)
{
    const double noise = NEGLIGIBLE * frobenius_norm(a, n);
    int64_t count = 0;
    for (int64_t p = 0; p < n; p++) {
        for (int64_t q = p + 1; q < n; q++) {
            const double limit = NEGLIGIBLE * sqrt(fabs(a[p * n + p] * a[q * n + q]));
            if (fabs(a[p * n + q]) > fmax(limit, noise)) {
                if (sq_stopped()) {
                    return 0;
                }
                jacobi_rotate(a, v, n, p, q);
                count++;
            }
        }
    }
    return count;
}

/* Rows of v in the order of falling values; equal values keep their order. */
static void
sort_rows(double *values, double *v, int64_t n, double *row)
{
    for (int64_t i = 0; i < n && !sq_stopped(); i++) {
        int64_t best = i;
        for (int64_t j = i + 1; j < n; j++) {
            best = values[j] > values[best] ? j : best;
        }
        if (best == i) {
            continue;
        }
        const double value = values[best];
        memcpy(row, v + best * n, (size_t)n * sizeof *row);
        memmove(values + i + 1, values + i, (size_t)(best - i) * sizeof *values);
        memmove(v + (i + 1) * n, v + i * n, (size_t)((best - i) * n) * sizeof *v);
        values[i] = value;
        memcpy(v + i * n, row, (size_t)n * sizeof *row);
    }
}

sq_status
sq_symmetric_eigen(const double *matrix, int64_t n, double *vectors, double *values)
{
    if (!matrix || !vectors || !values) {
        return SQ_ERR_NULL;
    }
    if (n < 1 || n > SQ_CHAIN_MATRIX_MAX) {
        return SQ_ERR_RANGE;
    }
    double *a = sq_alloc((size_t)((n + 1) * n) * sizeof *a);
    if (!a) {
        return SQ_ERR_NOMEM;
    }
    double *row = a + n * n;
    double largest = 0;
    for (int64_t i = 0; i < n * n; i++) {
        if (!isfinite(matrix[i])) {
            free(a);
            return SQ_ERR_NONFINITE;
        }
        largest = fmax(largest, fabs(matrix[i]));
    }
    memset(vectors, 0, (size_t)(n * n) * sizeof *vectors);
    for (int64_t i = 0; i < n; i++) { /* over the largest entry: no square can overflow */
        for (int64_t j = 0; j < n; j++) {
            const double sum = matrix[i * n + j] / largest + matrix[j * n + i] / largest;
            a[i * n + j] = largest > 0 ? sum / 2 : 0;
        }
        vectors[i * n + i] = 1;
    }
    for (int sweep = 0; sweep < MAX_SWEEPS && jacobi_sweep(a, vectors, n); sweep++) {
    }
    for (int64_t i = 0; i < n; i++) {
        values[i] = largest * a[i * n + i];
    }
    sort_rows(values, vectors, n, row);
    free(a);
    return SQ_OK;
}

sq_status
sq_principal_directions(const double *gram, int64_t n, double *directions)
{
    if (n < 1 || n > SQ_CHAIN_MATRIX_MAX) {
        return SQ_ERR_RANGE;
    }
    double *values = sq_alloc((size_t)n * sizeof *values);
    const sq_status status =
        values ? sq_symmetric_eigen(gram, n, directions, values) : SQ_ERR_NOMEM;
    free(values);
    return status;
}
