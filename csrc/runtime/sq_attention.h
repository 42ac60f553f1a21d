/* SPDX-License-Identifier: Apache-2.0 */
/* The attention block: q, k, v with their norms and rotary embedding, the cache, attention, o. */
#ifndef SQ_ATTENTION_H
#define SQ_ATTENTION_H

#include "runtime/sq_cache.h"
#include "runtime/sq_norm.h"
#include "runtime/sq_rotary.h"
#include "runtime/sq_site.h"

#define SQ_HEADS_MAX ((int64_t)1 << 16)

struct sq_attention {
    int64_t heads, kv_heads, head_dim;
    int64_t window; /* positions that a query sees, its own included; 0: all before it */
    float scale;    /* of the scores */
    struct sq_rotary rotary;
    struct sq_norm q_norm, k_norm; /* of each head [head_dim], before the rotary embedding */
    struct sq_linear q, k, v, o;
};

/* The tokens of a call: token t of sequence[t] stands at position[t]. */
struct sq_tokens {
    int64_t m;
    int64_t length; /* one more than the largest position */
    const int32_t *sequence;
    const int64_t *position;
};

/* Scratch of one chunk of tokens. */
struct sq_attention_scratch {
    float *k, *v;    /* [chunk][kv_heads * head_dim] */
    float *hadamard; /* [chunk][heads * head_dim] */
};

/* Proves the block; it reads SQ_VALUE_MIX, of `hidden` channels. */
sq_status
sq_attention_seal(const struct sq_attention *a, int64_t hidden, struct sq_site *sites, int n_sites,
                  struct sq_fault *fault);

/* First half, for the tokens of the reader's chunk: x [m][hidden] gives queries q [m][heads *
 * head_dim], and keys and values that go to a layer of the cache, whose pages are there. table:
 * sq_rotary_table of these tokens. */
sq_status
sq_attention_project(const struct sq_attention *a, struct sq_reader *reader,
                     const struct sq_tokens *tokens, sq_kv_cache_t *cache, int64_t layer,
                     const float *x, const float *table, float *q,
                     const struct sq_attention_scratch *scratch);

#endif
