/* SPDX-License-Identifier: Apache-2.0 */
/* Activations as the linears read them, packed and dense linears, rows of a table. */
#ifndef SQ_LINEAR_H
#define SQ_LINEAR_H

#include "quantize/sq_quantize.h"

/* A token's activations as the linears read them. k is padded with zeros to ld, a multiple of
 * SQ_K_ALIGN that suits the caches. sums[b] is the sum of the token's codes before block b of
 * SQ_K_ALIGN, so that a weight group's sum is one difference (the kernels multiply code + 8 and
 * correct by it). */
struct sq_activations {
    int bits; /* 4, 8: codes; 16: values */
    int64_t m, k, ld;
    int64_t int8_inputs; /* leading ones with 8-bit codes and a scale of their own; bits is 4 */
    float *values;       /* [m][ld] for 16 */
    int8_t *codes;       /* [m][ld] for 4 and 8 */
    float *scales; /* [m] for 4 and 8; behind them [m] of the int8_inputs when there are any */
    int32_t *sums; /* [m][ld / SQ_K_ALIGN + 1] for 4 and 8 */
};

/* Row length and workspace for m tokens of k inputs; SIZE_MAX / 2 bytes for what cannot be. */
int64_t
sq_activations_ld(int64_t k);

size_t
sq_activations_workspace_bytes(int bits, int64_t m, int64_t k);

/* Fills a from x [m][k], rotated on the way (rotation NULL or SQ_UNROTATED: as it is): symmetric
 * per token with the given clip, or a copy for 16 bits. The first int8_inputs get 8 bits over their
 * own unclipped range (0 unless bits is 4). Memory comes from workspace; rotation_workspace is
 * sq_rotate_each's. NaN or Inf: SQ_ERR_NONFINITE. Parallel over tokens. */
sq_status
sq_activations_prepare(const struct sq_kernels *kernels, int bits, float clip, int64_t int8_inputs,
                       const struct sq_rotation *rotation, const float *x, int64_t m, int64_t k,
                       void *rotation_workspace, void *workspace, struct sq_activations *a);

/* y [m][ld_y] = a w^T, n columns written. Integer sums are exact; a token's results do not depend
 * on m, on the batch or on the number of threads. Parallel over panels. */
sq_status
sq_linear_packed(const sq_packed_t *w, const struct sq_activations *a, float *y, int64_t ld_y);

/* The same for up to SQ_SITE_LINEARS weights that read the same activations, y[i] of w[i], as one
 * parallel loop. */
enum { SQ_SITE_LINEARS = 4 };
sq_status
sq_linears_packed(const sq_packed_t *const w[], int count, const struct sq_activations *a,
                  float *const y[], const int64_t ld_y[]);

/* y [m][n] += bias [n], or nothing for NULL. Parallel over tokens. */
void
sq_add_bias(const float *bias, int64_t m, int64_t n, float *y);

/* y [m][ld_y] = x w^T for w [n][k] in 32 or 16 bits, in fixed blocks so that results do not depend
 * on the number of threads. 16-bit weights and at most SQ_DENSE_FEW tokens: w is widened in
 * registers, and a token's results do not depend on m either. All else goes through BLAS, whose
 * last bits follow m. */
#define SQ_DENSE_FEW 64
sq_status
sq_linear_dense(sq_dtype dtype, const void *w, const float *x, int64_t m, int64_t n, int64_t k,
                float *y, int64_t ld_y);

/* The same for contiguous y [m][n] of few outputs, as routers have them: never through BLAS, so
 * that a token's results depend on neither m nor the number of threads. */
sq_status
sq_linear_steady(sq_dtype dtype, const void *w, const float *x, int64_t m, int64_t n, int64_t k,
                 float *y);

/* y [m][ld_y] = x w^T for rows of codes of k inputs, which are read where they lie. Tokens
 * get codes of activation_bits, 8, 16 or 24, with a scale for every SQ_ROW_BLOCK inputs; 16 are two
 * codes of 8, one of the value and one of what that leaves, and 24 are three. A token with NaN or
 * Inf has NaN everywhere. An element does not depend on m or on the number of threads, and has the
 * same bits on every table of kernels. Parallel over outputs. */
struct sq_code_rows;
sq_status
sq_linear_rows(const struct sq_code_rows *w, int activation_bits, const float *x, int64_t m,
               float *y, int64_t ld_y);

/* out [m][k] float32 <- rows index [m] of w [rows], scale * code; SQ_ERR_RANGE outside it. */
sq_status
sq_gather_code_rows(const struct sq_code_rows *w, const int64_t *index, int64_t m, float *out);

/* out [count] float32 <- in [count] of dtype. With reject, NaN and Inf are SQ_ERR_NONFINITE. */
sq_status
sq_to_float32(sq_dtype dtype, const void *in, int64_t count, int reject, float *out);

/* out [m][width] float32 <- rows index [m] of table [rows][width]; SQ_ERR_RANGE outside it. */
sq_status
sq_gather_rows(sq_dtype dtype, const void *table, int64_t rows, int64_t width, const int64_t *index,
               int64_t m, float *out);

#endif
