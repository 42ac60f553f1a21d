/* SPDX-License-Identifier: Apache-2.0 */
/* Tables that stay as rows of codes: logits of a head, rows of an embedding. */
#include "runtime/sq_linear.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "core/sq_internal.h"
#include "core/sq_threads.h"
#include "kernels/sq_kernels.h"

enum {
    CHUNK_OUTPUTS_STEP = SQ_NR_MAX, /* whole tiles */
    CHUNK_BYTES = 1 << 17,          /* of codes, of one chunk */
    GATHER_GRAIN = 1 << 15          /* elements of one chunk */
};

static int
sound(const struct sq_code_rows *w)
{
    return sq_code_row_bits_valid(w->bits) && w->k >= 1 && w->rows >= 0;
}

/* ---- tokens ----------------------------------------------------------------------------- */

/* A token's codes in memory of their own. */
struct coded_tokens {
    struct sq_token_rows rows;
    int8_t *codes;
    float *scales;
    int32_t *offsets;
};

/* For `rows` rows in memory that the caller frees; NULL in codes: there is none. */
static struct coded_tokens
make_tokens(int64_t rows, int parts, int64_t blocks)
{
    enum { BLOCKS_STEP = 8 };
    const int64_t ld = sq_round_up(blocks, BLOCKS_STEP);
    const size_t count = (size_t)(rows * ld), codes = sq_align_bytes(count * SQ_ROW_BLOCK);
    const size_t scales = sq_align_bytes(count * sizeof(float));
    char *memory = sq_alloc(codes + scales + count * sizeof(int32_t));
    struct coded_tokens t = {.codes = (int8_t *)memory};
    if (memory) {
        t.scales = (float *)(memory + codes);
        t.offsets = (int32_t *)(memory + codes + scales);
        t.rows = (struct sq_token_rows){.parts = parts,
                                        .blocks = blocks,
                                        .ld = ld,
                                        .codes = t.codes,
                                        .scales = t.scales,
                                        .offsets = t.offsets};
    }
    return t;
}

/* `count` values, SQ_ROW_BLOCK at most, to a block of codes and a scale. x <- what they leave. A
 * block with NaN or Inf has scale NaN; one whose values are all below about 4e-37 is zero. */
static void
code_block(const struct sq_kernels *kernels, float *x, int64_t count, int8_t *codes, float *scale)
{
    float min = 0.0f, max = 0.0f;
    const int finite = count < 1 || kernels->extremes(x, count, &min, &max);
    const float largest = fmaxf(-min, max), inverse = 127.0f / largest;
    memset(codes, 0, SQ_ROW_BLOCK);
    *scale = finite ? 0.0f : NAN;
    if (!finite || !(inverse <= FLT_MAX)) {
        return;
    }
    *scale = largest / 127.0f;
    kernels->quantize_codes(x, count, inverse, -127.0f, 127.0f, 0, codes);
    for (int64_t i = 0; i < count; i++) {
        x[i] -= *scale * (float)codes[i];
    }
}

/* Token x [k] to the rows of token i. */
static void
code_token(const struct sq_kernels *kernels, const float *x, int64_t k, int bits, int64_t i,
           struct coded_tokens *tokens)
{
    const int64_t ld = tokens->rows.ld, parts = tokens->rows.parts;
    for (int64_t b = 0; b < ld; b++) {
        const int64_t first = sq_min_i64(k, b * SQ_ROW_BLOCK);
        const int64_t count = sq_min_i64(SQ_ROW_BLOCK, k - first);
        float left[SQ_ROW_BLOCK];
        memcpy(left, x + first, (size_t)count * sizeof *left);
        for (int64_t part = 0; part < parts; part++) {
            const int64_t block = (i * parts + part) * ld + b;
            int8_t *codes = tokens->codes + block * SQ_ROW_BLOCK;
            int32_t sum = 0;
            code_block(kernels, left, count, codes, tokens->scales + block);
            for (int64_t p = 0; p < SQ_ROW_BLOCK; p++) {
                sum += codes[p];
            }
            tokens->offsets[block] = -sum * (1 << (bits - 1));
        }
    }
}

/* ---- products --------------------------------------------------------------------------- */

struct rows_job {
    const struct sq_kernels *kernels;
    const struct sq_code_rows *w;
    const struct sq_token_rows *x;
    int64_t m, ld_y;
    float *y;
    const int64_t *index;
};

/* Items are outputs. The codes of a chunk stay in the cache while all tokens meet them. */
static void
multiply_rows(void *context, int64_t begin, int64_t end, int thread)
{
    const struct rows_job *j = context;
    const int bits = j->w->bits;
    const int64_t k = j->w->k;
    const struct sq_code_rows part = {.bits = bits,
                                      .k = k,
                                      .rows = j->w->rows - begin,
                                      .codes = j->w->codes + begin * sq_code_row_bytes(bits, k),
                                      .scales = j->w->scales + begin * sq_code_row_scales(k)};
    (void)thread;
    j->kernels->gemm_rows(&part, end - begin, j->x, j->m, j->y + begin, j->ld_y);
}

sq_status
sq_linear_rows(const struct sq_code_rows *w, int activation_bits, const float *x, int64_t m,
               float *y, int64_t ld_y)
{
    int64_t elements;
    if (!w || !w->codes || !w->scales || !x || !y) {
        return SQ_ERR_NULL;
    }
    if (!sound(w) || m < 0 || ld_y < w->rows) {
        return SQ_ERR_SHAPE;
    }
    const int parts = activation_bits / 8;
    if (parts < 1 || parts > SQ_ROW_PARTS || activation_bits % 8 ||
        !sq_product(w->rows, w->k, &elements) ||
        !sq_product(m, sq_max_i64(w->k, ld_y), &elements)) {
        return SQ_ERR_RANGE;
    }
    const int64_t together = SQ_ROW_TOKENS / parts;
    struct coded_tokens tokens =
        make_tokens(sq_min_i64(m, together) * parts, parts, sq_code_row_scales(w->k));
    if (!tokens.codes) {
        return SQ_ERR_NOMEM;
    }
    struct rows_job j = {
        .kernels = sq_kernels_active(), .w = w, .x = &tokens.rows, .ld_y = ld_y, .y = y};
    const int64_t fitting = CHUNK_BYTES / sq_code_row_bytes(w->bits, w->k);
    const int64_t chunk = sq_max_i64(1, fitting / CHUNK_OUTPUTS_STEP) * CHUNK_OUTPUTS_STEP;
    for (int64_t t = 0; t < m && !sq_stopped(); t += together) {
        j.m = sq_min_i64(together, m - t);
        for (int64_t i = 0; i < j.m; i++) {
            code_token(j.kernels, x + (t + i) * w->k, w->k, w->bits, i, &tokens);
        }
        sq_parallel_for(w->rows, chunk, multiply_rows, &j);
        j.y += j.m * ld_y;
    }
    free(tokens.codes);
    return SQ_OK;
}

static void
gather(void *context, int64_t begin, int64_t end, int thread)
{
    const struct rows_job *j = context;
    const struct sq_code_rows *w = j->w;
    (void)thread;
    for (int64_t i = begin; i < end; i++) {
        const int64_t row = j->index[i];
        const uint8_t *codes = w->codes + row * sq_code_row_bytes(w->bits, w->k);
        for (int64_t p = 0; p < w->k; p++) {
            j->y[i * w->k + p] =
                sq_scale_of_row(w, row, p) * (float)sq_code_of_row(w->bits, codes, p);
        }
    }
}

sq_status
sq_gather_code_rows(const struct sq_code_rows *w, const int64_t *index, int64_t m, float *out)
{
    int64_t elements;
    if (!w || !w->codes || !w->scales || !index || !out) {
        return SQ_ERR_NULL;
    }
    if (!sound(w) || m < 0) {
        return SQ_ERR_SHAPE;
    }
    if (!sq_product(w->rows, w->k, &elements) || !sq_product(m, w->k, &elements)) {
        return SQ_ERR_RANGE;
    }
    for (int64_t i = 0; i < m; i++) {
        if (index[i] < 0 || index[i] >= w->rows) {
            return SQ_ERR_RANGE;
        }
    }
    struct rows_job j = {.w = w, .y = out, .index = index};
    sq_parallel_for(m, sq_max_i64(1, GATHER_GRAIN / w->k), gather, &j);
    return SQ_OK;
}
