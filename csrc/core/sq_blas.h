/* SPDX-License-Identifier: Apache-2.0 */
/* The face of OpenBLAS inside the core: only sq_blas.c knows the library. */
#ifndef SQ_BLAS_H
#define SQ_BLAS_H

#include <stdint.h>

/* One thread inside BLAS: parallelism is ours, over fixed blocks. */
void
sq_blas_init(void);

const char *
sq_blas_info(void);

/* c [m][ld_c] = a [m][k] b^T, b [n][k]; row-major, on the calling thread. */
void
sq_blas_gemm_nt(int64_t m, int64_t n, int64_t k, const float *a, int64_t ld_a, const float *b,
                int64_t ld_b, float *c, int64_t ld_c);

/* c [m][ld_c] = alpha op(a) op(b) + beta c, op(a) [m][k], op(b) [k][n]; op transposes where the
 * flag is set. Row-major, on the calling thread, like all that follows. */
void
sq_blas_gemm(int transpose_a, int transpose_b, int64_t m, int64_t n, int64_t k, float alpha,
             const float *a, int64_t ld_a, const float *b, int64_t ld_b, float beta, float *c,
             int64_t ld_c);

/* b [m][ld_b] <- b op(l)^-1, l [n][ld_l] lower triangular; its upper triangle is not read. */
void
sq_blas_trsm(int transpose, int64_t m, int64_t n, const float *l, int64_t ld_l, float *b,
             int64_t ld_b);

/* c [m][ld] -= a b^T, a [m][k], b [n][k]: parts of one matrix in float64. */
void
sq_blas_gemm_sub_double(int64_t m, int64_t n, int64_t k, const double *a, const double *b,
                        double *c, int64_t ld);

/* b [m][ld] <- b l^-T, l [n][ld] lower triangular: parts of one matrix in float64. */
void
sq_blas_trsm_double(int64_t m, int64_t n, const double *l, double *b, int64_t ld);

/* Lower triangle of a [n][ld_a] <- its Cholesky factor; the upper one is left alone. 0, or 1 when a
 * is not positive definite (a is spoiled then). */
int
sq_blas_potrf(int64_t n, float *a, int64_t ld_a);
int
sq_blas_potrf_double(int64_t n, double *a, int64_t ld_a);

#endif
