/* SPDX-License-Identifier: Apache-2.0 */
/* Pages of the KV cache as attention reads and writes them. The callers have checked layers,
 * sequences, positions and heads, and reserved the pages that they write. */
#ifndef SQ_CACHE_H
#define SQ_CACHE_H

#include "core/sq_internal.h"
#include "kernels/sq_kernels.h"

/* What one kv head holds of a page; NULL where the page was never taken. */
uint8_t *
sq_cache_block(const sq_kv_cache_t *cache, int64_t layer, int64_t sequence, int64_t page,
               int64_t head);

/* x [heads][head_dim] <- what the cache's Hadamard makes of it, in place; scratch as large as x.
 * Nothing happens where the cache has none. */
void
sq_cache_rotate(const sq_kv_cache_t *cache, const struct sq_kernels *kernels, float *x,
                int64_t heads, float *scratch);

/* Writes a key and a value [head_dim] to place slot of a block. */
void
sq_cache_store(const sq_kv_cache_t *cache, const struct sq_kernels *kernels, uint8_t *block,
               int64_t slot, const float *key, const float *value);

/* Keys of a block, transposed: [head_dim][SQ_PAGE_TOKENS]. In tile, of that size, or in place. */
const float *
sq_cache_keys(const sq_kv_cache_t *cache, const struct sq_kernels *kernels, const uint8_t *block,
              float *tile);

/* Values of places from .. from + count - 1 of a block: [count][head_dim], in tile or in place. */
const float *
sq_cache_values(const sq_kv_cache_t *cache, const struct sq_kernels *kernels, const uint8_t *block,
                int64_t from, int64_t count, float *tile);

#endif
