/* SPDX-License-Identifier: Apache-2.0 */
/* One decoder layer per call: norms, sites and their linears, attention, MLP; and RMSNorm. */
#include <string.h>

#include "runtime/sq_attention.h"
#include "core/sq_internal.h"
#include "kernels/sq_kernels.h"
#include "core/sq_threads.h"

/* Limits within which no size below can overflow 63 bits. The largest are a row per token, and the
 * attention scratch: per lane at most SQ_HEADS_MAX rows of a score for each position and of a query
 * and two outputs of one head, and a page of that head. */
#define MAX_LENGTH ((int64_t)1 << 31)
_Static_assert(SQ_TOKENS_MAX <= INT64_MAX / 16 / (int64_t)sizeof(float) / SQ_WIDTH_MAX,
               "sixteen buffers of a row per token");
_Static_assert(MAX_LENGTH + 4 * SQ_WIDTH_MAX + 4 * SQ_PAGE_TOKENS <=
                   INT64_MAX / SQ_ATTENTION_LANES / SQ_HEADS_MAX / (int64_t)sizeof(float),
               "the attention scratch");

enum {
    CHUNK_TOKENS = 512, /* tokens whose intermediate values live at once */
    ROW_GRAIN = 1 << 13 /* elements of one chunk of a row-wise step */
};

static int64_t
row_grain(int64_t width)
{
    return sq_max_i64(1, ROW_GRAIN / sq_max_i64(width, 1));
}

/* ---- row-wise steps --------------------------------------------------------------------- */

struct row_job {
    const struct sq_kernels *kernels;
    const float *x, *other;
    float *y;
    int64_t n;
    float eps;
};

static void
norm_rows(void *context, int64_t begin, int64_t end, int thread)
{
    const struct row_job *j = context;
    (void)thread;
    for (int64_t t = begin; t < end; t++) {
        j->kernels->rms_norm_row(j->x + t * j->n, j->other, j->n, j->eps, j->y + t * j->n);
    }
}

static void
silu_rows(void *context, int64_t begin, int64_t end, int thread)
{
    const struct row_job *j = context;
    (void)thread;
    for (int64_t t = begin; t < end; t++) {
        j->kernels->silu_mul(j->x + t * j->n, j->other + t * j->n, j->n, j->y + t * j->n);
    }
}

/* y += x */
static void
add_rows(void *context, int64_t begin, int64_t end, int thread)
{
    const struct row_job *j = context;
    (void)thread;
    for (int64_t i = begin * j->n; i < end * j->n; i++) {
        j->y[i] += j->x[i];
    }
}

/* each row of y += x [n] */
static void
add_bias_rows(void *context, int64_t begin, int64_t end, int thread)
{
    const struct row_job *j = context;
    (void)thread;
    for (int64_t t = begin; t < end; t++) {
        for (int64_t i = 0; i < j->n; i++) {
            j->y[t * j->n + i] += j->x[i];
        }
    }
}

static void
for_rows(sq_range_fn fn, const float *x, const float *other, int64_t m, int64_t n, float eps,
         float *y)
{
    struct row_job j = {
        .kernels = sq_kernels_active(), .x = x, .other = other, .y = y, .n = n, .eps = eps};
    sq_parallel_for(m, row_grain(n), fn, &j);
}

sq_status
sq_rms_norm(const float *x, const float *weight, int64_t m, int64_t n, float eps, float *y)
{
    int64_t elements;
    if (!x || !weight || !y) {
        return SQ_ERR_NULL;
    }
    if (m < 0 || n < 1) {
        return SQ_ERR_SHAPE;
    }
    if (!sq_product(m, n, &elements) || !(eps >= 0)) {
        return SQ_ERR_RANGE;
    }
    for_rows(norm_rows, x, weight, m, n, eps, y);
    return SQ_OK;
}

/* ---- workspace -------------------------------------------------------------------------- */

/* q is whole; the rest holds one chunk of tokens at a time. */
struct layer_scratch {
    float *q;            /* [m][heads * head_dim]; attention leaves its output here */
    float *table;        /* [chunk][head_dim] cos and sin */
    float *k, *v;        /* [chunk][kv_heads * head_dim] */
    float *normed, *out; /* [chunk][hidden] */
    float *gate, *up;    /* [chunk][intermediate] */
    float *turned;       /* [chunk][heads * head_dim] scratch of the cache's Hadamard */
    void *activations, *rotation, *attention;
};

static int
site_has_packed(const struct sq_layer *layer, int site)
{
    for (int i = sq_site_first[site]; i < sq_site_first[site + 1]; i++) {
        if (layer->linears[i].packed) {
            return 1;
        }
    }
    return 0;
}

static void *
take(char *base, size_t *used, size_t bytes)
{
    void *p = base ? base + *used : NULL;
    *used += sq_align_bytes(bytes);
    return p;
}

/* Sizes of everything, and the pointers into base unless it is NULL. */
static size_t
lay_out(const struct sq_architecture *a, const struct sq_layer *layer, int64_t m, int64_t length,
        char *base, struct layer_scratch *s)
{
    const int64_t chunk = sq_min_i64(m, CHUNK_TOKENS), kv = a->kv_heads * a->head_dim;
    size_t used = 0, activations = 0, rotation = 0;
    for (int site = 0; site < SQ_N_SITES; site++) {
        const struct sq_site *rules = &layer->sites[site];
        const int64_t k = layer->linears[sq_site_first[site]].k;
        if (site_has_packed(layer, site)) {
            const size_t bytes = sq_activations_workspace_bytes(rules->bits, chunk, k);
            activations = bytes > activations ? bytes : activations;
            const size_t scratch = sq_rotation_workspace_bytes(&rules->rotation, chunk);
            rotation = scratch > rotation ? scratch : rotation;
        }
    }
    const size_t chunk_floats = (size_t)chunk * sizeof(float);
    s->q = take(base, &used, (size_t)(m * a->heads * a->head_dim) * sizeof(float));
    s->table = take(base, &used, chunk_floats * (size_t)a->head_dim);
    s->k = take(base, &used, chunk_floats * (size_t)kv);
    s->v = take(base, &used, chunk_floats * (size_t)kv);
    s->normed = take(base, &used, chunk_floats * (size_t)a->hidden);
    s->out = take(base, &used, chunk_floats * (size_t)a->hidden);
    s->gate = take(base, &used, chunk_floats * (size_t)a->intermediate);
    s->up = take(base, &used, chunk_floats * (size_t)a->intermediate);
    s->turned = take(base, &used, chunk_floats * (size_t)(a->heads * a->head_dim));
    s->activations = take(base, &used, activations);
    s->rotation = take(base, &used, rotation);
    s->attention = take(base, &used, sq_attention_workspace_bytes(a, m, length));
    return used;
}

static sq_status
check_architecture(const struct sq_architecture *a)
{
    if (!a->inv_freq) {
        return SQ_ERR_NULL;
    }
    if (a->hidden < 1 || a->intermediate < 1 || a->heads < 1 || a->kv_heads < 1 ||
        a->head_dim < 2 || a->head_dim % 2 || a->heads % a->kv_heads) {
        return SQ_ERR_SHAPE;
    }
    if (a->hidden > SQ_WIDTH_MAX || a->intermediate > SQ_WIDTH_MAX || a->heads > SQ_HEADS_MAX ||
        a->head_dim > SQ_WIDTH_MAX || a->heads * a->head_dim > SQ_WIDTH_MAX ||
        a->sliding_window < 0 || !(a->rms_eps >= 0)) {
        return SQ_ERR_RANGE;
    }
    return SQ_OK;
}

/* The packed linears of a site share their codes, so they agree on which inputs have 8 bits. */
static sq_status
check_high(const struct sq_layer *layer, int site)
{
    int64_t high = -1;
    for (int i = sq_site_first[site]; i < sq_site_first[site + 1]; i++) {
        if (layer->linears[i].packed) {
            const int64_t own = sq_packed_int8_inputs(layer->linears[i].packed);
            if ((high >= 0 && own != high) || (own && layer->sites[site].bits != 4)) {
                return SQ_ERR_SHAPE;
            }
            high = own;
        }
    }
    return SQ_OK;
}

static sq_status
check_layer(const struct sq_architecture *a, const struct sq_layer *layer)
{
    const int64_t q = a->heads * a->head_dim, kv = a->kv_heads * a->head_dim, h = a->hidden;
    const int64_t n[SQ_N_LINEARS] = {q, kv, kv, h, a->intermediate, a->intermediate, h};
    const int64_t k[SQ_N_LINEARS] = {h, h, h, q, h, h, a->intermediate};
    if (!layer->norm_attention || !layer->norm_mlp) {
        return SQ_ERR_NULL;
    }
    for (int i = 0; i < SQ_N_LINEARS; i++) {
        const struct sq_linear *l = &layer->linears[i];
        if (!l->packed && !l->dense) {
            return SQ_ERR_NULL;
        }
        int64_t packed_n = n[i], packed_k = k[i], group;
        if (l->packed) {
            sq_packed_shape(l->packed, &packed_n, &packed_k, &group);
        }
        if (l->n != n[i] || l->k != k[i] || packed_n != n[i] || packed_k != k[i]) {
            return SQ_ERR_SHAPE;
        }
    }
    for (int site = 0; site < SQ_N_SITES; site++) {
        const struct sq_site *s = &layer->sites[site];
        const struct sq_rotation *r = &s->rotation;
        if (r->kind < SQ_UNROTATED || r->kind > SQ_BLOCKS) {
            return SQ_ERR_RANGE;
        }
        SQ_TRY(check_high(layer, site));
        if (r->kind && r->k != k[sq_site_first[site]]) {
            return SQ_ERR_SHAPE;
        }
    }
    return SQ_OK;
}

/* Sizes that cannot be asked for: more than any allocation can give. */
size_t
sq_layer_workspace_bytes(const struct sq_architecture *a, const struct sq_layer *layer, int64_t m,
                         int64_t length)
{
    struct layer_scratch s;
    if (!a || !layer || check_architecture(a) || check_layer(a, layer) || m < 0 ||
        m > SQ_TOKENS_MAX || length < 0 || length > MAX_LENGTH) {
        return SIZE_MAX / 2;
    }
    return lay_out(a, layer, m, length, NULL, &s);
}

/* ---- sites ------------------------------------------------------------------------------ */

/* What the linears of a site read: packed ones the prepared activations, dense ones the plain
 * input. */
struct site_input {
    const float *x; /* [m][k] */
    int64_t m;
    struct sq_activations activations;
};

static sq_status
enter_site(const struct sq_layer *layer, int site, const float *x, int64_t m,
           const struct layer_scratch *s, struct site_input *input)
{
    const struct sq_site *rules = &layer->sites[site];
    input->x = x;
    input->m = m;
    if (!site_has_packed(layer, site)) {
        return SQ_OK;
    }
    const sq_packed_t *packed = NULL;
    for (int i = sq_site_first[site]; i < sq_site_first[site + 1] && !packed; i++) {
        packed = layer->linears[i].packed;
    }
    return sq_activations_prepare(sq_packed_kernels(packed), rules->bits, rules->clip,
                                  sq_packed_int8_inputs(packed), &rules->rotation, x, m,
                                  layer->linears[sq_site_first[site]].k, s->rotation,
                                  s->activations, &input->activations);
}

static sq_status
apply_linear(const struct sq_linear *l, const struct site_input *input, float *y)
{
    if (l->packed) {
        SQ_TRY(sq_linear_packed(l->packed, &input->activations, y, l->n));
    }
    else {
        SQ_TRY(sq_linear_dense(l->dtype, l->dense, input->x, input->m, l->n, l->k, y, l->n));
    }
    if (l->bias) {
        for_rows(add_bias_rows, l->bias, NULL, input->m, l->n, 0, y);
    }
    return SQ_OK;
}

static void
record_input(const struct sq_record *record, int site, int64_t begin, int64_t m, int64_t k,
             const float *x)
{
    if (record && record->inputs[site]) {
        memcpy(record->inputs[site] + begin * k, x, (size_t)(m * k) * sizeof *x);
    }
}

/* ---- the layer -------------------------------------------------------------------------- */

struct layer_call {
    const struct sq_architecture *a;
    const struct sq_layer *layer;
    sq_kv_cache_t *cache;
    int64_t index; /* of the layer in the cache */
    const int32_t *sequence;
    const int64_t *position;
    float *hidden;
    const struct sq_record *record;
    struct layer_scratch s;
};

/* Tokens begin .. begin + m - 1: norm, q, k, v, rotary embedding, cache. */
static sq_status
project_chunk(const struct layer_call *c, int64_t begin, int64_t m)
{
    const struct sq_architecture *a = c->a;
    const struct sq_linear *l = c->layer->linears;
    const struct layer_scratch *s = &c->s;
    float *q = s->q + begin * a->heads * a->head_dim;
    struct site_input input;
    for_rows(norm_rows, c->hidden + begin * a->hidden, c->layer->norm_attention, m, a->hidden,
             a->rms_eps, s->normed);
    record_input(c->record, SQ_SITE_QKV, begin, m, a->hidden, s->normed);
    SQ_TRY(enter_site(c->layer, SQ_SITE_QKV, s->normed, m, s, &input));
    SQ_TRY(apply_linear(&l[SQ_Q], &input, q));
    SQ_TRY(apply_linear(&l[SQ_K], &input, s->k));
    SQ_TRY(apply_linear(&l[SQ_V], &input, s->v));
    sq_rotary_table(a, c->position + begin, m, s->table);
    sq_rotate_and_store(a, s->table, q, s->k, s->v, c->sequence + begin, c->position + begin, m,
                        c->cache, c->index, s->turned);
    return SQ_OK;
}

/* Tokens begin .. begin + m - 1, attention done: o, residual, norm, gate, up, down, residual. */
static sq_status
finish_chunk(const struct layer_call *c, int64_t begin, int64_t m)
{
    const struct sq_architecture *a = c->a;
    const struct sq_linear *l = c->layer->linears;
    const struct layer_scratch *s = &c->s;
    const int64_t width = a->heads * a->head_dim;
    const float *attended = s->q + begin * width;
    float *hidden = c->hidden + begin * a->hidden;
    struct site_input input;
    record_input(c->record, SQ_SITE_O, begin, m, width, attended);
    SQ_TRY(enter_site(c->layer, SQ_SITE_O, attended, m, s, &input));
    SQ_TRY(apply_linear(&l[SQ_O], &input, s->out));
    for_rows(add_rows, s->out, NULL, m, a->hidden, 0, hidden);

    for_rows(norm_rows, hidden, c->layer->norm_mlp, m, a->hidden, a->rms_eps, s->normed);
    record_input(c->record, SQ_SITE_GATE_UP, begin, m, a->hidden, s->normed);
    SQ_TRY(enter_site(c->layer, SQ_SITE_GATE_UP, s->normed, m, s, &input));
    SQ_TRY(apply_linear(&l[SQ_GATE], &input, s->gate));
    SQ_TRY(apply_linear(&l[SQ_UP], &input, s->up));
    for_rows(silu_rows, s->gate, s->up, m, a->intermediate, 0, s->gate);

    record_input(c->record, SQ_SITE_DOWN, begin, m, a->intermediate, s->gate);
    SQ_TRY(enter_site(c->layer, SQ_SITE_DOWN, s->gate, m, s, &input));
    SQ_TRY(apply_linear(&l[SQ_DOWN], &input, s->out));
    for_rows(add_rows, s->out, NULL, m, a->hidden, 0, hidden);
    return SQ_OK;
}

static sq_status
check_cache(const struct sq_architecture *a, const sq_kv_cache_t *cache, int64_t index, int64_t m)
{
    const struct sq_kv_shape *shape = sq_kv_cache_shape(cache);
    if (shape->kv_heads != a->kv_heads || shape->head_dim != a->head_dim || m < 0) {
        return SQ_ERR_SHAPE;
    }
    if (m > SQ_TOKENS_MAX || index < 0 || index >= shape->layers) {
        return SQ_ERR_RANGE;
    }
    return SQ_OK;
}

sq_status
sq_layer_forward(const struct sq_architecture *a, const struct sq_layer *layer,
                 sq_kv_cache_t *cache, int64_t index, const int32_t *sequence,
                 const int64_t *position, int64_t m, float *hidden, const struct sq_record *record,
                 void *workspace)
{
    if (!a || !layer || !cache || !sequence || !position || !hidden || !workspace) {
        return SQ_ERR_NULL;
    }
    SQ_TRY(check_architecture(a));
    SQ_TRY(check_layer(a, layer));
    SQ_TRY(check_cache(a, cache, index, m));
    SQ_TRY(sq_kv_cache_reserve(cache, index, index + 1, sequence, position, m));
    struct layer_call c = {.a = a,
                           .layer = layer,
                           .cache = cache,
                           .index = index,
                           .sequence = sequence,
                           .position = position,
                           .hidden = hidden,
                           .record = record};
    int64_t length = 0;
    for (int64_t t = 0; t < m; t++) {
        length = sq_max_i64(length, position[t] + 1);
    }
    lay_out(a, layer, m, length, workspace, &c.s);
    for (int64_t begin = 0; begin < m; begin += CHUNK_TOKENS) {
        SQ_TRY(project_chunk(&c, begin, sq_min_i64(CHUNK_TOKENS, m - begin)));
    }
    sq_attention(a, cache, index, sequence, position, m, length, c.s.q, c.s.attention);
    for (int64_t begin = 0; begin < m; begin += CHUNK_TOKENS) {
        SQ_TRY(finish_chunk(&c, begin, sq_min_i64(CHUNK_TOKENS, m - begin)));
    }
    return SQ_OK;
}
