/* SPDX-License-Identifier: Apache-2.0 */
/* Cholesky factors and triangular systems. No library of the machine takes part: the sums are the
 * kernel table's in float32, and everywhere the same in float64. */
#ifndef SQ_CHOLESKY_H
#define SQ_CHOLESKY_H

#include <stdint.h>

#include "core/sq_types.h"
#include "kernels/sq_kernels.h"

/* Lower triangle of a [k][k] <- its Cholesky factor; the upper one is left alone. SQ_OK, also where
 * the call is stopped, SQ_ERR_RANGE when a is not positive definite (its lower triangle is spoiled
 * then), or SQ_ERR_NOMEM. Parallel over tiles. */
sq_status
sq_cholesky(float *a, int64_t k);

/* The same in float64. It takes no memory. */
sq_status
sq_cholesky_double(double *a, int64_t k);

#define SQ_SOLVE_SCRATCH(n, rows) (((rows) + 16 + (n)) * (n))

/* x [rows][ld_x] <- x l^-1, l [n][ld_l] lower triangular; its upper triangle is not read. scratch:
 * [SQ_SOLVE_SCRATCH(n, rows)]. The same bytes on every table of kernels. */
void
sq_solve_rows(const float *l, int64_t ld_l, int64_t n, float *x, int64_t ld_x, int64_t rows,
              float *scratch);

#endif
