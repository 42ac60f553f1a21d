/* SPDX-License-Identifier: Apache-2.0 */
/* The only file that knows OpenBLAS (the copy that travels with the package, symbols prefixed). */
#include "core/sq_blas.h"

enum { ROW_MAJOR = 101, NO_TRANSPOSE = 111, TRANSPOSE = 112 };

extern void
scipy_openblas_set_num_threads(int count);
extern char *
scipy_openblas_get_config(void);
extern void
scipy_cblas_sgemm(int order, int trans_a, int trans_b, int m, int n, int k, float alpha,
                  const float *a, int ld_a, const float *b, int ld_b, float beta, float *c,
                  int ld_c);

void
sq_blas_init(void)
{
    scipy_openblas_set_num_threads(1);
}

const char *
sq_blas_info(void)
{
    const char *text = scipy_openblas_get_config();
    return text ? text : "";
}

void
sq_blas_gemm_nt(int64_t m, int64_t n, int64_t k, const float *a, int64_t ld_a, const float *b,
                int64_t ld_b, float *c, int64_t ld_c)
{
    scipy_cblas_sgemm(ROW_MAJOR, NO_TRANSPOSE, TRANSPOSE, (int)m, (int)n, (int)k, 1.0f, a,
                      (int)ld_a, b, (int)ld_b, 0.0f, c, (int)ld_c);
}

void
sq_blas_gemm(int transpose_a, int transpose_b, int64_t m, int64_t n, int64_t k, float alpha,
             const float *a, int64_t ld_a, const float *b, int64_t ld_b, float beta, float *c,
             int64_t ld_c)
{
    scipy_cblas_sgemm(ROW_MAJOR, transpose_a ? TRANSPOSE : NO_TRANSPOSE,
                      transpose_b ? TRANSPOSE : NO_TRANSPOSE, (int)m, (int)n, (int)k, alpha, a,
                      (int)ld_a, b, (int)ld_b, beta, c, (int)ld_c);
}
