/* SPDX-License-Identifier: Apache-2.0 */
/* Rotary embedding of the first channels of a head. */
#ifndef SQ_ROTARY_H
#define SQ_ROTARY_H

#include <stddef.h>

#include "runtime/sq_fault.h"
#include "runtime/sq_tokens.h"

/* Pair i < dim / 2 of a head's channels is turned by position * frequency[i]: channels i and i +
 * dim / 2, or 2 i and 2 i + 1 where `interleaved`. The channels from dim on stay as they are.
 *
 * The frequencies are inv_freq. In a call whose tokens of a sequence reach a length L > original (L
 * is one more than their largest position) all its tokens in this call have others, if there are:
 *   long_inv_freq; or, with dynamic = s > 0,
 *   theta'^(-2 i / dim), theta' = theta (s L / original - (s - 1))^(dim / (dim - 2)). */
struct sq_rotary {
    int64_t dim;                /* even; 0: no rotary embedding */
    const float *inv_freq;      /* [dim / 2] */
    const float *long_inv_freq; /* [dim / 2] or NULL */
    float scale;                /* multiplies cos and sin */
    float dynamic, theta;       /* dynamic 0: theta is not read */
    int64_t original;           /* read with long_inv_freq or dynamic only */
    int64_t interleaved;
};

sq_status
sq_rotary_seal(const struct sq_rotary *r, int64_t head_dim, struct sq_fault *fault);

/* Whether both give the same table. */
int
sq_rotary_equal(const struct sq_rotary *a, const struct sq_rotary *b);

/* Bytes that sq_rotary_table writes for m tokens: the table and scratch behind it. */
size_t
sq_rotary_table_bytes(const struct sq_rotary *r, int64_t m);

/* table [m][dim / 2][2] <- cos and sin of position * frequency, times scale. */
void
sq_rotary_table(const struct sq_rotary *r, const struct sq_tokens *tokens, float *table);

/* x [heads][head_dim] of one token, in place; table: the token's row. */
void
sq_rotary_apply(const struct sq_rotary *r, const float *table, float *x, int64_t heads,
                int64_t head_dim);

#endif
