/* SPDX-License-Identifier: Apache-2.0 */
/* The part of the fuzzer that seals layers, and runs those that were not refused. */
#include "fuzz_input.h"

#include "core/sq_internal.h"
#include "core/sq_states.h"
#include "kernels/sq_kernels.h"

enum { SITES = 16, EXPERTS = 3, PACKED = 40 };

/* What a layer is made of while it is made. */
struct maker {
    struct input *in;
    struct sq_site sites[SITES];
    int n_sites, n_packed;
    sq_packed_t *packed[PACKED];
};

static int
new_site(struct maker *to, int64_t k)
{
    static const int bits[] = {4, 8, 16};
    struct input *in = to->in;
    struct sq_site *site = &to->sites[to->n_sites];
    *site = (struct sq_site){
        .bits = (int)number(in, bits[up_to(in, 2)]), .clip = real(in, 1.0f), .k = number(in, k)};
    if (up_to(in, 3) == 0 && k > 0 && k < 256) { /* a matrix on the axis that is the row */
        site->rotation =
            (struct sq_rotation){.kind = (int)number(in, SQ_KRONECKER), .k = number(in, k)};
        site->rotation.left = (struct sq_factor){.order = number(in, 1), .hadamard = 1};
        site->rotation.right = (struct sq_factor){
            .order = k, .matrix = floats(in, k, k), .matrix_t = floats(in, k, k)};
    }
    return to->n_sites++;
}

static struct sq_linear
new_linear(struct maker *to, int64_t n, int64_t k, int site)
{
    struct input *in = to->in;
    struct sq_linear l = {.site = (int)number(in, site), .n = number(in, n), .k = number(in, k)};
    l.dtype = (sq_dtype)up_to(in, 2);
    l.bias = up_to(in, 1) ? floats(in, l.n, 1) : NULL;
    if (up_to(in, 1) || l.k < 1 || l.k > 4096 || l.n > 4096 || to->n_packed == PACKED) {
        const int64_t bytes = l.dtype == SQ_F32 ? 4 : 2;
        l.dense = up_to(in, 30) ? matrix(in, l.n, l.k, bytes) : NULL;
        return l;
    }
    const int32_t *words = matrix(in, l.n, sq_packed_words(4, l.k), sizeof *words);
    const float *scales = floats(in, l.n, 1);
    sq_packed_t *packed = NULL;
    const int64_t int8_inputs = l.k > SQ_K_ALIGN ? number(in, up_to(in, 1) * SQ_K_ALIGN) : 0;
    if (!in->too_large && sq_packed_create(sq_kernels_active(), words, scales, l.n, l.k, 0,
                                           int8_inputs, 4, &packed) == SQ_OK) {
        to->packed[to->n_packed++] = packed;
        l.packed = packed;
    }
    return l;
}

static struct sq_norm
new_norm(struct input *in, int64_t n, int64_t rows)
{
    struct sq_norm norm = {.kind = (enum sq_norm_kind)number(in, up_to(in, 2)),
                           .eps = real(in, 1e-5f),
                           .n = number(in, n),
                           .rows = number(in, rows)};
    if (norm.kind != SQ_NORM_NONE) {
        norm.weight = floats(in, norm.rows, norm.n);
        norm.bias = up_to(in, 1) ? floats(in, norm.rows, norm.n) : NULL;
    }
    return norm;
}

static struct sq_rotary
new_rotary(struct input *in, int64_t dim)
{
    struct sq_rotary r = {.dim = number(in, dim), .scale = real(in, 1.0f)};
    r.inv_freq = floats(in, r.dim < 0 ? 0 : r.dim / 2, 1);
    r.long_inv_freq = up_to(in, 3) ? NULL : floats(in, r.dim < 0 ? 0 : r.dim / 2, 1);
    r.dynamic = real(in, up_to(in, 3) ? 0.0f : 2.0f);
    r.theta = real(in, 10000.0f);
    r.original = number(in, up_to(in, 6));
    r.interleaved = number(in, up_to(in, 1));
    return r;
}

static void
new_latent(struct maker *to, struct sq_attention *a, int64_t hidden, int x)
{
    struct input *in = to->in;
    struct sq_latent *l = &a->latent;
    const int64_t q_rank = up_to(in, 1) * (1 + up_to(in, 20)), kv_rank = 1 + up_to(in, 20);
    const int64_t rope = a->rotary.dim, nope = a->head_dim - rope, q = a->heads * a->head_dim;
    l->value_dim = number(in, 1 + up_to(in, 7) % a->head_dim);
    if (q_rank) {
        l->q_a = new_linear(to, q_rank, hidden, x);
        l->q_a_norm = new_norm(in, q_rank, 1);
        l->q_b = new_linear(to, q, q_rank, new_site(to, q_rank));
    }
    else {
        a->q = new_linear(to, q, hidden, x);
    }
    l->kv_a = new_linear(to, kv_rank + rope, hidden, x);
    l->kv_a_norm = new_norm(in, kv_rank, 1);
    l->kv_b = new_linear(to, a->heads * (nope + l->value_dim), kv_rank, new_site(to, kv_rank));
    a->is_latent = 1;
    a->o = new_linear(to, hidden, a->heads * l->value_dim, new_site(to, a->heads * l->value_dim));
}

static void
new_attention(struct maker *to, struct sq_attention *a, int64_t hidden)
{
    struct input *in = to->in;
    const int64_t groups = 1 + up_to(in, 2), kv_heads = 1 + up_to(in, 2);
    const int64_t head_dim = 2 + up_to(in, 30), q = groups * kv_heads * head_dim;
    const int x = new_site(to, hidden);
    *a = (struct sq_attention){.heads = number(in, groups * kv_heads),
                               .kv_heads = number(in, kv_heads),
                               .head_dim = number(in, head_dim),
                               .window = number(in, up_to(in, 5)),
                               .scale = real(in, 0.3f),
                               .softcap = real(in, up_to(in, 1) * 20.0f),
                               .qkv_clip = real(in, up_to(in, 1) * 1.0f)};
    a->query_original = number(in, up_to(in, 1));
    a->query_growth = real(in, a->query_original ? 0.1f : 0.0f);
    a->sinks = up_to(in, 3) ? NULL : floats(in, a->heads, 1);
    a->slopes = up_to(in, 3) ? NULL : floats(in, a->heads, 1);
    a->slopes_bfloat16 = number(in, a->slopes ? up_to(in, 1) : 0);
    a->rotary = new_rotary(in, 2 * up_to(in, head_dim / 2));
    a->q_norm = new_norm(in, head_dim, up_to(in, 1) ? 1 : a->heads);
    a->k_norm = new_norm(in, head_dim, 1);
    if (up_to(in, 3) == 0 && a->heads == a->kv_heads && a->head_dim == head_dim) {
        new_latent(to, a, hidden, x);
        return;
    }
    a->q = new_linear(to, q, hidden, x);
    a->k = new_linear(to, kv_heads * head_dim, hidden, x);
    a->v = new_linear(to, kv_heads * head_dim, hidden, x);
    a->o = new_linear(to, hidden, q, new_site(to, q));
}

static struct sq_mlp
new_mlp(struct maker *to, int64_t hidden, int64_t inner, int x)
{
    struct input *in = to->in;
    struct sq_mlp mlp = {.activation = (enum sq_activation)number(in, up_to(in, 6)),
                         .gated = (int)number(in, up_to(in, 1))};
    mlp.limit = real(in, mlp.activation == SQ_SWIGLU_CLAMPED ? 7.0f : 0.0f);
    if (mlp.gated) {
        mlp.gate = new_linear(to, inner, hidden, x);
    }
    mlp.up = new_linear(to, inner, hidden, x);
    mlp.down = new_linear(to, hidden, inner, new_site(to, inner));
    return mlp;
}

static void
new_experts(struct maker *to, struct sq_experts *e, struct sq_mlp mlps[EXPERTS + 1], int64_t hidden,
            int64_t inner, int x)
{
    struct input *in = to->in;
    struct sq_router *r = &e->router;
    *r = (struct sq_router){.count = number(in, EXPERTS),
                            .chosen = number(in, 1 + up_to(in, EXPERTS - 1)),
                            .scoring = (enum sq_scoring)number(in, up_to(in, 2)),
                            .normalize = up_to(in, 1),
                            .scale = real(in, 1.0f),
                            .groups = number(in, up_to(in, 1) * EXPERTS),
                            .chosen_groups = number(in, up_to(in, EXPERTS)),
                            .group_score = (enum sq_group_score)number(in, up_to(in, 1)),
                            .dtype = (sq_dtype)number(in, up_to(in, 2))};
    r->weight = matrix(in, r->count, hidden, r->dtype == SQ_F32 ? 4 : 2);
    r->bias = up_to(in, 1) ? floats(in, r->count, 1) : NULL;
    r->correction = up_to(in, 1) ? floats(in, r->count, 1) : NULL;
    if (r->count > EXPERTS) {
        in->too_large = 1;
    }
    for (int i = 0; i < EXPERTS; i++) {
        mlps[i] = new_mlp(to, hidden, inner, new_site(to, hidden));
    }
    e->each = mlps;
    if (up_to(in, 1)) {
        mlps[EXPERTS] = new_mlp(to, hidden, inner, x);
        e->shared = &mlps[EXPERTS];
        e->gate_dtype = (sq_dtype)up_to(in, 2);
        e->shared_gate =
            up_to(in, 1) ? matrix(in, 1, hidden, e->gate_dtype == SQ_F32 ? 4 : 2) : NULL;
    }
}

static void
run_layer(struct input *in, const struct sq_layer *layer)
{
    const struct sq_attention *a = &layer->attention;
    const struct sq_kv_shape shape = {.layers = 1,
                                      .sequences = 2,
                                      .kv_heads = a->kv_heads,
                                      .head_dim = a->head_dim,
                                      .capacity = 70,
                                      .bits = 4 << up_to(in, 3),
                                      .hadamard = up_to(in, 1)};
    enum { MOST = 6 };
    int32_t sequence[MOST];
    int64_t position[MOST];
    const int64_t m = 1 + up_to(in, MOST - 1), start = up_to(in, 64);
    for (int64_t t = 0; t < m; t++) {
        sequence[t] = 0;
        position[t] = start + t;
    }
    sq_kv_cache_t *cache = NULL;
    struct sq_record record[SITES] = {{.rows = NULL}};
    struct sq_pass pass = {.tokens = {m, start + m, sequence, position}};
    pass.hidden = floats(in, m, layer->hidden);
    const size_t bytes = sq_layer_workspace_bytes(layer, m, start + m);
    pass.workspace =
        bytes < ((size_t)1 << 28) ? aligned_alloc(64, sq_align_bytes(bytes + 1)) : NULL;
    if (!in->too_large && pass.workspace && sq_kv_cache_create(&shape, &cache) == SQ_OK) {
        pass.cache = cache;
        HOLDS(sq_kv_cache_reserve(cache, 0, 1, sequence, position, m) == SQ_OK);
        (void)sq_layer_forward(layer, &pass, 0, up_to(in, 1) ? record : NULL);
    }
    for (int i = 0; i < SITES; i++) {
        sq_states_free(record[i].rows, record[i].mapped);
    }
    sq_kv_cache_destroy(cache);
    free(pass.workspace);
}

void
fuzz_layer(struct input *in)
{
    struct maker maker = {.in = in};
    struct sq_mlp mlps[EXPERTS + 1] = {{.gated = 0}};
    const int64_t hidden = 1 + up_to(in, 40), inner = 1 + up_to(in, 40);
    struct sq_layer layer = {.hidden = number(in, hidden),
                             .parallel = up_to(in, 3) == 0,
                             .residual_scale = real(in, 1.0f),
                             .before_attention = new_norm(in, hidden, 1),
                             .after_attention = new_norm(in, hidden, 1),
                             .before_mlp = new_norm(in, hidden, 1),
                             .after_mlp = new_norm(in, hidden, 1)};
    layer.norm_sums = (int)number(in, layer.parallel ? 0 : up_to(in, 1));
    new_attention(&maker, &layer.attention, hidden);
    const int x = new_site(&maker, hidden);
    if (up_to(in, 2) == 0) {
        new_experts(&maker, &layer.experts, mlps, hidden, inner, x);
    }
    else {
        layer.mlp = new_mlp(&maker, hidden, inner, x);
    }
    layer.sites = maker.sites;
    layer.n_sites = (int)number(in, maker.n_sites);
    struct sq_fault fault = {.site = -1};
    if (layer.n_sites > maker.n_sites || in->too_large) {
        in->too_large = 1;
    }
    else if (sq_layer_seal(&layer, &fault) == SQ_OK) {
        run_layer(in, &layer);
    }
    else {
        HOLDS(memchr(fault.text, 0, sizeof fault.text) && fault.text[0]);
    }
    while (maker.n_packed) {
        sq_packed_destroy(maker.packed[--maker.n_packed]);
    }
}
