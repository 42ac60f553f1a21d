/* SPDX-License-Identifier: Apache-2.0 */
/* Alignment of activations and weights: the Gram matrices of blocks of channels, and the matrices
 * that give both the same one, and the energy that is left behind a matrix. */
#include <math.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "core/sq_internal.h"
#include "core/sq_threads.h"
#include "kernels/sq_kernels.h"
#include "solve/sq_cholesky.h"
#include "solve/sq_solve.h"

/* Rows whose products are summed in float32 before they join; and their length when turned, whose
 * stride falls on all sets of the first-level cache. */
enum { GRAM_ROWS = 256, TURNED_LENGTH = GRAM_ROWS + SQ_ALIGN_BYTES / (int)sizeof(float) };

/* So much of a block's median diagonal entry is added to all of them: a channel that was silent in
 * calibration must not be magnified, as it may speak later. */
#define DIAGONAL_FLOOR 1e-2
/* An eigenvalue is at least so much of the largest one: below lies rounding noise. */
#define EIGENVALUE_FLOOR 1e-14

/* ---- Gram matrices of blocks ------------------------------------------------------------ */

struct block_gram_job {
    const float *x;
    int64_t m, k, b;
    double *gram;
    atomic_int no_memory;
};

static void
gram_blocks(void *context, int64_t begin, int64_t end, int thread)
{
    struct block_gram_job *job = context;
    const int64_t b = job->b;
    const struct sq_kernels *kernels = sq_kernels_active();
    float *turned = sq_alloc((size_t)(TURNED_LENGTH * b) * sizeof *turned);
    float *products = sq_alloc((size_t)(b * b) * sizeof *products);
    (void)thread;
    if (!products || !turned) {
        atomic_store(&job->no_memory, 1);
        free(turned);
        free(products);
        return;
    }
    for (int64_t block = begin; block < end; block++) {
        double *gram = job->gram + block * b * b;
        for (int64_t row = 0; row < job->m && !sq_stopped(); row += GRAM_ROWS) {
            const float *x = job->x + row * job->k + block * b;
            const int64_t rows = sq_min_i64(GRAM_ROWS, job->m - row);
            for (int64_t r = 0; r < rows; r++) {
                for (int64_t i = 0; i < b; i++) {
                    turned[i * TURNED_LENGTH + r] = x[r * job->k + i];
                }
            }
            kernels->gemm_f32(b, b, rows, turned, TURNED_LENGTH, x, job->k, products, b);
            for (int64_t i = 0; i < b * b; i++) {
                gram[i] += (double)products[i];
            }
        }
    }
    free(turned);
    free(products);
}

sq_status
sq_block_gram(const float *x, int64_t m, int64_t k, int64_t b, double *gram)
{
    int64_t count;
    if (!gram || (m > 0 && !x)) {
        return SQ_ERR_NULL;
    }
    if (m < 0 || m > INT32_MAX || k < 1 || k > INT32_MAX || b < 1 || b > SQ_ALIGN_B_MAX || k % b ||
        !sq_product(m, k, &count)) {
        return SQ_ERR_RANGE;
    }
    if (!sq_all_finite(x, count)) {
        return SQ_ERR_NONFINITE;
    }
    struct block_gram_job job = {.x = x, .m = m, .k = k, .b = b, .gram = gram};
    sq_parallel_for(k / b, 1, gram_blocks, &job);
    return atomic_load(&job.no_memory) ? SQ_ERR_NOMEM : SQ_OK;
}

/* ---- the matrix of a block -------------------------------------------------------------- */

struct align_job {
    const double *x_gram, *w_gram; /* [count][b][b] */
    int64_t b;
    double damping;
    int symmetric;
    double *m, *m_inverse_t; /* [count][b][b] */
    _Atomic int status;      /* sq_status of a block that failed */
};

/* The upper median of the diagonal of gram [b][b]; the mean where most of it is 0, 1 where all is.
 */
static double
typical_diagonal(const double *gram, int64_t b)
{
    double sum = 0, median = 0;
    for (int64_t i = 0; i < b; i++) {
        const double value = gram[i * b + i];
        int64_t rank = 0; /* among equal ones by index */
        for (int64_t j = 0; j < b; j++) {
            rank += gram[j * b + j] < value || (gram[j * b + j] == value && j < i);
        }
        median = rank == b / 2 ? value : median;
        sum += value;
    }
    return median > 0 ? median : sum > 0 ? sum / (double)b : 1;
}

/* out [b][b] <- gram, made symmetric, its diagonal enlarged. */
static void
damp(const double *gram, int64_t b, double damping, double *out)
{
    const double floor = DIAGONAL_FLOOR * typical_diagonal(gram, b);
    for (int64_t i = 0; i < b; i++) {
        for (int64_t j = 0; j < b; j++) {
            out[i * b + j] = (gram[i * b + j] + gram[j * b + i]) / 2;
        }
        out[i * b + i] += damping * gram[i * b + i] + floor;
    }
}

/* out [b][b] <- a^T c where transpose is set, a c^T elsewhere. */
static void
multiply(const double *a, int transpose, const double *c, int64_t b, double *out)
{
    memset(out, 0, (size_t)(b * b) * sizeof *out);
    for (int64_t i = 0; i < b && !sq_stopped(); i++) {
        for (int64_t p = 0; p < b; p++) {
            if (transpose) {
                for (int64_t j = 0; j < b; j++) {
                    out[i * b + j] += a[p * b + i] * c[p * b + j];
                }
            }
            else {
                double sum = 0;
                for (int64_t q = 0; q < b; q++) {
                    sum += a[i * b + q] * c[p * b + q];
                }
                out[i * b + p] = sum;
            }
        }
    }
}

/* f [b][b] <- L^-T f, L lower triangular: from the last row up. */
static void
solve_transposed(const double *l, int64_t b, double *f)
{
    for (int64_t i = b - 1; i >= 0 && !sq_stopped(); i--) {
        for (int64_t p = i + 1; p < b; p++) {
            for (int64_t j = 0; j < b; j++) {
                f[i * b + j] -= l[p * b + i] * f[p * b + j];
            }
        }
        for (int64_t j = 0; j < b; j++) {
            f[i * b + j] /= l[i * b + i];
        }
    }
}

/* The eigenvectors of the symmetric a as rows of v, its eigenvalues, none below the floor, to a
 * power: values [b]. */
static sq_status
eigen_power(const double *a, int64_t b, double power, double *v, double *values)
{
    SQ_TRY(sq_symmetric_eigen(a, b, v, values));
    const double floor = EIGENVALUE_FLOOR * values[0];
    for (int64_t i = 0; i < b; i++) {
        values[i] = pow(fmax(values[i], floor), power);
    }
    return SQ_OK;
}

/* m and its inverse transposed <- (m m^T)^(1/2) and its inverse: the symmetric one of all m Q. */
static sq_status
make_symmetric(int64_t b, double *m, double *m_inverse_t, double *p, double *v, double *values)
{
    multiply(m, 0, m, b, p);
    SQ_TRY(eigen_power(p, b, 0.5, v, values));
    for (int64_t i = 0; i < b; i++) { /* rows of v times a fourth root, so that V^T V has a root */
        const double root = sqrt(values[i]);
        for (int64_t j = 0; j < b; j++) {
            p[i * b + j] = v[i * b + j] * root;
            v[i * b + j] /= root;
        }
    }
    multiply(p, 1, p, b, m);
    multiply(v, 1, v, b, m_inverse_t);
    return SQ_OK;
}

/* With S_x = L L^T and L^T S_w L = U D U^T: M = L^-T U D^(1/4), for which M M^T is the geometric
 * mean of S_x^-1 and S_w, and M^-T = L U D^(-1/4). scratch: 4 b^2 + b. */
static sq_status
align_block(const struct align_job *job, int64_t block, double *scratch)
{
    const int64_t b = job->b, size = b * b;
    double *l = scratch, *s = l + size, *t = s + size, *v = t + size, *values = v + size;
    double *m = job->m + block * size, *m_inverse_t = job->m_inverse_t + block * size;
    damp(job->x_gram + block * size, b, job->damping, l);
    SQ_TRY(sq_cholesky_double(l, b));
    for (int64_t i = 0; i < b; i++) {
        memset(l + i * b + i + 1, 0, (size_t)(b - 1 - i) * sizeof *l);
    }
    damp(job->w_gram + block * size, b, job->damping, s);
    multiply(s, 1, l, b, t); /* s is symmetric: S L */
    multiply(l, 1, t, b, s);
    SQ_TRY(eigen_power(s, b, 0.25, v, values));
    multiply(l, 0, v, b, m_inverse_t); /* rows of v are columns of U */
    for (int64_t i = 0; i < b; i++) {
        for (int64_t j = 0; j < b; j++) {
            m[i * b + j] = v[j * b + i] * values[j];
            m_inverse_t[i * b + j] /= values[j];
        }
    }
    solve_transposed(l, b, m);
    if (job->symmetric) {
        SQ_TRY(make_symmetric(b, m, m_inverse_t, s, v, values));
    }
    return sq_all_finite_f64(m, size) && sq_all_finite_f64(m_inverse_t, size) ? SQ_OK
                                                                              : SQ_ERR_RANGE;
}

static void
align_blocks(void *context, int64_t begin, int64_t end, int thread)
{
    struct align_job *job = context;
    const int64_t b = job->b;
    double *scratch = sq_alloc((size_t)(4 * b * b + b) * sizeof *scratch);
    (void)thread;
    for (int64_t block = begin; block < end; block++) {
        const sq_status status = scratch ? align_block(job, block, scratch) : SQ_ERR_NOMEM;
        if (status != SQ_OK) {
            atomic_store(&job->status, (int)status);
            break;
        }
    }
    free(scratch);
}

sq_status
sq_alignment(const double *x_gram, const double *w_gram, int64_t count, int64_t b, double damping,
             int symmetric, double *m, double *m_inverse_t)
{
    int64_t elements;
    if (!x_gram || !w_gram || !m || !m_inverse_t) {
        return SQ_ERR_NULL;
    }
    if (count < 0 || b < 1 || b > SQ_ALIGN_B_MAX || !(damping > 0 && damping <= 1e6) ||
        !sq_product(b * b, count, &elements)) {
        return SQ_ERR_RANGE;
    }
    if (!sq_all_finite_f64(x_gram, elements) || !sq_all_finite_f64(w_gram, elements)) {
        return SQ_ERR_NONFINITE;
    }
    struct align_job job = {.x_gram = x_gram,
                            .w_gram = w_gram,
                            .b = b,
                            .damping = damping,
                            .symmetric = symmetric,
                            .m = m,
                            .m_inverse_t = m_inverse_t};
    sq_parallel_for(count, 1, align_blocks, &job);
    return (sq_status)atomic_load(&job.status);
}

/* ---- energy behind a matrix ------------------------------------------------------------- */

struct energy_job {
    const double *gram, *m; /* [count][b][b] */
    int64_t b;
    double *energy; /* [count] */
};

/* trace(M^T S M) is the sum of S_ij <row i of M, row j of M>. */
static void
energy_blocks(void *context, int64_t begin, int64_t end, int thread)
{
    const struct energy_job *job = context;
    const int64_t b = job->b;
    (void)thread;
    for (int64_t block = begin; block < end; block++) {
        const double *gram = job->gram + block * b * b, *m = job->m + block * b * b;
        double energy = 0;
        for (int64_t i = 0; i < b && !sq_stopped(); i++) {
            for (int64_t j = 0; j < b; j++) {
                double product = 0;
                for (int64_t p = 0; p < b; p++) {
                    product += m[i * b + p] * m[j * b + p];
                }
                energy += gram[i * b + j] * product;
            }
        }
        job->energy[block] = energy;
    }
}

sq_status
sq_block_energy(const double *gram, const double *m, int64_t count, int64_t b, double *energy)
{
    int64_t elements;
    if (!gram || !m || !energy) {
        return SQ_ERR_NULL;
    }
    if (count < 0 || b < 1 || b > SQ_ALIGN_B_MAX || !sq_product(b * b, count, &elements)) {
        return SQ_ERR_RANGE;
    }
    if (!sq_all_finite_f64(gram, elements) || !sq_all_finite_f64(m, elements)) {
        return SQ_ERR_NONFINITE;
    }
    struct energy_job job = {.gram = gram, .m = m, .b = b, .energy = energy};
    sq_parallel_for(count, 1, energy_blocks, &job);
    return SQ_OK;
}
