/* SPDX-License-Identifier: Apache-2.0 */
/* The steps between the projections of a layer: rotary embedding, cache write, attention. The
 * caller (sq_decoder.c) has checked shapes, positions and sequences. */
#ifndef SQ_ATTENTION_H
#define SQ_ATTENTION_H

#include "core/sq_internal.h"

/* table [m][head_dim / 2][2] <- cos and sin of position * inv_freq, times rope_scale. */
void
sq_rotary_table(const struct sq_architecture *a, const int64_t *position, int64_t m, float *table);

/* Rotates q [m][heads * head_dim] and k [m][kv_heads * head_dim] in place, by the table and then by
 * the cache's Hadamard, and stores k and v (of k's shape) in a layer of the cache at each token's
 * sequence and position, whose pages are there. scratch: as large as q. */
void
sq_rotate_and_store(const struct sq_architecture *a, const float *table, float *q, float *k,
                    const float *v, const int32_t *sequence, const int64_t *position, int64_t m,
                    sq_kv_cache_t *cache, int64_t layer, float *scratch);

/* Threads that sq_attention can use: scratch for so many is in its workspace. A constant, so that
 * the workspace fits whatever the number of threads is when the call comes; untouched scratch takes
 * no memory. */
#define SQ_ATTENTION_LANES 64

/* Bytes of workspace for sq_attention over positions below length. */
size_t
sq_attention_workspace_bytes(const struct sq_architecture *a, int64_t m, int64_t length);

/* q [m][heads * head_dim] <- causal attention of each query over its sequence's part of a layer of
 * the cache, in place. Positions are below length. */
void
sq_attention(const struct sq_architecture *a, const sq_kv_cache_t *cache, int64_t layer,
             const int32_t *sequence, const int64_t *position, int64_t m, int64_t length, float *q,
             void *workspace);

#endif
