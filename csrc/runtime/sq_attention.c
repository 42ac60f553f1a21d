/* SPDX-License-Identifier: Apache-2.0 */
/* The attention block, but for attention itself (sq_attend.c). */
#include "runtime/sq_attention.h"

#include <math.h>

#include "core/sq_internal.h"
#include "core/sq_threads.h"
#include "kernels/sq_kernels.h"

enum {
    ROTARY_GRAIN = 1 << 15, /* elements of q turned in one chunk, about */
    STORE_GRAIN = 1 << 14,  /* elements of k stored in one chunk, about */
};

sq_status
sq_attention_seal(const struct sq_attention *a, int64_t hidden, struct sq_site *sites, int n_sites,
                  struct sq_fault *fault)
{
    SQ_TRY(sq_expect_range(fault, "attention.heads", a->heads, 1, SQ_HEADS_MAX));
    SQ_TRY(sq_expect_range(fault, "attention.kv_heads", a->kv_heads, 1, SQ_HEADS_MAX));
    SQ_TRY(sq_expect_range(fault, "attention.head_dim", a->head_dim, 1, SQ_WIDTH_MAX));
    SQ_TRY(sq_expect_range(fault, "attention: heads * head_dim", a->heads * a->head_dim, 1,
                           SQ_WIDTH_MAX));
    SQ_TRY(sq_expect_range(fault, "attention.window", a->window, 0, INT32_MAX));
    if (a->heads % a->kv_heads) {
        return sq_refuse(fault, SQ_ERR_SHAPE, -1,
                         "attention.heads: expected a multiple of kv_heads = %lld, got %lld",
                         (long long)a->kv_heads, (long long)a->heads);
    }
    if (!isfinite(a->scale)) {
        return sq_refuse(fault, SQ_ERR_RANGE, -1, "attention.scale: expected a finite number");
    }
    const int64_t q = a->heads * a->head_dim, kv = a->kv_heads * a->head_dim;
    const enum sq_value x = SQ_VALUE_MIX;
    SQ_TRY(sq_rotary_seal(&a->rotary, a->head_dim, fault));
    SQ_TRY(sq_norm_seal(&a->q_norm, "attention.q_norm", fault));
    SQ_TRY(sq_norm_seal(&a->k_norm, "attention.k_norm", fault));
    SQ_TRY(sq_linear_seal(&a->q, q, hidden, x, "attention.q", sites, n_sites, fault));
    SQ_TRY(sq_linear_seal(&a->k, kv, hidden, x, "attention.k", sites, n_sites, fault));
    SQ_TRY(sq_linear_seal(&a->v, kv, hidden, x, "attention.v", sites, n_sites, fault));
    return sq_linear_seal(&a->o, hidden, q, SQ_VALUE_MIXED, "attention.o", sites, n_sites, fault);
}

/* Tokens begin .. begin + m - 1 of the call; the arrays start at the chunk's first token. */
struct store_job {
    const struct sq_attention *a;
    const float *table, *v;
    float *q, *k, *scratch;
    const int32_t *sequence;
    const int64_t *position;
    const struct sq_kernels *kernels;
    sq_kv_cache_t *cache;
    int64_t layer, m;
};

static void
rotate_tokens(void *context, int64_t begin, int64_t end, int thread)
{
    const struct store_job *j = context;
    const struct sq_attention *a = j->a;
    const int64_t d = a->head_dim, heads = a->heads, kv = a->kv_heads;
    (void)thread;
    for (int64_t t = begin; t < end; t++) {
        float *q = j->q + t * heads * d, *k = j->k + t * kv * d;
        float *scratch = j->scratch + t * heads * d;
        sq_rotary_apply(&a->rotary, j->table + t * a->rotary.dim, q, heads, d);
        sq_rotary_apply(&a->rotary, j->table + t * a->rotary.dim, k, kv, d);
        sq_cache_rotate(j->cache, j->kernels, q, heads, scratch);
        sq_cache_rotate(j->cache, j->kernels, k, kv, scratch);
    }
}

/* By kv heads, because the 4-bit keys of two neighbouring tokens share a byte. */
static void
store_heads(void *context, int64_t begin, int64_t end, int thread)
{
    const struct store_job *j = context;
    const int64_t d = j->a->head_dim, kv = j->a->kv_heads;
    (void)thread;
    for (int64_t h = begin; h < end; h++) {
        for (int64_t t = 0; t < j->m; t++) {
            const int64_t page = j->position[t] / SQ_PAGE_TOKENS;
            uint8_t *block = sq_cache_block(j->cache, j->layer, j->sequence[t], page, h);
            sq_cache_store(j->cache, j->kernels, block, j->position[t] % SQ_PAGE_TOKENS,
                           j->k + (t * kv + h) * d, j->v + (t * kv + h) * d);
        }
    }
}

sq_status
sq_attention_project(const struct sq_attention *a, struct sq_reader *reader,
                     const struct sq_tokens *tokens, sq_kv_cache_t *cache, int64_t layer,
                     const float *x, const float *table, float *q,
                     const struct sq_attention_scratch *scratch)
{
    const int64_t m = reader->m, d = a->head_dim;
    SQ_TRY(sq_linear_apply(reader, &a->q, x, q));
    SQ_TRY(sq_linear_apply(reader, &a->k, x, scratch->k));
    SQ_TRY(sq_linear_apply(reader, &a->v, x, scratch->v));
    if (a->q_norm.kind) {
        sq_norm_rows(&a->q_norm, q, m * a->heads, d, q);
    }
    if (a->k_norm.kind) {
        sq_norm_rows(&a->k_norm, scratch->k, m * a->kv_heads, d, scratch->k);
    }
    struct store_job j = {.a = a,
                          .table = table,
                          .q = q,
                          .k = scratch->k,
                          .v = scratch->v,
                          .scratch = scratch->hadamard,
                          .sequence = tokens->sequence + reader->begin,
                          .position = tokens->position + reader->begin,
                          .kernels = sq_kernels_active(),
                          .cache = cache,
                          .layer = layer,
                          .m = m};
    sq_parallel_for(m, sq_max_i64(1, ROTARY_GRAIN / (a->heads * d)), rotate_tokens, &j);
    sq_parallel_for(a->kv_heads, sq_max_i64(1, STORE_GRAIN / sq_max_i64(1, m * d)), store_heads,
                    &j);
    return SQ_OK;
}
