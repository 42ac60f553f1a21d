/* SPDX-License-Identifier: Apache-2.0 */
/* GPTQ's rounding within a block of columns (sq_gptq_round.c), LANES rows side by side: a column's
 * rounding, and what its errors do, are vectors over rows. Plain C that is compiled for each
 * instruction set; products and sums are rounded one by one, so that all give the same bits. */
#ifndef GPTQ_LANES_H
#define GPTQ_LANES_H

#include <stdint.h>

enum {
    SQ_GPTQ_BLOCK = 128,
    SQ_GPTQ_LANES = 32, /* their sums fit 16 KiB */
    SQ_GPTQ_DELAY = 4   /* columns whose errors reach the block's other columns together */
};

struct sq_gptq_lanes {
    float sums[SQ_GPTQ_BLOCK][SQ_GPTQ_LANES];   /* T of the block's columns */
    float values[SQ_GPTQ_BLOCK][SQ_GPTQ_LANES]; /* weights, and errors where a column is rounded */
    float scales[SQ_GPTQ_BLOCK][SQ_GPTQ_LANES];
    int8_t codes[SQ_GPTQ_BLOCK][SQ_GPTQ_LANES];
};

/* Columns begin .. end - 1 of a block. */
struct sq_gptq_columns {
    int bits;
    int64_t begin, end;
    const float *factor; /* the factor's square on the diagonal, from the block's column 0 on */
    int64_t ld;
    const float *inv_diagonal; /* of the block's columns */
};

/* Rounds column i and leaves its errors in place of the weights. A NaN, possible where sums
 * overflow, becomes the lowest code. */
static inline void
round_gptq_column(const struct sq_gptq_columns *c, int64_t i, struct sq_gptq_lanes *lanes)
{
    const float high = (float)((1 << (c->bits - 1)) - 1), low = -high - 1.0f;
    const float rounder = 0x1.8p23f; /* added and taken away, it rounds half to even */
    const float inv_diagonal = c->inv_diagonal[i];
    float *restrict value = lanes->values[i];
    const float *restrict sums = lanes->sums[i], *restrict scale = lanes->scales[i];
    for (int64_t r = 0; r < SQ_GPTQ_LANES; r++) {
        const float inv_scale = scale[r] > 0.0f ? 1.0f / scale[r] : 0.0f;
        float code = (value[r] + sums[r] * inv_diagonal) * inv_scale;
        code = code > low ? code : low;
        code = code < high ? code : high;
        code = (code + rounder) - rounder;
        code = scale[r] > 0.0f ? code : 0.0f;
        lanes->codes[i][r] = (int8_t)code;
        value[r] -= scale[r] * code;
    }
}

/* sums += errors times l of `count` columns, the last one first. errors [count][LANES] go down from
 * the last column, and so does l in steps of ld. */
static inline void
feed_gptq_back(int64_t count, const float *restrict errors, const float *l, int64_t ld,
               float *restrict sums)
{
    if (count == SQ_GPTQ_DELAY) {
        for (int64_t r = 0; r < SQ_GPTQ_LANES; r++) {
            float sum = sums[r];
            for (int64_t d = 0; d < SQ_GPTQ_DELAY; d++) {
                sum += errors[r - d * SQ_GPTQ_LANES] * l[-d * ld];
            }
            sums[r] = sum;
        }
        return;
    }
    for (int64_t d = 0; d < count; d++) {
        for (int64_t r = 0; r < SQ_GPTQ_LANES; r++) {
            sums[r] += errors[r - d * SQ_GPTQ_LANES] * l[-d * ld];
        }
    }
}

/* Rounds columns end - 1 down to begin and feeds the errors back into the sums down to the block's
 * column 0: at once into the DELAY columns that come next, into the others together. Every sum gets
 * its terms in the order of the columns all the same. */
static inline void
round_gptq_columns(const struct sq_gptq_columns *c, struct sq_gptq_lanes *lanes)
{
    for (int64_t stop = c->end, first; stop > c->begin; stop = first) {
        first = stop - SQ_GPTQ_DELAY > c->begin ? stop - SQ_GPTQ_DELAY : c->begin;
        for (int64_t j = stop - 1; j >= first; j--) {
            round_gptq_column(c, j, lanes);
            for (int64_t i = first; i < j; i++) {
                feed_gptq_back(1, lanes->values[j], c->factor + j * c->ld + i, c->ld,
                               lanes->sums[i]);
            }
        }
        for (int64_t i = 0; i < first; i++) {
            feed_gptq_back(stop - first, lanes->values[stop - 1],
                           c->factor + (stop - 1) * c->ld + i, c->ld, lanes->sums[i]);
        }
    }
}

#endif
