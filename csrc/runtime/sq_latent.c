/* SPDX-License-Identifier: Apache-2.0 */
/* Latent attention: queries, keys and values from vectors of low rank. Keys and values are expanded
 * per head before they go to the cache, so that attention is that of all other layers. */
#include "runtime/sq_latent.h"

#include <string.h>

#include "core/sq_internal.h"
#include "core/sq_threads.h"
#include "runtime/sq_rows.h"

/* ---- sealing ---------------------------------------------------------------------------- */

static sq_status
seal_queries(const struct sq_attention *a, int64_t hidden, struct sq_site *sites, int n_sites,
             struct sq_fault *fault)
{
    const struct sq_latent *l = &a->latent;
    const int64_t n = a->heads * a->head_dim, rank = l->q_a.n;
    if (rank == 0) {
        return sq_linear_seal(&a->q, n, hidden, SQ_VALUE_MIX, "attention.q", sites, n_sites, fault);
    }
    SQ_TRY(sq_expect_range(fault, "attention.q_a: n", rank, 1, SQ_WIDTH_MAX));
    SQ_TRY(sq_norm_seal_width(&l->q_a_norm, rank, "attention.q_a_norm", fault));
    SQ_TRY(sq_linear_seal(&l->q_a, rank, hidden, SQ_VALUE_MIX, "attention.q_a", sites, n_sites,
                          fault));
    return sq_linear_seal(&l->q_b, n, rank, SQ_VALUE_Q_RANK, "attention.q_b", sites, n_sites,
                          fault);
}

sq_status
sq_latent_seal(const struct sq_attention *a, int64_t hidden, struct sq_site *sites, int n_sites,
               struct sq_fault *fault)
{
    const struct sq_latent *l = &a->latent;
    const int64_t rope = a->rotary.dim, rank = l->kv_b.k;
    SQ_TRY(sq_expect_range(fault, "attention.value_dim", l->value_dim, 1, a->head_dim));
    if (a->kv_heads != a->heads) {
        return sq_refuse(fault, SQ_ERR_SHAPE, -1,
                         "attention.kv_heads: expected heads = %lld in latent attention, got %lld",
                         (long long)a->heads, (long long)a->kv_heads);
    }
    if (a->q_norm.kind || a->k_norm.kind) {
        return sq_refuse(fault, SQ_ERR_RANGE, -1,
                         "attention: expected no %s in latent attention, got one",
                         a->q_norm.kind ? "q_norm" : "k_norm");
    }
    const int64_t expanded = a->heads * (a->head_dim - rope + l->value_dim);
    SQ_TRY(sq_expect_range(fault, "attention: heads * (nope channels + value_dim)", expanded, 1,
                           SQ_WIDTH_MAX));
    SQ_TRY(sq_expect_range(fault, "attention.kv_b: k", rank, 1, SQ_WIDTH_MAX - rope));
    SQ_TRY(seal_queries(a, hidden, sites, n_sites, fault));
    SQ_TRY(sq_norm_seal_width(&l->kv_a_norm, rank, "attention.kv_a_norm", fault));
    SQ_TRY(sq_linear_seal(&l->kv_a, rank + rope, hidden, SQ_VALUE_MIX, "attention.kv_a", sites,
                          n_sites, fault));
    return sq_linear_seal(&l->kv_b, expanded, rank, SQ_VALUE_KV_RANK, "attention.kv_b", sites,
                          n_sites, fault);
}

/* ---- projections ------------------------------------------------------------------------ */

int64_t
sq_latent_floats(const struct sq_attention *a)
{
    const struct sq_latent *l = &a->latent;
    return a->is_latent ? l->q_a.n + l->kv_a.n + l->kv_b.k + l->kv_b.n : 0;
}

/* Rows of a call at work: arrays of a row per token. */
struct expand_job {
    const struct sq_attention *a;
    const float *both;     /* [kv_rank + rope] */
    float *rank;           /* [kv_rank] */
    const float *expanded; /* [heads][nope + value_dim] */
    float *k, *v;          /* [heads][head_dim] */
};

static void
copy_ranks(void *context, int64_t begin, int64_t end, int thread)
{
    const struct expand_job *j = context;
    const int64_t rank = j->a->latent.kv_b.k, width = j->a->latent.kv_a.n;
    (void)thread;
    for (int64_t t = begin; t < end; t++) {
        memcpy(j->rank + t * rank, j->both + t * width, (size_t)rank * sizeof *j->rank);
    }
}

static void
expand_heads(void *context, int64_t begin, int64_t end, int thread)
{
    const struct expand_job *j = context;
    const struct sq_attention *a = j->a;
    const int64_t d = a->head_dim, rope = a->rotary.dim, nope = d - rope;
    const int64_t value = a->latent.value_dim, rank = a->latent.kv_b.k;
    const size_t size = sizeof(float);
    (void)thread;
    for (int64_t t = begin; t < end; t++) {
        const float *shared = j->both + t * (rank + rope) + rank;
        for (int64_t h = 0; h < a->heads; h++) {
            const float *from = j->expanded + (t * a->heads + h) * (nope + value);
            float *k = j->k + (t * a->heads + h) * d, *v = j->v + (t * a->heads + h) * d;
            memcpy(k, from, (size_t)nope * size);
            memcpy(k + nope, shared, (size_t)rope * size);
            memcpy(v, from + nope, (size_t)value * size);
            memset(v + value, 0, (size_t)(d - value) * size);
        }
    }
}

/* q_a or q, and kv_a, read one value: they come first, so that they share its activations. */
sq_status
sq_latent_project(const struct sq_attention *a, struct sq_reader *reader, const float *x, float *q,
                  float *k, float *v, float *scratch)
{
    const struct sq_latent *l = &a->latent;
    const int64_t m = reader->m;
    float *q_rank = scratch, *both = q_rank + m * l->q_a.n;
    float *rank = both + m * l->kv_a.n, *expanded = rank + m * l->kv_b.k;
    struct expand_job j = {
        .a = a, .both = both, .rank = rank, .expanded = expanded, .k = k, .v = v};
    SQ_TRY(l->q_a.n ? sq_linear_apply(reader, &l->q_a, x, q_rank)
                    : sq_linear_apply(reader, &a->q, x, q));
    SQ_TRY(sq_linear_apply(reader, &l->kv_a, x, both));
    if (l->q_a.n) {
        if (l->q_a_norm.kind) {
            sq_norm_rows(&l->q_a_norm, q_rank, m, q_rank);
        }
        SQ_TRY(sq_linear_apply(reader, &l->q_b, q_rank, q));
    }
    sq_parallel_for(m, sq_row_grain(l->kv_b.k), copy_ranks, &j);
    if (l->kv_a_norm.kind) {
        sq_norm_rows(&l->kv_a_norm, rank, m, rank);
    }
    SQ_TRY(sq_linear_apply(reader, &l->kv_b, rank, expanded));
    sq_parallel_for(m, sq_row_grain(a->heads * a->head_dim), expand_heads, &j);
    return SQ_OK;
}

/* ---- outputs ---------------------------------------------------------------------------- */

struct values_job {
    const struct sq_attention *a;
    const float *mixed;
    float *out;
};

static void
take_values(void *context, int64_t begin, int64_t end, int thread)
{
    const struct values_job *j = context;
    const int64_t d = j->a->head_dim, value = j->a->latent.value_dim;
    (void)thread;
    for (int64_t i = begin * j->a->heads; i < end * j->a->heads; i++) {
        memcpy(j->out + i * value, j->mixed + i * d, (size_t)value * sizeof *j->out);
    }
}

void
sq_latent_values(const struct sq_attention *a, const float *mixed, int64_t m, float *out)
{
    struct values_job j = {.a = a, .mixed = mixed, .out = out};
    sq_parallel_for(m, sq_row_grain(a->heads * a->head_dim), take_values, &j);
}
