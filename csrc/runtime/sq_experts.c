/* SPDX-License-Identifier: Apache-2.0 */
/* Experts: the tokens of an expert are gathered, multiplied together, and added where they belong.
 */
#include "runtime/sq_experts.h"

#include <math.h>
#include <stdio.h>

#include "core/sq_internal.h"
#include "core/sq_threads.h"
#include "runtime/sq_rows.h"

/* ---- sealing ---------------------------------------------------------------------------- */

_Static_assert(SQ_VALUE_EXPERTS <= INT32_MAX - 2 * SQ_EXPERTS_MAX, "values of experts are ints");

sq_status
sq_experts_seal(const struct sq_experts *e, int64_t hidden, int value, struct sq_site *sites,
                int n_sites, struct sq_fault *fault)
{
    char name[32];
    SQ_TRY(sq_router_seal(&e->router, fault));
    for (int64_t i = 0; i < e->router.count; i++) {
        (void)snprintf(name, sizeof name, "experts.each[%d]", (int)i);
        if (e->each[i].up.n != e->each[0].up.n) {
            return sq_refuse(fault, SQ_ERR_SHAPE, -1,
                             "%s.up: n: expected %lld, as in the first, got %lld", name,
                             (long long)e->each[0].up.n, (long long)e->each[i].up.n);
        }
        SQ_TRY(sq_mlp_seal(&e->each[i], hidden, SQ_VALUE_EXPERTS + 2 * (int)i, name, sites, n_sites,
                           fault));
    }
    if (e->shared) {
        return sq_mlp_seal(e->shared, hidden, value, "experts.shared", sites, n_sites, fault);
    }
    return e->shared_gate ? sq_refuse(fault, SQ_ERR_NULL, -1,
                                      "experts.shared_gate: expected none without shared, got one")
                          : SQ_OK;
}

/* ---- workspace -------------------------------------------------------------------------- */

/* Pairs are the m * chosen of a token and an expert that it goes to. */
struct experts_scratch {
    float *scores;   /* [m][count] */
    int32_t *expert; /* [m][chosen] */
    float *weight;   /* [m][chosen] */
    int64_t *start;  /* [count + 1]: the pairs of expert i are start[i] .. start[i + 1] - 1 */
    int32_t *token;  /* [pairs], by expert, rising within each */
    float *share;    /* [pairs]: their weights */
    float *gathered, *result; /* [m][hidden] */
    float *gate, *up;         /* [m][intermediate] */
};

static size_t
lay_out(const struct sq_experts *e, int64_t m, char *base, struct experts_scratch *s)
{
    const struct sq_router *r = &e->router;
    const size_t pairs = (size_t)(m * r->chosen), count = (size_t)r->count;
    const size_t hidden = (size_t)(m * e->each[0].up.k);
    const int64_t shared = e->shared ? e->shared->up.n : 0;
    const size_t inner = (size_t)(m * sq_max_i64(e->each[0].up.n, shared));
    size_t used = 0;
    s->scores = sq_take_bytes(base, &used, (size_t)m * count * sizeof *s->scores);
    s->expert = sq_take_bytes(base, &used, pairs * sizeof *s->expert);
    s->weight = sq_take_bytes(base, &used, pairs * sizeof *s->weight);
    s->start = sq_take_bytes(base, &used, (count + 1) * sizeof *s->start);
    s->token = sq_take_bytes(base, &used, pairs * sizeof *s->token);
    s->share = sq_take_bytes(base, &used, pairs * sizeof *s->share);
    s->gathered = sq_take_bytes(base, &used, hidden * sizeof *s->gathered);
    s->result = sq_take_bytes(base, &used, hidden * sizeof *s->result);
    s->gate = sq_take_bytes(base, &used, inner * sizeof *s->gate);
    s->up = sq_take_bytes(base, &used, inner * sizeof *s->up);
    return used;
}

size_t
sq_experts_workspace_bytes(const struct sq_experts *experts, int64_t m)
{
    struct experts_scratch s;
    return experts->router.count ? lay_out(experts, m, NULL, &s) : 0;
}

/* ---- rows ------------------------------------------------------------------------------- */

/* Rows of n elements, row i of the one array being row token[i] of the other. */
struct rows_job {
    const float *from;
    float *to;
    const int32_t *token;
    const float *share; /* of each row */
    int64_t n;
};

static void
gather_rows(void *context, int64_t begin, int64_t end, int thread)
{
    const struct rows_job *j = context;
    (void)thread;
    for (int64_t i = begin; i < end; i++) {
        memcpy(j->to + i * j->n, j->from + j->token[i] * j->n, (size_t)j->n * sizeof *j->to);
    }
}

/* No token stands twice among an expert's, so that rows may be added at once. */
static void
add_rows(void *context, int64_t begin, int64_t end, int thread)
{
    const struct rows_job *j = context;
    (void)thread;
    for (int64_t i = begin; i < end; i++) {
        const float *from = j->from + i * j->n;
        float *to = j->to + j->token[i] * j->n;
        for (int64_t c = 0; c < j->n; c++) {
            to[c] += j->share[i] * from[c];
        }
    }
}

/* Row i of `to`, in place, times sigmoid(share[i]). */
static void
open_rows(void *context, int64_t begin, int64_t end, int thread)
{
    const struct rows_job *j = context;
    (void)thread;
    for (int64_t i = begin; i < end; i++) {
        const float gate = (float)(1.0 / (1.0 + exp(-(double)j->share[i])));
        for (int64_t c = 0; c < j->n; c++) {
            j->to[i * j->n + c] *= gate;
        }
    }
}

/* ---- the block -------------------------------------------------------------------------- */

/* out <- the shared MLP, or zeros. It comes first, because it may read a site that is prepared. */
static sq_status
feed_shared(const struct sq_experts *e, struct sq_reader *reader, const float *x, int64_t hidden,
            const struct experts_scratch *s, float *out)
{
    const int64_t m = reader->m;
    if (!e->shared) {
        memset(out, 0, (size_t)(m * hidden) * sizeof *out);
        return SQ_OK;
    }
    SQ_TRY(sq_mlp_feed(e->shared, reader, x, s->gate, s->up, out));
    if (e->shared_gate) {
        struct rows_job j = {.to = out, .share = s->scores, .n = hidden};
        SQ_TRY(sq_linear_steady(e->gate_dtype, e->shared_gate, x, m, 1, hidden, s->scores));
        sq_parallel_for(m, sq_row_grain(hidden), open_rows, &j);
    }
    return SQ_OK;
}

/* Sorts the pairs of m tokens by expert. */
static void
sort_pairs(const struct sq_router *r, int64_t m, const struct experts_scratch *s)
{
    const int64_t pairs = m * r->chosen;
    memset(s->start, 0, (size_t)(r->count + 1) * sizeof *s->start);
    for (int64_t p = 0; p < pairs; p++) {
        s->start[s->expert[p] + 1]++;
    }
    for (int64_t i = 0; i < r->count; i++) {
        s->start[i + 1] += s->start[i];
    }
    for (int64_t p = 0; p < pairs; p++) { /* start[i] runs to the end of expert i ... */
        const int64_t place = s->start[s->expert[p]]++;
        s->token[place] = (int32_t)(p / r->chosen);
        s->share[place] = s->weight[p];
    }
    for (int64_t i = r->count; i > 0; i--) { /* ... and comes back */
        s->start[i] = s->start[i - 1];
    }
    s->start[0] = 0;
}

/* out += expert i on its pairs, begin .. begin + rows - 1, of the chunk's m tokens. */
static sq_status
feed_expert(const struct sq_mlp *mlp, struct sq_reader *reader, const float *x, int64_t m,
            int64_t begin, int64_t rows, const struct experts_scratch *s, float *out)
{
    const int64_t hidden = mlp->up.k;
    const int32_t *token = s->token + begin;
    if (rows < m) { /* else all tokens, in their order */
        struct rows_job j = {.from = x, .to = s->gathered, .token = token, .n = hidden};
        sq_parallel_for(rows, sq_row_grain(hidden), gather_rows, &j);
        x = s->gathered;
    }
    sq_reader_rows(reader, rows);
    SQ_TRY(sq_mlp_feed(mlp, reader, x, s->gate, s->up, s->result));
    struct rows_job j = {
        .from = s->result, .to = out, .token = token, .share = s->share + begin, .n = hidden};
    sq_parallel_for(rows, sq_row_grain(hidden), add_rows, &j);
    return SQ_OK;
}

sq_status
sq_experts_feed(const struct sq_experts *experts, struct sq_reader *reader, const float *x,
                void *workspace, float *out)
{
    const struct sq_router *r = &experts->router;
    const int64_t m = reader->m, hidden = experts->each[0].up.k;
    struct experts_scratch s;
    lay_out(experts, m, workspace, &s);
    SQ_TRY(feed_shared(experts, reader, x, hidden, &s, out));
    SQ_TRY(sq_router_choose(r, x, m, hidden, s.scores, s.expert, s.weight));
    sort_pairs(r, m, &s);
    for (int64_t i = 0; i < r->count; i++) {
        const int64_t begin = s.start[i], rows = s.start[i + 1] - begin;
        if (rows) {
            SQ_TRY(feed_expert(&experts->each[i], reader, x, m, begin, rows, &s, out));
        }
    }
    sq_reader_rows(reader, m);
    return SQ_OK;
}
