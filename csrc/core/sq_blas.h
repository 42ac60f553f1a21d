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

#endif
