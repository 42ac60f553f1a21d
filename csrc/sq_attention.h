/* SPDX-License-Identifier: Apache-2.0 */
/* The steps between the projections of a layer: rotary embedding, cache write, attention. The
 * caller (sq_decoder.c) has checked shapes, positions and sequences. */
#ifndef SQ_ATTENTION_H
#define SQ_ATTENTION_H

#include "sq_internal.h"

/* table [m][head_dim / 2][2] <- cos and sin of position * inv_freq, times rope_scale. */
void
sq_rotary_table(const struct sq_architecture *a, const int64_t *position, int64_t m, float *table);

/* Rotates q [m][heads * head_dim] in place; rotates k [m][kv_heads * head_dim] in place and stores
 * it and v (of k's shape) in the cache at each token's sequence and position. */
void
sq_rotate_and_store(const struct sq_architecture *a, const float *table, float *q, float *k,
                    const float *v, const int32_t *sequence, const int64_t *position, int64_t m,
                    struct sq_kv_cache *cache);

/* Threads that sq_attention can use: scratch for so many is in its workspace. A constant, so that
 * the workspace fits whatever the number of threads is when the call comes; untouched scratch takes
 * no memory. */
#define SQ_ATTENTION_LANES 64

/* Bytes of workspace for sq_attention. */
size_t
sq_attention_workspace_bytes(const struct sq_architecture *a, int64_t m, int64_t capacity);

/* q [m][heads * head_dim] <- causal attention of each query over its sequence's cache, in place. */
void
sq_attention(const struct sq_architecture *a, const struct sq_kv_cache *cache,
             const int32_t *sequence, const int64_t *position, int64_t m, float *q,
             void *workspace);

#endif
