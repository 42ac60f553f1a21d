/* SPDX-License-Identifier: Apache-2.0 */
/* Rotary embedding of the first channels of a head. */
#ifndef SQ_ROTARY_H
#define SQ_ROTARY_H

#include "runtime/sq_fault.h"

/* Channels i and i + dim / 2 of a head are turned by position * inv_freq[i], i < dim / 2; the
 * channels from dim on stay as they are. */
struct sq_rotary {
    int64_t dim;           /* even; 0: no rotary embedding */
    const float *inv_freq; /* [dim / 2] */
    float scale;           /* multiplies cos and sin */
};

sq_status
sq_rotary_seal(const struct sq_rotary *r, int64_t head_dim, struct sq_fault *fault);

/* Whether both give the same table. */
int
sq_rotary_equal(const struct sq_rotary *a, const struct sq_rotary *b);

/* table [m][dim / 2][2] <- cos and sin of position * inv_freq, times scale. */
void
sq_rotary_table(const struct sq_rotary *r, const int64_t *position, int64_t m, float *table);

/* x [heads][head_dim] of one token, in place; table: the token's row. */
void
sq_rotary_apply(const struct sq_rotary *r, const float *table, float *x, int64_t heads,
                int64_t head_dim);

#endif
