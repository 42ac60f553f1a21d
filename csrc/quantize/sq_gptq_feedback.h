/* SPDX-License-Identifier: Apache-2.0 */
/* GPTQ's error feedback in 8 bits: what sq_gptq_round.c asks of sq_gptq_feedback.c. */
#ifndef SQ_GPTQ_FEEDBACK_H
#define SQ_GPTQ_FEEDBACK_H

#include <stdint.h>

#include "kernels/gptq_lanes.h"
#include "quantize/sq_quantize.h"

/* SQ_GPTQ_BLOCK columns are rounded between two products with all that was rounded before. Blocks
 * are counted from the last column down; block b ends before column k - b * SQ_GPTQ_BLOCK. Four of
 * them are a run: one product for a panel, one scale for a row. */
enum {
    SQ_GPTQ_RUN_BLOCKS = 4,
    SQ_GPTQ_RUN = SQ_GPTQ_RUN_BLOCKS * SQ_GPTQ_BLOCK,
    SQ_GPTQ_RUN_SUMS = SQ_GPTQ_RUN / SQ_K_ALIGN + 1,
    SQ_GPTQ_ROWS = 256 /* rows of weights that go through all columns together, at most */
};

/* Errors of rows of weights in codes of 8 bits, block by block as they are rounded; 0 for what is
 * not. In a run the blocks rise, and in a block the columns. */
struct sq_gptq_errors {
    int64_t rows;
    int8_t *codes; /* [runs][rows][SQ_GPTQ_RUN] */
    int32_t *sums; /* [runs][rows][SQ_GPTQ_RUN_SUMS] */
    float *scales; /* [runs][rows] */
};

/* 1, or 0 without memory. Free it either way. */
int
sq_gptq_make_errors(int64_t k, int64_t rows, struct sq_gptq_errors *errors);

void
sq_gptq_free_errors(struct sq_gptq_errors *errors);

/* Block b of `errors` <- that of values [rows][k], and with it the others of its run, whose scale
 * may be another now. A row with NaN or Inf gets a scale of NaN. */
void
sq_gptq_code_errors(const struct sq_gptq_feedback *feedback, const float *values, int64_t b,
                    struct sq_gptq_errors *errors);

/* sums [rows][width] <- for columns begin .. begin + width - 1, the errors of all columns from
 * k - blocks * SQ_GPTQ_BLOCK on times the factor. The columns end at a block's end, at or below
 * that. */
void
sq_gptq_sum_errors(const struct sq_gptq_feedback *feedback, const struct sq_gptq_errors *errors,
                   int64_t blocks, int64_t begin, int64_t width, float *sums, int64_t ld);

#endif
