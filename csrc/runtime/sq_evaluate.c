/* SPDX-License-Identifier: Apache-2.0 */
/* From logits to figures: negative log likelihood, Kullback-Leibler divergence. */
#include <math.h>
#include <stdatomic.h>

#include "core/sq_internal.h"
#include "core/sq_threads.h"

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
