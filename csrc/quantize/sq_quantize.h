/* SPDX-License-Identifier: Apache-2.0 */
/* Quantizers, GPTQ, and weights from a stored tensor to panels. */
#ifndef SQ_QUANTIZE_H
#define SQ_QUANTIZE_H

#include "core/sq_types.h"
#include "transform/sq_transform.h"

/* ---- quantizers (quantize) -------------------------------------------------------------- */

/* Symmetric: scale = clip * max|x| / (2^(bits-1) - 1), code = clamp(rint(x / scale)) in
 * [-2^(bits-1), 2^(bits-1) - 1]. Asymmetric: lo = min(0, min x), hi = max(0, max x), scale = clip *
 * (hi - lo) / (2^bits - 1), x = scale * (code - zero), code in [0, 2^bits - 1], zero = rint(-clip *
 * lo / scale). x / scale is the float32 product with inv_scale = 1 / scale; halves go to even. A
 * scale below the smallest normal float32 becomes 0, and the row's codes and zero with it. A row is
 * a token (per token) or an output channel (per channel); groups of g columns along k. Every kernel
 * table gives the same bytes. */
struct sq_quantizer {
    int bits;      /* 4, 5, 6 or 8 */
    int symmetric; /* 1 or 0 */
    int64_t group; /* g, or 0 for the whole row */
    float clip;    /* in (0, 1] */
    int search;    /* 1: per row and group, clip times the SQ_CLIP_RATIO of least squared error */
    int bfloat16_scales; /* 1, symmetric alone: scales are rounded to bfloat16 before their use */
};

/* Ratio i of the clip search, 1.00 down to 0.20; among equals the largest wins. On Gaussian,
 * Laplace and Student (3, 4) rows and groups the error is within 0.4 % of a search in steps of 0.01
 * down to 0.05; steps of 0.04 cost up to 1.4 %, a floor of 0.40 up to 14 % (whole rows, heavy
 * tails). With 4 symmetric bits and clip 1 a sum of integers, of values rounded to 1 / 10150 of the
 * group's largest, first rules out all ratios but those within 0.2 % of its least. */
#define SQ_CLIP_RATIOS 41
#define SQ_CLIP_RATIO(i) ((float)(100 - 2 * (i)) / 100.0f)

/* x [m][k] -> codes [m][k] (int8: symmetric codes as they are, asymmetric ones as uint8 bits),
 * scales [m][k / g], zeros [m][k / g] (NULL when symmetric). k must be a multiple of g; the last
 * group may not be short. NaN or Inf: SQ_ERR_NONFINITE. Parallel over rows. */
sq_status
sq_quantize(const struct sq_quantizer *q, const float *x, int64_t m, int64_t k, int8_t *codes,
            float *scales, int32_t *zeros);

/* One token x [k], symmetric: codes [k] and its scale. Serial. */
struct sq_kernels;
sq_status
sq_quantize_row(const struct sq_kernels *kernels, int bits, float clip, const float *x, int64_t k,
                int8_t *codes, float *scale);

/* x [m][k] <- scale * (code - zero), codes as sq_quantize writes them; groups = k / g per row;
 * zeros is NULL for symmetric codes. Parallel over rows. */
sq_status
sq_dequantize(const int8_t *codes, const float *scales, const int32_t *zeros, int64_t m, int64_t k,
              int64_t groups, float *x);

/* sums [length / SQ_K_ALIGN + 1]: number b is the sum of the codes [length] before block b. */
void
sq_running_sums(const int8_t *codes, int64_t length, int32_t *sums);

/* ---- one group at a time: what the loops over groups share -------------------------------- */

/* SQ_OK if q's bits, clip and group suit rows of k; q->group 0 is the whole row. */
sq_status
sq_quantizer_check(const struct sq_quantizer *q, int64_t k);

/* Elements of the scratch that sq_quantize_group takes for groups of k, SQ_ALIGN_BYTES aligned. */
int64_t
sq_quantize_scratch(int64_t k);

/* One group x [k]: codes [k] + offset, scale and zero (0 when symmetric). 1, or 0 if x holds NaN or
 * Inf. */
int
sq_quantize_group(const struct sq_kernels *kernels, const struct sq_quantizer *q, const float *x,
                  int64_t k, int offset, int16_t *scratch, int8_t *codes, float *scale,
                  int32_t *zero);

/* ---- weights of other makers (quantize) ---------------------------------------------------- */

/* out [count][n][k] (bfloat16, nearest) <- codes [count][n][k] (e4m3: no infinities, NaN is all
 * ones) times the scale of their block, scales [count][ceil(n / block_rows)][ceil(k /
 * block_columns)]. NaN and Inf pass on. Parallel over rows. */
sq_status
sq_decode_fp8(const uint8_t *codes, const float *scales, int64_t count, int64_t n, int64_t k,
              int64_t block_rows, int64_t block_columns, uint16_t *out);

/* out [count][groups * 32][rows] (bfloat16, exact) <- the transpose of blocks
 * [count][rows][groups][16] (two e2m1 codes a byte, the low one first) times 2^(scale - 127),
 * scales [count][rows][groups]; scale 255 is NaN. Parallel over groups. */
sq_status
sq_decode_mxfp4(const uint8_t *blocks, const uint8_t *scales, int64_t count, int64_t rows,
                int64_t groups, uint16_t *out);

/* ---- GPTQ (quantize) --------------------------------------------------------------------
 * Rounding column by column, each column's error spread over the columns still to come so that
 * tr(E H E^T) stays small, E = W - dequantized codes, H = sum over tokens of x x^T (Frantar et al.,
 * arXiv 2210.17323). One factor of H serves all linears of a site. */

/* gram [k][k] (symmetric) += y^T y, y [m][k] being x [m][k] transformed (NULL: x itself): of y in
 * float32, or with `bits` 8 of y rounded to 8 bits, one scale for an input of tokens of about one
 * size; the products are then exact. The sums are made in the lower triangle and mirrored. NaN or
 * Inf in x: SQ_ERR_NONFINITE, gram is as it was. Parallel over blocks of gram. */
struct sq_weight_transform;
sq_status
sq_gram_update(int bits, const struct sq_weight_transform *transform, const float *x, int64_t m,
               int64_t k, float *gram);

/* Largest k of sq_gptq_*: a factor of 2^16 x 2^16 has 16 GiB. */
#define SQ_GPTQ_K_MAX (1 << 16)

/* gram [k][k] (symmetric) <- L, lower triangular, zeros above, of
 *     L L^T = P (gram + damping * mean(diagonal) * I) P^T;
 * row i of L stands for input permutation[i], and inputs are rounded from the last row to the
 * first. by_diagonal 0: inputs in their own order (permutation[i] = k - 1 - i), 1: in the order of
 * falling diagonal, "act order". An input that is zero on every token has no error to spread and is
 * rounded to nearest. Values that are not finite: SQ_ERR_NONFINITE. Not positive definite:
 * SQ_ERR_RANGE. In both cases gram is spoiled. In float32; again in float64, with 8 k^2 bytes of
 * scratch, where that fails. Parallel over blocks. */
sq_status
sq_gptq_factor(float *gram, int64_t k, float damping, int by_diagonal, int32_t *permutation);

/* The factor [k][k] as error feedback in 8 bits takes it, in the order of the kernel table that is
 * active now, which multiplies it later too. Values that are not finite: SQ_ERR_NONFINITE. *out is
 * freed by the caller. Parallel over columns. */
struct sq_gptq_feedback;
sq_status
sq_gptq_feedback_make(const float *factor, int64_t k, struct sq_gptq_feedback **out);

int64_t
sq_gptq_feedback_k(const struct sq_gptq_feedback *feedback);

/* NULL is fine. */
void
sq_gptq_feedback_free(struct sq_gptq_feedback *feedback);

/* weights [n][k] -> codes [n][k], scales [n][k / g] (q->group = g, or 0 for whole rows) on the
 * symmetric grid of sq_quantize with q's bits, clip and search. factor [k][k] and permutation [k]
 * are sq_gptq_factor's. Scales of whole rows are of the weights as given. Those of groups are taken
 * when their first column is reached, of the weights as they have become by then, unless the
 * order is by diagonal: then of the weights as given, in their stored places ("static groups").
 * With feedback, which was made of this factor, errors reach other blocks of columns in 8 bits:
 * unless groups neither hold whole blocks nor divide one. NULL: in float32.
 * SQ_ERR_RANGE also when permutation is none or factor's diagonal not positive. Parallel over
 * rows; a row's result does not depend on the other rows. */
sq_status
sq_gptq_round(const struct sq_quantizer *q, const float *factor, const int32_t *permutation,
              const struct sq_gptq_feedback *feedback, const float *weights, int64_t n, int64_t k,
              int8_t *codes, float *scales);

/* 1 if the diagonal of a factor [k][k] is finite and above the smallest normal number, so that it
 * can be divided by. */
int
sq_gptq_factor_usable(const float *factor, int64_t k);

/* ---- weights (quantize) -------------------------------------------------------------------
 * From a stored weight to the words of the file in one pass, a few rows at a time in cache. */

/* What happens to a weight's rows before they are rounded, in this order. */
struct sq_weight_transform {
    const float *columns;               /* [k] multiplies the columns: a balance; or NULL */
    const float *rows;                  /* [n] multiplies the rows; or NULL */
    const struct sq_rotation *rotation; /* of the rows; or NULL */
};

/* weight [n][k] of dtype -> words [n][sq_packed_words] and scales [n][k / g] (q: symmetric). Takes
 * 10 bytes of scratch per element of the few rows that a thread has in work. SQ_ERR_NONFINITE:
 * *bad_row is the first row that holds NaN or Inf, or comes to hold it; the outputs are then
 * spoiled. Parallel over blocks of rows; a row's words depend on that row alone.
 */
sq_status
sq_quantize_weight(const struct sq_quantizer *q, const struct sq_weight_transform *transform,
                   sq_dtype dtype, const void *weight, int64_t n, int64_t k, int32_t *words,
                   float *scales, int64_t *bad_row);

/* table [rows][k] of dtype -> rows of codes as kernels/code_rows.h lays them out, of an embedding
 * or a head: codes [rows][sq_code_row_bytes] and bfloat16 scales [rows][sq_code_row_scales]. The
 * scale is rounded first, and the codes with what it became: 8 bits to nearest over the row's
 * largest; 6 and 4 bits with the searched clip of sq_quantizer, of x and of -x (its scale is then
 * below 0), as -8 reaches further than 7. SQ_ERR_NONFINITE: *bad_row is the first row that holds
 * NaN or Inf. Parallel over rows; a row's codes depend on that row alone. */
sq_status
sq_quantize_rows(int bits, sq_dtype dtype, const void *table, int64_t rows, int64_t k,
                 uint8_t *codes, uint16_t *scales, int64_t *bad_row);

/* The rows as sq_quantize_weight would round them: out [n][k] in float32. */
sq_status
sq_transform_weight(const struct sq_weight_transform *transform, sq_dtype dtype, const void *weight,
                    int64_t n, int64_t k, float *out, int64_t *bad_row);

/* Asks the system to read [address, address + bytes), if it is a mapped file, ahead of its use. */
void
sq_will_need(const void *address, size_t bytes);

/* ---- packing (pack) --------------------------------------------------------------------- */

/* Codes come in blocks of so many along k; groups and 8-bit inputs are whole blocks. */
#define SQ_K_ALIGN 32

/* Bits of a stored weight code: 4, 5, 6 or 8. */
int
sq_weight_bits_valid(int bits);

/* Words of one packed row: ceil(k bits / 32) int32. They hold a stream of bits, the lowest first:
 * code + 2^(bits - 1) of each input, then of codes 0, the last of which may be cut off. With 4 and
 * 8 bits this is the pack-quantized layout of compressed-tensors. */
int64_t
sq_packed_words(int bits, int64_t k);

/* codes [n][k] in -2^(bits - 1) .. 2^(bits - 1) - 1 -> words [n][sq_packed_words]; SQ_ERR_RANGE for
 * codes outside and for other bits. Parallel over rows. */
sq_status
sq_pack_codes(int bits, const int8_t *codes, int64_t n, int64_t k, int32_t *words);

sq_status
sq_unpack_codes(int bits, const int32_t *words, int64_t n, int64_t k, int8_t *codes);

/* One row, serially: words from codes [k] that have the 2^(bits - 1) added already; and codes as
 * they are. */
void
sq_pack_row(int bits, const uint8_t *codes, int64_t k, int32_t *words);

void
sq_unpack_row(int bits, const int32_t *words, int64_t k, int8_t *codes);

/* Weights in the panels of one kernel table. Made by _create, owned by the caller of it. */
typedef struct sq_packed_t sq_packed_t;

/* words [n][sq_packed_words], scales [n][k / g]; g = 0 means one scale per output channel,
 * otherwise g must be a multiple of SQ_K_ALIGN that divides k. int8_inputs: leading inputs whose
 * activations come with 8 bits where the others have 4, a multiple of SQ_K_ALIGN (and of g) below
 * k; 0: none. Copies; the copy is never written again and may be shared between threads. k <=
 * sq_packed_k_max, so that integer sums fit 32 bits: 8 * 128 * 2^20 = 128 * 128 * 2^16 = 2^30. */
#define SQ_PACKED_K_MAX (1 << 20)
#define SQ_PACKED_K_MAX_W8 (1 << 16)
int64_t
sq_packed_k_max(int bits);

sq_status
sq_packed_create(const struct sq_kernels *kernels, const int32_t *words, const float *scales,
                 int64_t n, int64_t k, int64_t g, int64_t int8_inputs, int bits, sq_packed_t **out);

void
sq_packed_destroy(sq_packed_t *w);

void
sq_packed_shape(const sq_packed_t *w, int64_t *n, int64_t *k, int64_t *g);

int64_t
sq_packed_int8_inputs(const sq_packed_t *w);

/* Bits of w's codes as they were stored. */
int
sq_packed_bits(const sq_packed_t *w);

/* Memory held by w's panels and scales. */
size_t
sq_packed_bytes(const sq_packed_t *w);

/* The table that made w's panels, which is the table that must multiply them. */
const struct sq_kernels *
sq_packed_kernels(const sq_packed_t *w);

/* What sq_pack.c makes and sq_linear.c reads: immutable after sq_packed_create. */
struct sq_packed_t {
    const struct sq_kernels *kernels;
    int64_t n, k, g;      /* g as given: 0 for one scale per output */
    int64_t int8_inputs;  /* leading inputs whose activations have 8 bits; panels of their own */
    int64_t k_padded;     /* to SQ_K_ALIGN */
    int64_t group_length; /* g or k_padded */
    int64_t groups;       /* k_padded / group_length */
    int bits;             /* of a stored code */
    int panel_bits;       /* of a code in the panels; with 5 and 6 they are thin (thin_panels.h) */
    int64_t n_panels;     /* of nr outputs */
    int64_t panel_bytes;  /* nr * k_padded * panel_bits / 8 */
    int64_t panel_stride_bytes;
    const uint8_t *panels; /* owned, [n_panels][panel_stride_bytes] */
    const float *scales;   /* owned, [n_panels][groups][nr], zero padded */
};

#endif
