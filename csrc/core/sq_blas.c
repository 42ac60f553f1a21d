/* SPDX-License-Identifier: Apache-2.0 */
/* The only file that knows OpenBLAS (the copy that travels with the package, symbols prefixed). */
#include "core/sq_blas.h"

#include <stddef.h>

enum {
    ROW_MAJOR = 101,
    NO_TRANSPOSE = 111,
    TRANSPOSE = 112,
    LOWER = 122,
    NON_UNIT = 131,
    RIGHT = 142
};

extern void
scipy_openblas_set_num_threads(int count);
extern char *
scipy_openblas_get_config(void);
extern void
scipy_cblas_sgemm(int order, int trans_a, int trans_b, int m, int n, int k, float alpha,
                  const float *a, int ld_a, const float *b, int ld_b, float beta, float *c,
                  int ld_c);
extern void
scipy_cblas_strsm(int order, int side, int uplo, int trans, int diag, int m, int n, float alpha,
                  const float *a, int ld_a, float *b, int ld_b);
extern void
scipy_cblas_dgemm(int order, int trans_a, int trans_b, int m, int n, int k, double alpha,
                  const double *a, int ld_a, const double *b, int ld_b, double beta, double *c,
                  int ld_c);
extern void
scipy_cblas_dtrsm(int order, int side, int uplo, int trans, int diag, int m, int n, double alpha,
                  const double *a, int ld_a, double *b, int ld_b);
/* LAPACK's own face, column-major: what is lower here is upper there. The last argument is the
 * length of uplo, as Fortran compilers pass it. */
extern void
scipy_spotrf_(const char *uplo, const int *n, float *a, const int *ld_a, int *info, size_t length);
extern void
scipy_dpotrf_(const char *uplo, const int *n, double *a, const int *ld_a, int *info, size_t length);

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

void
sq_blas_trsm(int transpose, int64_t m, int64_t n, const float *l, int64_t ld_l, float *b,
             int64_t ld_b)
{
    scipy_cblas_strsm(ROW_MAJOR, RIGHT, LOWER, transpose ? TRANSPOSE : NO_TRANSPOSE, NON_UNIT,
                      (int)m, (int)n, 1.0f, l, (int)ld_l, b, (int)ld_b);
}

void
sq_blas_gemm_sub_double(int64_t m, int64_t n, int64_t k, const double *a, const double *b,
                        double *c, int64_t ld)
{
    scipy_cblas_dgemm(ROW_MAJOR, NO_TRANSPOSE, TRANSPOSE, (int)m, (int)n, (int)k, -1.0, a, (int)ld,
                      b, (int)ld, 1.0, c, (int)ld);
}

void
sq_blas_trsm_double(int64_t m, int64_t n, const double *l, double *b, int64_t ld)
{
    scipy_cblas_dtrsm(ROW_MAJOR, RIGHT, LOWER, TRANSPOSE, NON_UNIT, (int)m, (int)n, 1.0, l, (int)ld,
                      b, (int)ld);
}

int
sq_blas_potrf(int64_t n, float *a, int64_t ld_a)
{
    const int order = (int)n, ld = (int)ld_a;
    int info = 0;
    scipy_spotrf_("U", &order, a, &ld, &info, 1);
    return info != 0;
}

int
sq_blas_potrf_double(int64_t n, double *a, int64_t ld_a)
{
    const int order = (int)n, ld = (int)ld_a;
    int info = 0;
    scipy_dpotrf_("U", &order, a, &ld, &info, 1);
    return info != 0;
}
