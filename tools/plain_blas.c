/* SPDX-License-Identifier: Apache-2.0 */
/* What the core takes from OpenBLAS, as plain loops: for programs that watch every access, which a
 * library that was not compiled for them would hide. Stands in place of core/sq_blas.c. */
#include "core/sq_blas.h"

void
sq_blas_init(void)
{
}

const char *
sq_blas_info(void)
{
    return "plain loops";
}

void
sq_blas_gemm(int transpose_a, int transpose_b, int64_t m, int64_t n, int64_t k, float alpha,
             const float *a, int64_t ld_a, const float *b, int64_t ld_b, float beta, float *c,
             int64_t ld_c)
{
    for (int64_t i = 0; i < m; i++) {
        for (int64_t j = 0; j < n; j++) {
            float sum = 0;
            for (int64_t p = 0; p < k; p++) {
                sum += (transpose_a ? a[p * ld_a + i] : a[i * ld_a + p]) *
                       (transpose_b ? b[j * ld_b + p] : b[p * ld_b + j]);
            }
            float *to = &c[i * ld_c + j];
            *to = alpha * sum + (beta != 0 ? beta * *to : 0);
        }
    }
}

void
sq_blas_gemm_nt(int64_t m, int64_t n, int64_t k, const float *a, int64_t ld_a, const float *b,
                int64_t ld_b, float *c, int64_t ld_c)
{
    sq_blas_gemm(0, 1, m, n, k, 1.0f, a, ld_a, b, ld_b, 0.0f, c, ld_c);
}
