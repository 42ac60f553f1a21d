/* SPDX-License-Identifier: Apache-2.0 */
/* The attention block: q, k, v with their norms and rotary embedding, the cache, attention, o. */
#ifndef SQ_ATTENTION_H
#define SQ_ATTENTION_H

#include "runtime/sq_cache.h"
#include "runtime/sq_norm.h"
#include "runtime/sq_rotary.h"
#include "runtime/sq_site.h"

#define SQ_HEADS_MAX ((int64_t)1 << 16)

/* Latent attention (arXiv 2405.04434). Queries are q_b(q_a_norm(q_a(x))), or q(x) where q_a.n is 0.
 * kv_a(x) is [kv_rank + rope], kv_b(kv_a_norm(its first kv_rank)) is [heads][nope + value_dim],
 * with rope = rotary.dim and nope = head_dim - rope. A head's key is its nope channels, then the
 * rope channels that all heads share; a value is stored as value_dim channels and zeros. The rotary
 * embedding turns the last channels of a head. */
struct sq_latent {
    int64_t value_dim;
    struct sq_linear q_a, q_b, kv_a, kv_b;
    struct sq_norm q_a_norm, kv_a_norm; /* [q_a.n], [kv_rank] */
};

struct sq_attention {
    int64_t heads, kv_heads, head_dim;
    int64_t window;     /* positions that a query sees, its own included; 0: all before it */
    float scale;        /* of the scores */
    float softcap;      /* a score s becomes softcap tanh(s / softcap); 0: it stays */
    float qkv_clip;     /* q, k and v are clamped to +-qkv_clip behind the norms; 0: they stay */
    float query_growth; /* queries are multiplied by 1 + query_growth ln(1 + floor(position / */
    int64_t query_original; /* query_original)); 0: they are not */
    const float *sinks;     /* [heads], a score that takes part in the softmax and has no value; or
                               NULL */
    const float *slopes;    /* [heads], multiply (position of the key - that of the query), which is
                               added to the score; or NULL */
    int64_t slopes_bfloat16; /* 1: what is added instead: scale times slope times the key's
                                position, every number and the product of the two rounded to
                                bfloat16 (Falcon) */
    struct sq_rotary rotary;
    struct sq_norm q_norm, k_norm; /* before the rotary embedding: of each head [head_dim], with one
                                      weight or a row for each; or of all of them [heads * head_dim]
                                    */
    struct sq_linear q, k, v, o;   /* o reads the heads' outputs [head_dim each] */
    int is_latent; /* `latent` in place of k and v, and perhaps of q; o reads [value_dim
                      each] */
    struct sq_latent latent;
};

/* Scratch of one chunk of tokens. */
struct sq_attention_scratch {
    float *k, *v;    /* [chunk][kv_heads * head_dim] */
    float *hadamard; /* [chunk][heads * head_dim] */
    float *latent;   /* [chunk][sq_latent_floats] */
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

/* Second half, behind sq_attend: out [m][hidden] <- o of the heads' outputs, mixed [m][heads *
 * head_dim]. */
sq_status
sq_attention_output(const struct sq_attention *a, struct sq_reader *reader, const float *mixed,
                    const struct sq_attention_scratch *scratch, float *out);

#endif
