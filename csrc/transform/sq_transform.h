/* SPDX-License-Identifier: Apache-2.0 */
/* Transformations of rows: Hadamard matrices, chains of Givens rotations, a site's rotation. */
#ifndef SQ_TRANSFORM_H
#define SQ_TRANSFORM_H

#include "core/sq_types.h"

/* ---- factors: which k1, k2 -------------------------------------------------------------- */

/* Kronecker sizes k = k1 * k2: k2 carries a Hadamard matrix (powers of two first, 12*2^i and 20*2^i
 * where they at least halve the larger factor), both as near sqrt(k) as possible. Every k >= 1. */
sq_status
sq_factor_sizes(int64_t k, int64_t *k1, int64_t *k2);

/* ---- rotations (rotate) --------------------------------------------------------------------
 * A chain is a list of Givens rotations in order of application. Rotation t with pair (i, j) and
 * angle theta maps a vector v by v_i' = c v_i - s v_j, v_j' = s v_i + c v_j. */

/* Orthonormal matrix h [n][n] with near-flat entries for every n: Sylvester, Paley I and II and
 * their Kronecker products with Sylvester where they exist, otherwise Hartley kron Sylvester. */
sq_status
sq_hadamard_matrix(int64_t n, double *h /* [n][n] */);

/* x [rows][n] <- each row times H^T (so v <- H v for each row v), without an n x n matrix.
 * workspace: [3 n] doubles. */
sq_status
sq_hadamard_transform(double *x, int64_t rows, int64_t n, double *workspace);

/* Applies a chain to every row of x [rows][n]. pairs [g][2], angles [g]. */
sq_status
sq_chain_apply(const int32_t *pairs, const double *angles, int64_t g, double *x, int64_t rows,
               int64_t n);

/* One factor as it is applied to an axis vector: v <- chain(H v) or v <- matrix v. With a matrix
 * the rest is unused. Without one it is computed in float64; in float32 where it is a Hadamard
 * alone whose order is a power of two. Python makes matrices up to SQ_FACTOR_DENSE_MAX. */
#define SQ_FACTOR_DENSE_MAX 512
struct sq_factor {
    int64_t order;
    const float *matrix;   /* [order][order] or NULL */
    const float *matrix_t; /* its transpose, in a right factor: what rows are multiplied by */
    int hadamard;          /* without matrix: 1 = Hadamard transform first */
    int64_t steps;         /* without matrix: the chain */
    const int32_t *pairs;  /* [steps][2] */
    const float *cos_sin;  /* [steps][2] */
};

/* out [n][n] <- transpose of a [n][n]; out is not a. */
void
sq_transpose(const float *a, int64_t n, float *out);

/* ---- a site's rotation ------------------------------------------------------------------- */

/* Largest block of sq_duquant_* and of a rotation, and largest random matrix. */
#define SQ_DUQUANT_B_MAX 4096

struct sq_block_rotation {
    int64_t b;
    const float *first;         /* [k / b][b][b] */
    const int32_t *permutation; /* [k], each of 0 .. k - 1 once */
    const float *second;        /* [k / b][b][b] */
};

enum { SQ_UNROTATED, SQ_KRONECKER, SQ_BLOCKS, SQ_ALIGNED };

/* Largest k of a rotation. */
#define SQ_ROTATION_K_MAX ((int64_t)1 << 40)

/* A row x [k] becomes
 *   SQ_KRONECKER  L X R^T, where X [k1][k2] is the row reshaped, L the left factor and R the right
 *                 one (both act on their axis's vectors: R2 of the paper is R^T);
 *   SQ_BLOCKS     x blockdiag(first), permuted, times blockdiag(second);
 *   SQ_ALIGNED    x blockdiag(first), then as SQ_KRONECKER: first is invertible, not orthogonal.
 * Who makes one proves its contents once: indices in range, a permutation, orthogonal or invertible
 * matrices. The functions below check sizes and pointers alone. */
struct sq_rotation {
    int kind;                        /* one of the above */
    int64_t k;                       /* k1 k2; 0 for SQ_UNROTATED, which fits every k */
    struct sq_factor left, right;    /* SQ_KRONECKER, SQ_ALIGNED */
    struct sq_block_rotation blocks; /* SQ_BLOCKS; SQ_ALIGNED: b and first alone */
};

/* SQ_OK if the sizes and pointers of a rotation (not SQ_UNROTATED) agree. */
sq_status
sq_rotation_check(const struct sq_rotation *rotation);

/* *error <- the largest |M M^T - I| of matrices [count][n][n], NaN if one holds NaN or Inf. */
sq_status
sq_orthogonality_error(const float *matrices, int64_t count, int64_t n, float *error);

/* *ratio <- over matrices [count][n][n], the largest quotient of the largest and the smallest pivot
 * of an elimination with row pivoting: a sign of how far a matrix is from singular. Infinity for a
 * singular one, NaN if one holds NaN or Inf. */
sq_status
sq_pivot_ratio(const float *matrices, int64_t count, int64_t n, double *ratio);

/* Bytes of workspace for m rows or fewer in the functions below, whatever the number of threads is
 * when the call comes; untouched scratch takes no memory. 0 for NULL and SQ_UNROTATED, SIZE_MAX / 2
 * when the sizes are out of range. */
size_t
sq_rotation_workspace_bytes(const struct sq_rotation *rotation, int64_t m);

/* y [m][k] <- the rows of x, each rotated. y may be x. Parallel over rows; the value of a row
 * depends on that row alone, bit for bit. */
sq_status
sq_rotate(const struct sq_rotation *rotation, const float *x, int64_t m, float *y, void *workspace);

/* Takes rotated rows `first` and following, values [rows][k], which are valid during the call. */
typedef void (*sq_rows_fn)(void *context, int64_t first, int64_t rows, const float *values);

/* Hands the rows of x [m][k], each rotated as by sq_rotate, to fn: a block of rows at a time, as it
 * lies in the cache, on several threads at once. */
sq_status
sq_rotate_each(const struct sq_rotation *rotation, const float *x, int64_t m, sq_rows_fn fn,
               void *context, void *workspace);

/* x [m][k] <- rotated on the calling thread alone, whatever the number of threads is: for calls
 * inside a parallel loop. Its workspace is that of sq_rotation_serial_bytes. */
size_t
sq_rotation_serial_bytes(const struct sq_rotation *rotation, int64_t m);

sq_status
sq_rotate_serially(const struct sq_rotation *rotation, float *x, int64_t m, void *workspace);

#endif
