/* SPDX-License-Identifier: Apache-2.0 */
/* Attention of queries over the keys and values of a cache. */
#ifndef SQ_ATTEND_H
#define SQ_ATTEND_H

#include "runtime/sq_attention.h"

/* Threads that sq_attend can use: scratch for so many is in its workspace. A constant, so that the
 * workspace fits whatever the number of threads is when the call comes; untouched scratch takes no
 * memory. */
#define SQ_ATTENTION_LANES 64

/* Bytes of workspace for m tokens at positions below length. */
size_t
sq_attend_bytes(const struct sq_attention *a, int64_t m, int64_t length);

/* q [m][heads * head_dim] <- causal attention of each query over its sequence's part of a layer of
 * the cache, in place. */
void
sq_attend(const struct sq_attention *a, const struct sq_tokens *tokens, const sq_kv_cache_t *cache,
          int64_t layer, float *q, void *workspace);

#endif
