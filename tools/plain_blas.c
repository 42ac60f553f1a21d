/* SPDX-License-Identifier: Apache-2.0 */
/* What the core takes from OpenBLAS, as plain loops: for programs that watch every access, which a
 * library that was not compiled for them would hide. Stands in place of core/sq_blas.c. */
#include "core/sq_blas.h"

#include <math.h>

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

void
sq_blas_trsm(int transpose, int64_t m, int64_t n, const float *l, int64_t ld_l, float *b,
             int64_t ld_b)
{
    for (int64_t i = 0; i < m; i++) {
        float *x = b + i * ld_b;
        for (int64_t step = 0; step < n; step++) {
            const int64_t j = transpose ? step : n - 1 - step;
            for (int64_t p = transpose ? 0 : j + 1; p < (transpose ? j : n); p++) {
                x[j] -= x[p] * (transpose ? l[j * ld_l + p] : l[p * ld_l + j]);
            }
            x[j] /= l[j * ld_l + j];
        }
    }
}

void
sq_blas_gemm_sub_double(int64_t m, int64_t n, int64_t k, const double *a, const double *b,
                        double *c, int64_t ld)
{
    for (int64_t i = 0; i < m; i++) {
        for (int64_t j = 0; j < n; j++) {
            for (int64_t p = 0; p < k; p++) {
                c[i * ld + j] -= a[i * ld + p] * b[j * ld + p];
            }
        }
    }
}

void
sq_blas_trsm_double(int64_t m, int64_t n, const double *l, double *b, int64_t ld)
{
    for (int64_t i = 0; i < m; i++) {
        double *x = b + i * ld;
        for (int64_t j = 0; j < n; j++) {
            for (int64_t p = 0; p < j; p++) {
                x[j] -= x[p] * l[j * ld + p];
            }
            x[j] /= l[j * ld + j];
        }
    }
}

int
sq_blas_potrf(int64_t n, float *a, int64_t ld_a)
{
    for (int64_t j = 0; j < n; j++) {
        for (int64_t i = j; i < n; i++) {
            float sum = a[i * ld_a + j];
            for (int64_t p = 0; p < j; p++) {
                sum -= a[i * ld_a + p] * a[j * ld_a + p];
            }
            if (i == j && !(sum > 0)) {
                return 1;
            }
            a[i * ld_a + j] = i == j ? sqrtf(sum) : sum / a[j * ld_a + j];
        }
    }
    return 0;
}

int
sq_blas_potrf_double(int64_t n, double *a, int64_t ld_a)
{
    for (int64_t j = 0; j < n; j++) {
        for (int64_t i = j; i < n; i++) {
            double sum = a[i * ld_a + j];
            for (int64_t p = 0; p < j; p++) {
                sum -= a[i * ld_a + p] * a[j * ld_a + p];
            }
            if (i == j && !(sum > 0)) {
                return 1;
            }
            a[i * ld_a + j] = i == j ? sqrt(sum) : sum / a[j * ld_a + j];
        }
    }
    return 0;
}
