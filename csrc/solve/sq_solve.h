/* SPDX-License-Identifier: Apache-2.0 */
/* What rotations are solved from and with: statistics, Givens angles, DuQuant, outliers. */
#ifndef SQ_SOLVE_H
#define SQ_SOLVE_H

#include "core/sq_types.h"
#include "transform/sq_transform.h"

/* ---- statistics (calibrate) ------------------------------------------------------------- */

/* Streaming statistics of one site's inputs; the arrays are the caller's, zeroed by _reset. */
struct sq_statistics {
    int64_t k, count;
    double *min, *max, *sum2; /* [k] each; sum2: of squares */
};

sq_status
sq_statistics_reset(struct sq_statistics *s);

/* Adds x [m][k]. Rejects NaN and Inf with SQ_ERR_NONFINITE and leaves s as it was. */
sq_status
sq_statistics_update(struct sq_statistics *s, const float *x, int64_t m);

/* dst += src; sizes must agree. */
sq_status
sq_statistics_merge(struct sq_statistics *dst, const struct sq_statistics *src);

/* gram [k1][k1] <- sum over tokens of X X^T, X [k1][k2] being the token reshaped, x [m][k1 k2]: in
 * float64, one chain per entry. NaN or Inf: SQ_ERR_NONFINITE. Parallel over rows of gram. */
sq_status
sq_axis_gram(const float *x, int64_t m, int64_t k1, int64_t k2, double *gram);

/* Largest magnitude and sum of squares of each column of w [n][k], in float64 chains over the rows.
 * NaN or Inf: SQ_ERR_NONFINITE. Parallel over columns. */
sq_status
sq_column_moments(sq_dtype dtype, const void *w, int64_t n, int64_t k, double *max_abs /* [k] */,
                  double *sum2 /* [k] */);

/* peaks [k] <- of each block of `block` inputs of w [n][k] in float32, columns multiplied by
 * scale [k]: the sum of (largest magnitude)^2 over the rows, by the input that has it, the first of
 * equal ones. float64 chains over the rows. NaN or Inf: SQ_ERR_NONFINITE. Parallel over blocks. */
sq_status
sq_block_peaks(const float *w, int64_t n, int64_t k, const float *scale, int64_t block,
               double *peaks);

/* ---- Givens rotations ------------------------------------------------------------------- */

/* theta = pi/4 - atan2(b, a), which makes both entries sqrt((a^2 + b^2) / 2). */
double
sq_givens_angle(double a, double b);

/* ART on signed extremes (paper section on massive outliers): repeat {pair the index of largest
 * absolute value with the one of smallest, rotate them equal} while the largest exceeds
 * threshold * (median absolute value of the start) and fewer than max_steps were made.
 * v [n] is the vector of signed extremes, updated in place. pairs [max_steps][2],
 * angles [max_steps]; *steps receives the count. */
sq_status
sq_art_extremes(double *v, int64_t n, double threshold, int64_t max_steps, int32_t *pairs,
                double *angles, int64_t *steps);

/* ART with the angle taken at the extreme's own row (token-exact): on columns [n][rows], repeat
 * {i = column of largest absolute value, j = column whose largest absolute value is smallest,
 * (a, b) = their values in the row where i peaks, rotate by sq_givens_angle(a, b)}; stops when the
 * pair's peak no longer falls or at max_steps. columns is updated in place. */
sq_status
sq_art_columns(double *columns, int64_t n, int64_t rows, int64_t max_steps, int32_t *pairs,
               double *angles, int64_t *steps);

/* URT: the chain of U = G_u^T G_v that maps v onto u, |u| = |v| (rescaled to it). 2 (n - 1)
 * rotations at most. pairs [2n][2], angles [2n]. */
sq_status
sq_urt(const double *v, const double *u, int64_t n, int32_t *pairs, double *angles, int64_t *steps);

/* The chain that maps v to matrix v, for an orthogonal matrix [n][n] of determinant 1: Givens
 * rotations turn it into the identity column by column, and the chain undoes them in reverse. With
 * determinant -1 the last row comes out negated. n (n - 1) / 2 rotations at most; pairs and angles
 * have room for them. matrix is overwritten. SQ_ERR_RANGE if it is not orthogonal within 1e-6. */
#define SQ_CHAIN_MATRIX_MAX 4096
sq_status
sq_chain_from_matrix(double *matrix, int64_t n, int32_t *pairs, double *angles, int64_t *steps);

/* Eigenvectors of the symmetric gram [n][n] as rows, eigenvalues falling: the principal directions
 * of an axis. The same bytes on every machine with IEEE arithmetic. */
sq_status
sq_principal_directions(const double *gram, int64_t n, double *directions /* [n][n] */);

/* The same with the eigenvalues [n], falling. vectors [n][n]: a row each. */
sq_status
sq_symmetric_eigen(const double *matrix, int64_t n, double *vectors, double *values);

/* One uniformity sweep on columns [n][rows]: every pair of columns once, disjoint pairs at a time
 * (round-robin), each rotated by (pi - arg sum z^4) / 4, z = a + i b, which minimises
 * sum(a^4 + b^4). columns is updated in place. pairs [n (n-1) / 2][2], angles alike. Parallel over
 * the disjoint pairs; the result does not depend on the number of threads. */
sq_status
sq_uniformity_sweep(double *columns, int64_t n, int64_t rows, int32_t *pairs, double *angles,
                    int64_t *steps);

/* ---- alignment ----------------------------------------------------------------------------
 * The invertible matrix of a block of b channels, x' = x M and W' = W M^-T, that gives activations
 * and weights the same Gram matrix: M M^T = S_x^-1 # S_w, the matrix geometric mean. */

#define SQ_ALIGN_B_MAX 4096

/* gram [k / b][b][b] += the sum over the rows of x [m][k] of x_j^T x_j, x_j being block j of b
 * channels: in float32 over 256 rows, then in float64. NaN or Inf: SQ_ERR_NONFINITE. Parallel over
 * blocks; takes b^2 + 256 b floats of memory per thread. */
sq_status
sq_block_gram(const float *x, int64_t m, int64_t k, int64_t b, double *gram);

/* m and m_inverse_t [count][b][b] <- M and M^-T of each block with the Gram matrices x_gram and
 * w_gram [count][b][b]. damping, above 0, is added to the diagonals as a share of each entry, and
 * 1e-2 of their median: they shrink M towards the diagonal balance of the block and keep silent
 * channels from being magnified. M diagonalises both Gram matrices, the
 * largest entries first (WUSH, arXiv 2512.00956); with symmetric it is the symmetric one (CAT,
 * arXiv 2603.04359). SQ_ERR_RANGE: a matrix is not positive semidefinite. Parallel over blocks;
 * takes 4 b^2 + b doubles of memory per thread. */
sq_status
sq_alignment(const double *x_gram, const double *w_gram, int64_t count, int64_t b, double damping,
             int symmetric, double *m, double *m_inverse_t);

/* energy [count] <- trace(M^T S M) of each block, gram S and m [count][b][b]: the sum of squares of
 * the rows x M, where S is the sum of x^T x. Parallel over blocks. */
sq_status
sq_block_energy(const double *gram, const double *m, int64_t count, int64_t b, double *energy);

/* ---- DuQuant (rotate) ---------------------------------------------------------------------
 * arXiv 2406.01721, section 3.2: x' = x R1 P R2, R1 and R2 block-diagonal with k / b blocks [b][b],
 * P a permutation of the channels. */

/* q [n][n] <- a random orthogonal matrix (Haar's measure) of the seed's own stream. workspace:
 * [2 n]. */
sq_status
sq_random_orthogonal(int64_t n, uint64_t seed, double *q, double *workspace);

/* steps [count][b][b] <- R~ Q of equation 2, with its own random Q for each greedy step: the first
 * row of R~ and the first column of every matrix are 1 / sqrt(b). Parallel over steps; takes
 * b^2 doubles of memory per thread. */
sq_status
sq_duquant_steps(int64_t b, int64_t count, uint64_t seed, float *steps);

/* blocks [k / b][b][b] <- R^ of each block of b columns of sample [rows][k]: at most count greedy
 * steps R^i = E_d steps[i] E_d, d the column of largest absolute value, of which the first n are
 * kept, n the step after which the largest absolute value (the peak) was least; 0 of them where no
 * step lowers it. peaks [k / b][count + 1]: the peak before and after each step. Parallel over
 * blocks; takes 2 (rows + b) b + 5 b^2 floats of memory per thread. NaN or Inf: SQ_ERR_NONFINITE.
 */
sq_status
sq_duquant_blocks(const float *sample, int64_t rows, int64_t k, const float *steps, int64_t count,
                  int64_t b, float *blocks, float *peaks);

/* permutation [k]: the channels by descending maxima [k] (the lower index first among equals),
 * dealt over the k / b blocks back and forth; channel permutation[i] goes to place i. */
sq_status
sq_zigzag(const double *maxima, int64_t k, int64_t b, int32_t *permutation);

/* ---- outliers (inspect) ------------------------------------------------------------------- */

/* What is measured of a token x [k] with codes q [k] and scale s. */
enum {
    SQ_OUTLIER_PEAK,    /* max |x| */
    SQ_OUTLIER_SUM,     /* sum |x| */
    SQ_OUTLIER_SUM2,    /* sum x^2 */
    SQ_OUTLIER_SUM4,    /* sum x^4 */
    SQ_OUTLIER_ERROR,   /* sum (x - s q)^2 */
    SQ_OUTLIER_ENTROPY, /* Shannon entropy of q in bits */
    SQ_OUTLIER_FIELDS
};

/* x [m][k], its symmetric codes [m][k] and scales [m] -> tokens [m], and per channel: channel_sum2
 * [k], the sum of squares, and channel_above [k], the number of tokens whose |x| there exceeds
 * normal times the token's root mean square. k >= 1, normal > 0. NaN or Inf: SQ_ERR_NONFINITE.
 * Parallel over tokens, then channels. */
sq_status
sq_outliers(const float *x, int64_t m, int64_t k, const int8_t *codes, const float *scales,
            double normal, double (*tokens)[SQ_OUTLIER_FIELDS], double *channel_sum2,
            int64_t *channel_above);

#endif
