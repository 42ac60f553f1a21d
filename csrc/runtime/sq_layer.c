/* SPDX-License-Identifier: Apache-2.0 */
/* A decoder layer: norm, mix, norm, add, norm, feed, norm, add; or both branches from one x. */
#include "runtime/sq_layer.h"

#include <math.h>

#include "core/sq_internal.h"
#include "core/sq_threads.h"
#include "runtime/sq_attend.h"
#include "runtime/sq_latent.h"
#include "runtime/sq_rows.h"

/* Limits within which no size below can overflow 63 bits. The largest are a row per token, and the
 * attention scratch: per lane at most SQ_HEADS_MAX rows of a score for each position and of a query
 * and two outputs of one head, and a page of that head. */
#define MAX_LENGTH ((int64_t)1 << 31)
_Static_assert(SQ_TOKENS_MAX <= INT64_MAX / 16 / (int64_t)sizeof(float) / SQ_WIDTH_MAX,
               "sixteen buffers of a row per token");
_Static_assert(MAX_LENGTH + 4 * SQ_WIDTH_MAX + 4 * SQ_PAGE_TOKENS <=
                   INT64_MAX / SQ_ATTENTION_LANES / SQ_HEADS_MAX / (int64_t)sizeof(float),
               "the attention scratch");

enum { CHUNK_TOKENS = 512 }; /* tokens whose intermediate values live at once */

/* ---- sealing ---------------------------------------------------------------------------- */

/* Which value the MLP reads. */
static enum sq_value
feed_value(const struct sq_layer *layer)
{
    return layer->parallel && !layer->before_mlp.kind ? SQ_VALUE_MIX : SQ_VALUE_FEED;
}

sq_status
sq_layer_seal(struct sq_layer *layer, struct sq_fault *fault)
{
    struct sq_site *sites = layer->sites;
    const int n_sites = layer->n_sites;
    const int64_t hidden = layer->hidden;
    SQ_TRY(sq_expect_range(fault, "hidden", hidden, 1, SQ_WIDTH_MAX));
    if (!isfinite(layer->residual_scale)) {
        return sq_refuse(fault, SQ_ERR_RANGE, -1, "residual_scale: expected a finite number");
    }
    if (layer->parallel && layer->norm_sums) {
        return sq_refuse(fault, SQ_ERR_RANGE, -1,
                         "norm_sums: expected 0 in a parallel layer, whose sum is of two branches");
    }
    SQ_TRY(sq_norm_seal_width(&layer->before_attention, hidden, "norms.before_attention", fault));
    SQ_TRY(sq_norm_seal_width(&layer->after_attention, hidden, "norms.after_attention", fault));
    SQ_TRY(sq_norm_seal_width(&layer->before_mlp, hidden, "norms.before_mlp", fault));
    SQ_TRY(sq_norm_seal_width(&layer->after_mlp, hidden, "norms.after_mlp", fault));
    SQ_TRY(sq_site_open(sites, n_sites, fault));
    SQ_TRY(sq_attention_seal(&layer->attention, hidden, sites, n_sites, fault));
    if (layer->experts.router.count) {
        SQ_TRY(sq_experts_seal(&layer->experts, hidden, feed_value(layer), sites, n_sites, fault));
    }
    else {
        SQ_TRY(sq_mlp_seal(&layer->mlp, hidden, feed_value(layer), "mlp", sites, n_sites, fault));
    }
    return sq_site_close(sites, n_sites, fault);
}

/* ---- workspace -------------------------------------------------------------------------- */

/* The table comes first, so that layers of equal rotary embeddings find it at one place. table and
 * q are whole; the rest holds one chunk of tokens at a time. */
struct layer_scratch {
    float *table;        /* [m][rotary.dim] cos and sin, and sq_rotary_table's own scratch */
    float *q;            /* [m][heads * head_dim]; attention leaves its output here */
    float *normed, *out; /* [chunk][hidden] */
    float *gate, *up;    /* [chunk][intermediate] */
    struct sq_attention_scratch attention;
    void *activations, *rotation, *attend, *experts;
};

/* Sizes of everything, and the pointers into base unless it is NULL. */
static size_t
lay_out(const struct sq_layer *layer, int64_t m, int64_t length, char *base,
        struct layer_scratch *s)
{
    const struct sq_attention *a = &layer->attention;
    const int64_t chunk = sq_min_i64(m, CHUNK_TOKENS);
    const size_t floats = (size_t)m * sizeof(float), chunk_floats = (size_t)chunk * sizeof(float);
    const size_t q = (size_t)(a->heads * a->head_dim), kv = (size_t)(a->kv_heads * a->head_dim);
    const size_t hidden = (size_t)layer->hidden, inner = (size_t)layer->mlp.up.n;
    size_t used = 0, activations, rotation;
    sq_reader_bytes(layer->sites, layer->n_sites, chunk, &activations, &rotation);
    s->table = sq_take_bytes(base, &used, sq_rotary_table_bytes(&a->rotary, m));
    s->q = sq_take_bytes(base, &used, floats * q);
    s->normed = sq_take_bytes(base, &used, chunk_floats * hidden);
    s->out = sq_take_bytes(base, &used, chunk_floats * hidden);
    s->gate = sq_take_bytes(base, &used, chunk_floats * inner);
    s->up = sq_take_bytes(base, &used, chunk_floats * inner);
    s->attention.k = sq_take_bytes(base, &used, chunk_floats * kv);
    s->attention.v = sq_take_bytes(base, &used, chunk_floats * kv);
    s->attention.hadamard = sq_take_bytes(base, &used, chunk_floats * q);
    s->attention.latent = sq_take_bytes(base, &used, chunk_floats * (size_t)sq_latent_floats(a));
    s->activations = sq_take_bytes(base, &used, activations);
    s->rotation = sq_take_bytes(base, &used, rotation);
    s->attend = sq_take_bytes(base, &used, sq_attend_bytes(a, m, length));
    s->experts = sq_take_bytes(base, &used, sq_experts_workspace_bytes(&layer->experts, chunk));
    return used;
}

size_t
sq_layer_workspace_bytes(const struct sq_layer *layer, int64_t m, int64_t length)
{
    struct layer_scratch s;
    SQ_ASSERT(m >= 0 && m <= SQ_TOKENS_MAX && length >= 0 && length <= MAX_LENGTH);
    return lay_out(layer, m, length, NULL, &s);
}

/* ---- the layer -------------------------------------------------------------------------- */

struct layer_call {
    const struct sq_layer *layer;
    const struct sq_pass *pass;
    int64_t index; /* of the layer in the cache */
    struct sq_reader reader;
    struct layer_scratch s;
};

/* What a branch reads: the norm of x [m][hidden], or x itself where there is none. */
static const float *
normed(const struct layer_call *c, const struct sq_norm *norm, const float *x)
{
    if (norm->kind == SQ_NORM_NONE) {
        return x;
    }
    sq_norm_rows(norm, x, c->reader.m, c->s.normed);
    return c->s.normed;
}

struct add_job {
    const float *branch;
    float *hidden;
    int64_t n;
    float scale;
};

static void
add_rows(void *context, int64_t begin, int64_t end, int thread)
{
    const struct add_job *j = context;
    (void)thread;
    for (int64_t i = begin * j->n; i < end * j->n; i++) {
        j->hidden[i] += j->scale * j->branch[i];
    }
}

/* hidden [m][hidden] += residual_scale * norm(s.out); or the norm of the sum with s.out. */
static void
add_branch(const struct layer_call *c, const struct sq_norm *after, float *hidden)
{
    struct add_job j = {.branch = c->s.out,
                        .hidden = hidden,
                        .n = c->layer->hidden,
                        .scale = c->layer->residual_scale};
    if (after->kind && !c->layer->norm_sums) {
        sq_norm_rows(after, c->s.out, c->reader.m, c->s.out);
    }
    sq_parallel_for(c->reader.m, sq_row_grain(j.n), add_rows, &j);
    if (after->kind && c->layer->norm_sums) {
        sq_norm_rows(after, hidden, c->reader.m, hidden);
    }
}

/* The branch of the MLP or the experts: feed on x, norm, add. */
static sq_status
feed_branch(struct layer_call *c, const float *x, float *hidden)
{
    const struct sq_layer *l = c->layer;
    if (l->experts.router.count) {
        SQ_TRY(sq_experts_feed(&l->experts, &c->reader, x, c->s.experts, c->s.out));
    }
    else {
        SQ_TRY(sq_mlp_feed(&l->mlp, &c->reader, x, c->s.gate, c->s.up, c->s.out));
    }
    add_branch(c, &l->after_mlp, hidden);
    return SQ_OK;
}

/* Before attention: norm, q, k, v; and the MLP's branch of a parallel layer. */
static sq_status
begin_chunk(struct layer_call *c)
{
    const struct sq_layer *l = c->layer;
    const struct sq_attention *a = &l->attention;
    const int64_t begin = c->reader.begin;
    float *hidden = c->pass->hidden + begin * l->hidden;
    const float *x = normed(c, &l->before_attention, hidden);
    SQ_TRY(sq_attention_project(a, &c->reader, &c->pass->tokens, c->pass->cache, c->index, x,
                                c->s.table + begin * a->rotary.dim,
                                c->s.q + begin * a->heads * a->head_dim, &c->s.attention));
    if (!l->parallel) {
        return SQ_OK;
    }
    return feed_branch(c, l->before_mlp.kind ? normed(c, &l->before_mlp, hidden) : x, hidden);
}

/* After attention: o, norm, add; and the MLP's branch of a serial layer. */
static sq_status
end_chunk(struct layer_call *c)
{
    const struct sq_layer *l = c->layer;
    const struct sq_attention *a = &l->attention;
    const float *mixed = c->s.q + c->reader.begin * a->heads * a->head_dim;
    float *hidden = c->pass->hidden + c->reader.begin * l->hidden;
    SQ_TRY(sq_attention_output(a, &c->reader, mixed, &c->s.attention, c->s.out));
    add_branch(c, &l->after_attention, hidden);
    return l->parallel ? SQ_OK : feed_branch(c, normed(c, &l->before_mlp, hidden), hidden);
}

static sq_status
for_chunks(struct layer_call *c, sq_status (*work)(struct layer_call *))
{
    const int64_t m = c->pass->tokens.m;
    for (int64_t begin = 0; begin < m; begin += CHUNK_TOKENS) {
        SQ_TRY(sq_stop_status());
        sq_reader_start(&c->reader, begin, sq_min_i64(CHUNK_TOKENS, m - begin));
        SQ_TRY(work(c));
    }
    return SQ_OK;
}

sq_status
sq_layer_forward(const struct sq_layer *layer, struct sq_pass *pass, int64_t index,
                 struct sq_record *record)
{
    const struct sq_attention *a = &layer->attention;
    const struct sq_tokens *tokens = &pass->tokens;
    const struct sq_kv_shape *shape = sq_kv_cache_shape(pass->cache);
    SQ_ASSERT(shape->kv_heads == a->kv_heads && shape->head_dim == a->head_dim);
    SQ_ASSERT(index >= 0 && index < shape->layers && tokens->m <= SQ_TOKENS_MAX);
    (void)shape;
    struct layer_call c = {.layer = layer, .pass = pass, .index = index};
    lay_out(layer, tokens->m, tokens->length, pass->workspace, &c.s);
    c.reader = (struct sq_reader){.sites = layer->sites,
                                  .record = record,
                                  .tokens = tokens->m,
                                  .activations_workspace = c.s.activations,
                                  .rotation_workspace = c.s.rotation};
    if (!pass->rotary || !sq_rotary_equal(pass->rotary, &a->rotary)) {
        sq_rotary_table(&a->rotary, tokens, c.s.table);
        pass->rotary = &a->rotary;
    }
    SQ_TRY(for_chunks(&c, begin_chunk));
    sq_attend(a, tokens, pass->cache, index, c.s.q, c.s.attend);
    return for_chunks(&c, end_chunk);
}
