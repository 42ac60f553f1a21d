/* SPDX-License-Identifier: Apache-2.0 */
/* Norms of rows: RMSNorm and LayerNorm. */
#ifndef SQ_NORM_H
#define SQ_NORM_H

#include "runtime/sq_fault.h"

enum sq_norm_kind { SQ_NORM_NONE, SQ_NORM_RMS, SQ_NORM_LAYER };

/* RMS: y = x / sqrt(mean(x^2) + eps) * weight; LAYER: the same of x less its mean, with the mean of
 * its squares about it. Then bias is added where there is one. A family that multiplies by an
 * offset plus the stored weight stores the sum here. */
struct sq_norm {
    enum sq_norm_kind kind;
    float eps;
    int64_t n, rows;     /* row t of x takes row t % rows of weight and bias */
    const float *weight; /* [rows][n] */
    const float *bias;   /* [rows][n] or NULL */
};

/* Proves a norm; name starts the text of a fault. */
sq_status
sq_norm_seal(const struct sq_norm *norm, const char *name, struct sq_fault *fault);

/* The same of a norm that has one weight [n], or is none. */
sq_status
sq_norm_seal_width(const struct sq_norm *norm, int64_t n, const char *name, struct sq_fault *fault);

/* y [m][norm->n] <- norm of the rows of x [m][norm->n]. y may be x. kind is not SQ_NORM_NONE.
 * Parallel over rows; a row's bits depend on that row alone. */
void
sq_norm_rows(const struct sq_norm *norm, const float *x, int64_t m, float *y);

#endif
