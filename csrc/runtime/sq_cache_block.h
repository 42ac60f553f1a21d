/* SPDX-License-Identifier: Apache-2.0 */
/* A block of the KV cache: keys and values of one kv head at SQ_PAGE_TOKENS positions. */
#ifndef SQ_CACHE_BLOCK_H
#define SQ_CACHE_BLOCK_H

#include <stdint.h>

struct sq_kernels;

/* How a block lies in memory. */
struct sq_block_form {
    int bits, bfloat16;
    int64_t head_dim;
    int64_t row_bytes;    /* of one value */
    int64_t values, meta; /* offsets of values and scales in a block */
    int64_t bytes;        /* of a block */
};

struct sq_block_form
sq_block_form(int bits, int bfloat16, int64_t head_dim);

/* What storing has seen: the largest magnitude, NaN left out, and how many values were clamped. */
struct sq_block_watch {
    float largest;
    int64_t clamped;
};

/* Writes a key and a value [head_dim] to place slot of a block. */
struct sq_block_watch
sq_block_store(const struct sq_block_form *form, const struct sq_kernels *kernels, uint8_t *block,
               int64_t slot, const float *key, const float *value);

/* As sq_cache_keys and sq_cache_values (sq_cache.h); a NULL block holds zeros. */
const float *
sq_block_keys(const struct sq_block_form *form, const struct sq_kernels *kernels,
              const uint8_t *block, float *tile);
const float *
sq_block_values(const struct sq_block_form *form, const struct sq_kernels *kernels,
                const uint8_t *block, int64_t from, int64_t count, float *tile);

#endif
