/* SPDX-License-Identifier: Apache-2.0 */
/* From logits to tokens and figures: sampling, negative log likelihood, Kullback-Leibler
 * divergence. */
#include <math.h>
#include <stdatomic.h>

#include "core/sq_internal.h"
#include "core/sq_threads.h"

/* ---- sampling --------------------------------------------------------------------------- */

struct candidate {
    double weight; /* exp((logit - largest) / temperature), in (0, 1] or 0 */
    int64_t token;
};
_Static_assert(sizeof(struct candidate) == 16, "sq_sample promises 16 bytes per logit");

/* Order of the walk: by probability, the lower index first among equals. */
static int
before(const struct candidate *a, const struct candidate *b)
{
    return a->weight > b->weight || (a->weight == b->weight && a->token < b->token);
}

static void
sift_down(struct candidate *heap, int64_t count, int64_t at)
{
    const struct candidate moved = heap[at];
    for (int64_t child; (child = 2 * at + 1) < count; at = child) {
        child += child + 1 < count && before(&heap[child + 1], &heap[child]);
        if (!before(&heap[child], &moved)) {
            break;
        }
        heap[at] = heap[child];
    }
    heap[at] = moved;
}

/* The walk over candidates in order. A heap makes it cheap: a draw from a peaked distribution looks
 * at few tokens of many. Popped candidates collect, in order, from the array's end downwards. */
struct walk {
    struct candidate *all;
    int64_t v, popped;
};

static const struct candidate *
pop(struct walk *w)
{
    const int64_t left = w->v - ++w->popped;
    const struct candidate top = w->all[0];
    w->all[0] = w->all[left];
    sift_down(w->all, left, 0);
    w->all[left] = top;
    return &w->all[left];
}

static const struct candidate *
nth(struct walk *w, int64_t i)
{
    return i < w->popped ? &w->all[w->v - 1 - i] : pop(w);
}

/* The lowest index of the largest logit, or -1 if one is NaN or +Inf or all are -Inf. */
static int64_t
largest(const float *logits, int64_t v)
{
    int64_t best = 0;
    int bad = 0;
    for (int64_t i = 0; i < v; i++) {
        bad |= !(logits[i] < INFINITY);
        best = logits[i] > logits[best] ? i : best;
    }
    return bad || logits[best] == -INFINITY ? -1 : best;
}

/* Draws among the first tokens that top_k and top_p leave; total is the mass of them all. */
static int64_t
draw(struct walk *w, double total, int64_t top_k, double top_p, double uniform)
{
    int64_t kept = w->v;
    if (top_k > 0 && top_k < w->v) {
        kept = top_k;
        total = 0;
        for (int64_t i = 0; i < kept; i++) {
            total += nth(w, i)->weight;
        }
    }
    if (top_p < 1) {
        const double wanted = top_p * total;
        const int64_t limit = kept;
        total = 0;
        for (kept = 0; kept < limit && (kept == 0 || total < wanted); kept++) {
            total += nth(w, kept)->weight;
        }
    }
    const double goal = uniform * total;
    double reached = 0;
    int64_t token = nth(w, 0)->token; /* also if rounding leaves reached below goal: the last one */
    for (int64_t i = 0; i < kept; i++) {
        const struct candidate *c = nth(w, i);
        if (c->weight == 0) {
            break;
        }
        token = c->token;
        reached += c->weight;
        if (reached > goal) {
            break;
        }
    }
    return token;
}

sq_status
sq_sample(const float *logits, int64_t v, float temperature, int64_t top_k, float top_p,
          double uniform, void *workspace, int64_t *token)
{
    if (!logits || !workspace || !token) {
        return SQ_ERR_NULL;
    }
    if (v < 1) {
        return SQ_ERR_SHAPE;
    }
    if (!(temperature >= 0 && temperature < INFINITY) || top_k < 0 || !(top_p > 0 && top_p <= 1) ||
        !(uniform >= 0 && uniform < 1)) {
        return SQ_ERR_RANGE;
    }
    const int64_t best = largest(logits, v);
    if (best < 0) {
        return SQ_ERR_NONFINITE;
    }
    if (temperature == 0) {
        *token = best;
        return SQ_OK;
    }
    struct walk w = {.all = workspace, .v = v};
    double total = 0;
    for (int64_t i = 0; i < v; i++) {
        w.all[i].weight = exp(((double)logits[i] - (double)logits[best]) / (double)temperature);
        w.all[i].token = i;
        total += w.all[i].weight;
    }
    for (int64_t i = v / 2; i-- > 0;) {
        sift_down(w.all, v, i);
    }
    *token = draw(&w, total, top_k, (double)top_p, uniform);
    return SQ_OK;
}

struct sample_job {
    const float *logits;
    int64_t m, v, top_k, workers;
    float temperature, top_p;
    const double *uniform;
    struct candidate *workspace;
    int64_t *token;
    _Atomic int status; /* of a row that failed */
};

/* Items are workers: worker w takes rows w, w + workers, ... */
static void
sample_range(void *context, int64_t begin, int64_t end, int thread)
{
    struct sample_job *j = context;
    (void)thread;
    for (int64_t worker = begin; worker < end; worker++) {
        for (int64_t row = worker; row < j->m; row += j->workers) {
            const sq_status status =
                sq_sample(j->logits + row * j->v, j->v, j->temperature, j->top_k, j->top_p,
                          j->uniform[row], j->workspace + worker * j->v, j->token + row);
            if (status != SQ_OK) {
                atomic_store(&j->status, (int)status);
            }
        }
    }
}

sq_status
sq_sample_rows(const float *logits, int64_t m, int64_t v, float temperature, int64_t top_k,
               float top_p, const double *uniform, int64_t workers, void *workspace, int64_t *token)
{
    int64_t elements;
    if (!logits || !uniform || !workspace || !token) {
        return SQ_ERR_NULL;
    }
    if (m < 0 || v < 1 || workers < 1) {
        return SQ_ERR_SHAPE;
    }
    if (!sq_product(m, v, &elements)) {
        return SQ_ERR_RANGE;
    }
    struct sample_job j = {.logits = logits,
                           .m = m,
                           .v = v,
                           .top_k = top_k,
                           .workers = workers,
                           .temperature = temperature,
                           .top_p = top_p,
                           .uniform = uniform,
                           .workspace = workspace,
                           .token = token,
                           .status = SQ_OK};
    sq_parallel_for(workers, 1, sample_range, &j);
    return (sq_status)atomic_load(&j.status);
}

/* ---- likelihood and divergence -------------------------------------------------------------
 * float64, one token per item, sums in index order: the same at any number of threads. A NaN among
 * the logits gives a NaN result. */

struct evaluate_job {
    const float *p, *q;
    const int64_t *target;
    int64_t v;
    double *out;
    uint8_t *same_top;
};

static int64_t
argmax(const float *x, int64_t v)
{
    int64_t best = 0;
    for (int64_t i = 1; i < v; i++) {
        best = x[i] > x[best] ? i : best;
    }
    return best;
}

static void
likelihood_range(void *context, int64_t begin, int64_t end, int thread)
{
    const struct evaluate_job *j = context;
    (void)thread;
    for (int64_t t = begin; t < end; t++) {
        const float *row = j->p + t * j->v;
        const double top = (double)row[argmax(row, j->v)];
        double sum = 0;
        for (int64_t i = 0; i < j->v; i++) {
            sum += exp((double)row[i] - top);
        }
        j->out[t] = log(sum) - ((double)row[j->target[t]] - top);
    }
}

/* With a = p - max p, b = q - max q: KL = sum e^a (a - b) / sum e^a - log sum e^a + log sum e^b. */
static void
divergence_range(void *context, int64_t begin, int64_t end, int thread)
{
    const struct evaluate_job *j = context;
    (void)thread;
    for (int64_t t = begin; t < end; t++) {
        const float *p = j->p + t * j->v, *q = j->q + t * j->v;
        const int64_t top_p = argmax(p, j->v), top_q = argmax(q, j->v);
        double sum_p = 0, sum_q = 0, mean = 0;
        for (int64_t i = 0; i < j->v; i++) {
            const double a = (double)p[i] - (double)p[top_p], b = (double)q[i] - (double)q[top_q];
            const double weight = exp(a);
            sum_p += weight;
            sum_q += exp(b);
            mean += weight == 0 ? 0 : weight * (a - b); /* 0 log 0 = 0 */
        }
        const double kl = mean / sum_p - log(sum_p) + log(sum_q);
        j->out[t] = kl < 0 ? 0 : kl; /* rounding only: the divergence is never negative */
        j->same_top[t] = top_p == top_q;
    }
}

sq_status
sq_negative_log_likelihood(const float *logits, const int64_t *target, int64_t m, int64_t v,
                           double *nll)
{
    int64_t elements;
    if (!logits || !target || !nll) {
        return SQ_ERR_NULL;
    }
    if (m < 0 || v < 1) {
        return SQ_ERR_SHAPE;
    }
    if (!sq_product(m, v, &elements)) {
        return SQ_ERR_RANGE;
    }
    for (int64_t t = 0; t < m; t++) {
        if (target[t] < 0 || target[t] >= v) {
            return SQ_ERR_RANGE;
        }
    }
    struct evaluate_job j = {.p = logits, .target = target, .v = v, .out = nll};
    sq_parallel_for(m, 1, likelihood_range, &j);
    return SQ_OK;
}

sq_status
sq_kl_divergence(const float *p, const float *q, int64_t m, int64_t v, double *kl,
                 uint8_t *same_top)
{
    int64_t elements;
    if (!p || !q || !kl || !same_top) {
        return SQ_ERR_NULL;
    }
    if (m < 0 || v < 1) {
        return SQ_ERR_SHAPE;
    }
    if (!sq_product(m, v, &elements)) {
        return SQ_ERR_RANGE;
    }
    struct evaluate_job j = {.p = p, .q = q, .v = v, .out = kl, .same_top = same_top};
    sq_parallel_for(m, 1, divergence_range, &j);
    return SQ_OK;
}
