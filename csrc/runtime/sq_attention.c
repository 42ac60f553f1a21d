/* SPDX-License-Identifier: Apache-2.0 */
/* The attention block, but for attention itself (sq_attend.c). */
#include "runtime/sq_attention.h"

#include <math.h>

#include "core/sq_internal.h"
#include "core/sq_threads.h"
#include "kernels/sq_kernels.h"
#include "runtime/sq_latent.h"
#include "runtime/sq_rows.h"

enum {
    ROTARY_GRAIN = 1 << 13, /* elements of q turned in one chunk, about */
    STORE_GRAIN = 1 << 12,  /* elements of k stored in one chunk, about */
    STORE_TOKENS = 32,      /* of an item, about */
};

static sq_status
seal_head_norm(const struct sq_norm *norm, int64_t heads, int64_t head_dim, const char *name,
               struct sq_fault *fault)
{
    SQ_TRY(sq_norm_seal(norm, name, fault));
    if (norm->kind == SQ_NORM_NONE ||
        (norm->n == head_dim && (norm->rows == 1 || norm->rows == heads)) ||
        (norm->n == heads * head_dim && norm->rows == 1)) {
        return SQ_OK;
    }
    return sq_refuse(fault, SQ_ERR_SHAPE, -1, "%s: expected a norm of %lld heads, got [%lld][%lld]",
                     name, (long long)heads, (long long)norm->rows, (long long)norm->n);
}

static sq_status
expect_at_least_0(struct sq_fault *fault, const char *name, float found)
{
    if (found >= 0 && found < INFINITY) {
        return SQ_OK;
    }
    return sq_refuse(fault, SQ_ERR_RANGE, -1, "%s: expected at least 0, got %g", name,
                     (double)found);
}

/* What changes the scores. */
static sq_status
seal_scores(const struct sq_attention *a, struct sq_fault *fault)
{
    if (!isfinite(a->query_growth)) {
        return sq_refuse(fault, SQ_ERR_RANGE, -1,
                         "attention.query_growth: expected a finite number");
    }
    SQ_TRY(sq_expect_range(fault, "attention.query_original", a->query_original,
                           a->query_growth != 0, INT32_MAX));
    if (!isfinite(a->scale)) {
        return sq_refuse(fault, SQ_ERR_RANGE, -1, "attention.scale: expected a finite number");
    }
    SQ_TRY(expect_at_least_0(fault, "attention.softcap", a->softcap));
    SQ_TRY(expect_at_least_0(fault, "attention.qkv_clip", a->qkv_clip));
    if (a->sinks && !sq_all_finite(a->sinks, a->heads)) {
        return sq_refuse(fault, SQ_ERR_RANGE, -1, "attention.sinks: expected finite numbers");
    }
    if (a->slopes && !sq_all_finite(a->slopes, a->heads)) {
        return sq_refuse(fault, SQ_ERR_RANGE, -1, "attention.slopes: expected finite numbers");
    }
    SQ_TRY(sq_expect_range(fault, "attention.slopes_bfloat16", a->slopes_bfloat16, 0, 1));
    if (a->slopes_bfloat16 && !a->slopes) {
        return sq_refuse(fault, SQ_ERR_NULL, -1,
                         "attention.slopes_bfloat16: expected slopes beside it, got none");
    }
    return SQ_OK;
}

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
    const int64_t q = a->heads * a->head_dim, kv = a->kv_heads * a->head_dim;
    const enum sq_value x = SQ_VALUE_MIX;
    SQ_TRY(seal_scores(a, fault));
    SQ_TRY(sq_rotary_seal(&a->rotary, a->head_dim, fault));
    SQ_TRY(seal_head_norm(&a->q_norm, a->heads, a->head_dim, "attention.q_norm", fault));
    SQ_TRY(seal_head_norm(&a->k_norm, a->kv_heads, a->head_dim, "attention.k_norm", fault));
    if (a->is_latent) {
        SQ_TRY(sq_latent_seal(a, hidden, sites, n_sites, fault));
        return sq_linear_seal(&a->o, hidden, a->heads * a->latent.value_dim, SQ_VALUE_MIXED,
                              "attention.o", sites, n_sites, fault);
    }
    SQ_TRY(sq_linear_seal(&a->q, q, hidden, x, "attention.q", sites, n_sites, fault));
    SQ_TRY(sq_linear_seal(&a->k, kv, hidden, x, "attention.k", sites, n_sites, fault));
    SQ_TRY(sq_linear_seal(&a->v, kv, hidden, x, "attention.v", sites, n_sites, fault));
    return sq_linear_seal(&a->o, hidden, q, SQ_VALUE_MIXED, "attention.o", sites, n_sites, fault);
}

/* A chunk of m tokens; the arrays start at its first one. */
struct store_job {
    const struct sq_attention *a;
    const float *table, *v;
    float *q, *k, *scratch;
    const int32_t *sequence;
    const int64_t *position;
    const struct sq_kernels *kernels;
    sq_kv_cache_t *cache;
    int64_t layer, m;
    int64_t part; /* tokens that an item stores */
};

static void
grow_queries(const struct sq_attention *a, int64_t position, float *q)
{
    if (!a->query_original || position < a->query_original) {
        return;
    }
    const float times = (float)(position / a->query_original);
    const float growth = 1.0f + a->query_growth * logf(1.0f + times);
    for (int64_t i = 0; i < a->heads * a->head_dim; i++) {
        q[i] *= growth;
    }
}

static void
rotate_tokens(void *context, int64_t begin, int64_t end, int thread)
{
    const struct store_job *j = context;
    const struct sq_attention *a = j->a;
    const int64_t d = a->head_dim, heads = a->heads, kv = a->kv_heads;
    const int64_t first = a->is_latent ? d - a->rotary.dim : 0; /* channel that is turned */
    (void)thread;
    for (int64_t t = begin; t < end; t++) {
        float *q = j->q + t * heads * d, *k = j->k + t * kv * d;
        float *scratch = j->scratch + t * heads * d;
        sq_rotary_apply(&a->rotary, j->table + t * a->rotary.dim, q + first, heads, d);
        grow_queries(a, j->position[t], q);
        sq_rotary_apply(&a->rotary, j->table + t * a->rotary.dim, k + first, kv, d);
        sq_cache_rotate(j->cache, j->kernels, q, heads, scratch);
        sq_cache_rotate(j->cache, j->kernels, k, kv, scratch);
    }
}

/* Items are parts of the tokens times kv heads. */
static void
store_heads(void *context, int64_t begin, int64_t end, int thread)
{
    const struct store_job *j = context;
    const int64_t d = j->a->head_dim, kv = j->a->kv_heads;
    (void)thread;
    for (int64_t item = begin; item < end; item++) {
        const int64_t h = item % kv, first = item / kv * j->part;
        for (int64_t t = first; t < sq_min_i64(j->m, first + j->part); t++) {
            const int64_t page = j->position[t] / SQ_PAGE_TOKENS;
            uint8_t *block = sq_cache_block(j->cache, j->layer, j->sequence[t], page, h);
            sq_cache_store(j->cache, j->kernels, block, j->position[t] % SQ_PAGE_TOKENS,
                           j->k + (t * kv + h) * d, j->v + (t * kv + h) * d);
        }
    }
}

/* x [m][width], the heads of each token, in place. */
static void
norm_heads(const struct sq_norm *norm, float *x, int64_t m, int64_t width)
{
    if (norm->kind) {
        sq_norm_rows(norm, x, m * (width / norm->n), x);
    }
}

struct clamp_job {
    float *x;
    int64_t width;
    float limit;
};

/* NaN stays NaN. */
static void
clamp_range(void *context, int64_t begin, int64_t end, int thread)
{
    const struct clamp_job *j = context;
    (void)thread;
    for (int64_t i = begin * j->width; i < end * j->width; i++) {
        const float x = j->x[i];
        j->x[i] = x > j->limit ? j->limit : x < -j->limit ? -j->limit : x;
    }
}

static void
clamp_rows(float *x, int64_t m, int64_t width, float limit)
{
    struct clamp_job j = {.x = x, .width = width, .limit = limit};
    sq_parallel_for(m, sq_row_grain(width), clamp_range, &j);
}

sq_status
sq_attention_project(const struct sq_attention *a, struct sq_reader *reader,
                     const struct sq_tokens *tokens, sq_kv_cache_t *cache, int64_t layer,
                     const float *x, const float *table, float *q,
                     const struct sq_attention_scratch *scratch)
{
    const int64_t m = reader->m, d = a->head_dim;
    if (a->is_latent) {
        SQ_TRY(sq_latent_project(a, reader, x, q, scratch->k, scratch->v, scratch->latent));
    }
    else {
        const struct sq_linear *const linears[] = {&a->q, &a->k, &a->v};
        SQ_TRY(
            sq_linears_apply(reader, linears, 3, x, (float *const[]){q, scratch->k, scratch->v}));
    }
    norm_heads(&a->q_norm, q, m, a->heads * d);
    norm_heads(&a->k_norm, scratch->k, m, a->kv_heads * d);
    if (a->qkv_clip > 0) {
        clamp_rows(q, m, a->heads * d, a->qkv_clip);
        clamp_rows(scratch->k, m, a->kv_heads * d, a->qkv_clip);
        clamp_rows(scratch->v, m, a->kv_heads * d, a->qkv_clip);
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
                          .m = m,
                          /* the 4-bit keys of two neighbouring tokens share a byte */
                          .part = sq_kv_cache_shape(cache)->bits == 4
                                      ? sq_max_i64(1, m)
                                      : sq_min_i64(sq_max_i64(1, m), STORE_TOKENS)};
    sq_parallel_for(m, sq_max_i64(1, ROTARY_GRAIN / (a->heads * d)), rotate_tokens, &j);
    sq_parallel_for(a->kv_heads * sq_ceil_div(m, j.part), sq_max_i64(1, STORE_GRAIN / (j.part * d)),
                    store_heads, &j);
    return SQ_OK;
}

sq_status
sq_attention_output(const struct sq_attention *a, struct sq_reader *reader, const float *mixed,
                    const struct sq_attention_scratch *scratch, float *out)
{
    if (a->is_latent && a->latent.value_dim < a->head_dim) {
        sq_latent_values(a, mixed, reader->m, scratch->latent);
        mixed = scratch->latent;
    }
    return sq_linear_apply(reader, &a->o, mixed, out);
}
