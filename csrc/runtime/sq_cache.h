/* SPDX-License-Identifier: Apache-2.0 */
/* The KV cache, and its pages as attention reads and writes them. */
#ifndef SQ_CACHE_H
#define SQ_CACHE_H

#include "core/sq_types.h"

/* ---- keys and values of every layer, in pages of SQ_PAGE_TOKENS positions of
 * one sequence and layer, taken when a position is first written and given back by _release. A
 * position that was never written holds zeros. bits:
 *   32, 16  float32, float16 (clamped to finite values);
 *   8, 4    per token and head unsigned codes, x = scale * code + minimum, scale and minimum in
 *           float16; a head with NaN or Inf becomes NaN. With hadamard, queries and keys take the
 *           orthonormal matrix of sq_hadamard_matrix(head_dim) after the rotary embedding, which
 *           spreads a key's outlying channels over its codes and leaves the scores as they are.
 * With bfloat16, that stands in place of float16: coarser, and as wide as float32.
 * No call may run beside another one on the same cache, not on another layer either. */
#define SQ_PAGE_TOKENS 64
struct sq_kv_shape {
    int64_t layers, sequences, kv_heads, head_dim;
    int64_t capacity;    /* positions of a sequence */
    int64_t limit_bytes; /* of pages; 0: none */
    int bits, hadamard, bfloat16;
};
typedef struct sq_kv_cache_t sq_kv_cache_t;

/* No page is taken yet. SQ_ERR_RANGE: a size below 1, bits that are none of the above, more than
 * 2^31 - 1 sequences, 2^31 positions or 2^24 head_dim. SQ_ERR_NOMEM also where sizes overflow. */
sq_status
sq_kv_cache_create(const struct sq_kv_shape *shape, sq_kv_cache_t **out);

void
sq_kv_cache_destroy(sq_kv_cache_t *cache);

const struct sq_kv_shape *
sq_kv_cache_shape(const sq_kv_cache_t *cache);

/* Bytes of one page, and of all pages in memory: those of sequences and, for reuse, at most as many
 * free ones. The second may be called while another call runs. */
int64_t
sq_kv_cache_page_bytes(const sq_kv_cache_t *cache);
int64_t
sq_kv_cache_bytes(const sq_kv_cache_t *cache);

/* The largest magnitude of all keys and values that were stored, NaN left out, and how many of them
 * were beyond what the cache can hold, so that the nearest that it can was taken. Of keys as they
 * are kept: rotated. Both may be called while another call runs. */
float
sq_kv_cache_largest(const sq_kv_cache_t *cache);
int64_t
sq_kv_cache_clamped(const sq_kv_cache_t *cache);

/* Takes the pages of layers first .. last - 1 that position[t] of sequence[t], t < m, still need.
 * SQ_ERR_NOMEM: no memory, or more than limit_bytes; nothing was taken then. SQ_ERR_INTERRUPTED:
 * some of them were taken. */
sq_status
sq_kv_cache_reserve(sq_kv_cache_t *cache, int64_t first, int64_t last, const int32_t *sequence,
                    const int64_t *position, int64_t m);

/* Frees the pages of a sequence in all layers; it holds zeros again. */
sq_status
sq_kv_cache_release(sq_kv_cache_t *cache, int64_t sequence);

/* Frees the pages of a sequence in a layer that end before a position, which no later token sees:
 * those outside of its window. They hold zeros again. */
sq_status
sq_kv_cache_forget(sq_kv_cache_t *cache, int64_t layer, int64_t sequence, int64_t position);

/* keys, values [count][kv_heads][head_dim] <- what positions 0 .. count - 1 of a sequence hold in a
 * layer, as attention sees it (keys rotated). */
sq_status
sq_kv_cache_read(const sq_kv_cache_t *cache, int64_t layer, int64_t sequence, int64_t count,
                 float *keys, float *values);

/* x [m][n] -> codes [m][n] and each row's scale and minimum, float16 bits, as the cache with 8 or 4
 * bits rounds a head: both are rounded so that every x is within half a step of scale * code +
 * minimum as long as it is a float16 in size. */
sq_status
sq_kv_quantize(int bits, const float *x, int64_t m, int64_t n, uint8_t *codes, uint16_t *scales,
               uint16_t *minima);

/* ---- for attention: the callers have checked layers, sequences, positions and heads, and reserved
 * the pages that they write. */
struct sq_kernels;

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
sq_cache_store(sq_kv_cache_t *cache, const struct sq_kernels *kernels, uint8_t *block, int64_t slot,
               const float *key, const float *value);

/* Keys of a block, transposed: [head_dim][SQ_PAGE_TOKENS]. In tile, of that size, or in place. */
const float *
sq_cache_keys(const sq_kv_cache_t *cache, const struct sq_kernels *kernels, const uint8_t *block,
              float *tile);

/* Keys [head_dim][SQ_PAGE_TOKENS] and values [SQ_PAGE_TOKENS][head_dim] of a block as they lie
 * there, in 16-bit floats; NULL where the cache has others or the page was never taken. */
const uint16_t *
sq_cache_half_keys(const sq_kv_cache_t *cache, const uint8_t *block);

const uint16_t *
sq_cache_half_values(const sq_kv_cache_t *cache, const uint8_t *block);

/* Values of places from .. from + count - 1 of a block: [count][head_dim], in tile or in place. */
const float *
sq_cache_values(const sq_kv_cache_t *cache, const struct sq_kernels *kernels, const uint8_t *block,
                int64_t from, int64_t count, float *tile);

#endif
