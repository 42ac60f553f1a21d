/* SPDX-License-Identifier: Apache-2.0 */
/* The router. Logits are float32 sums; exponentials are float64, rounded once, as all scores are
 * float32 in the models: experts whose scores round to one value are equal. */
#include "runtime/sq_router.h"

#include <math.h>

#include "core/sq_internal.h"
#include "core/sq_threads.h"
#include "runtime/sq_linear.h"
#include "runtime/sq_rows.h"

/* Keeps scores that are all 0 from being divided by their sum. A float32 sum of 1e-12 or more is
 * the same with it. */
#define LEAST_SUM 1e-20f

/* ---- sealing ---------------------------------------------------------------------------- */

static sq_status
seal_groups(const struct sq_router *r, struct sq_fault *fault)
{
    SQ_TRY(sq_expect_range(fault, "experts.groups", r->groups, 1, r->count));
    if (r->count % r->groups) {
        return sq_refuse(fault, SQ_ERR_SHAPE, -1,
                         "experts.groups: expected a divisor of count = %lld, got %lld",
                         (long long)r->count, (long long)r->groups);
    }
    SQ_TRY(sq_expect_range(fault, "experts.chosen_groups", r->chosen_groups, 1, r->groups));
    SQ_TRY(sq_expect_range(fault, "experts.group_score", r->group_score, 0, SQ_N_GROUP_SCORES - 1));
    const int64_t size = r->count / r->groups;
    if (r->groups > 1 && r->group_score == SQ_GROUP_TOP2 && size < 2) {
        return sq_refuse(fault, SQ_ERR_SHAPE, -1,
                         "experts.groups: expected groups of at least 2 experts, got groups of 1");
    }
    if (r->chosen > size * r->chosen_groups) {
        return sq_refuse(
            fault, SQ_ERR_SHAPE, -1,
            "experts.chosen: expected at most the %lld experts of %lld groups, got %lld",
            (long long)(size * r->chosen_groups), (long long)r->chosen_groups,
            (long long)r->chosen);
    }
    return SQ_OK;
}

sq_status
sq_router_seal(const struct sq_router *r, struct sq_fault *fault)
{
    SQ_TRY(sq_expect_range(fault, "experts.count", r->count, 1, SQ_EXPERTS_MAX));
    SQ_TRY(sq_expect_range(fault, "experts.chosen", r->chosen, 1, r->count));
    SQ_TRY(sq_expect_range(fault, "experts.scoring", r->scoring, 0, SQ_N_SCORINGS - 1));
    if (!isfinite(r->scale)) {
        return sq_refuse(fault, SQ_ERR_RANGE, -1, "experts.scale: expected a finite number");
    }
    if (!r->weight) {
        return sq_refuse(fault, SQ_ERR_NULL, -1, "experts.router: expected a weight, got none");
    }
    return seal_groups(r, fault);
}

/* ---- choosing --------------------------------------------------------------------------- */

/* x [n] <- softmax(x). */
static void
softmax(float *x, int64_t n)
{
    double sum = 0, largest = x[0];
    for (int64_t i = 1; i < n; i++) {
        largest = x[i] > largest ? x[i] : largest;
    }
    for (int64_t i = 0; i < n; i++) {
        sum += exp(x[i] - largest);
    }
    for (int64_t i = 0; i < n; i++) {
        x[i] = (float)(exp(x[i] - largest) / sum);
    }
}

/* scores [count] of logits, in place. */
static void
score(const struct sq_router *r, float *scores)
{
    for (int64_t i = 0; r->bias && i < r->count; i++) {
        scores[i] += r->bias[i];
    }
    if (r->scoring == SQ_SCORING_SOFTMAX) {
        softmax(scores, r->count);
    }
    for (int64_t i = 0; r->scoring == SQ_SCORING_SIGMOID && i < r->count; i++) {
        scores[i] = (float)(1.0 / (1.0 + exp(-(double)scores[i])));
    }
}

/* Index of the largest of keys [n] that stands behind `last` in the order of falling keys and,
 * among equal ones, rising indices; last -1: of all. n must exceed the number of those before it,
 * and no key may be NaN. */
static int64_t
next_largest(const float *keys, int64_t n, int64_t last)
{
    int64_t best = -1;
    for (int64_t i = 0; i < n; i++) {
        const int open = last < 0 || keys[i] < keys[last] || (keys[i] == keys[last] && i > last);
        if (open && (best < 0 || keys[i] > keys[best])) {
            best = i;
        }
    }
    return best;
}

/* Closes the groups that are not chosen: their keys become -Inf. A sum of Inf and -Inf becomes
 * -Inf, as NaN has no place in the order of next_largest. */
static void
close_groups(const struct sq_router *r, float *keys)
{
    const int64_t size = r->count / r->groups;
    float sums[SQ_EXPERTS_MAX];
    char open[SQ_EXPERTS_MAX] = {0};
    for (int64_t g = 0; g < r->groups; g++) {
        const float *group = keys + g * size;
        const int64_t first = next_largest(group, size, -1);
        sums[g] = group[first];
        if (r->group_score == SQ_GROUP_TOP2) {
            sums[g] += group[next_largest(group, size, first)];
        }
        sums[g] = isnan(sums[g]) ? -INFINITY : sums[g];
    }
    for (int64_t i = 0, g = -1; i < r->chosen_groups; i++) {
        g = next_largest(sums, r->groups, g);
        open[g] = 1;
    }
    for (int64_t i = 0; i < r->count; i++) {
        keys[i] = open[i / size] ? keys[i] : -INFINITY;
    }
}

/* scores [count] holds logits. Keys are in a total order, as NaN becomes -Inf. */
static void
choose(const struct sq_router *r, float *scores, int32_t *expert, float *weight)
{
    float keys[SQ_EXPERTS_MAX];
    score(r, scores);
    for (int64_t i = 0; i < r->count; i++) {
        const float key = r->correction ? scores[i] + r->correction[i] : scores[i];
        keys[i] = isnan(key) ? -INFINITY : key;
    }
    if (r->groups > 1) {
        close_groups(r, keys);
    }
    for (int64_t i = 0, last = -1; i < r->chosen; i++) {
        last = next_largest(keys, r->count, last);
        expert[i] = (int32_t)last;
        weight[i] = scores[last];
    }
    if (r->scoring == SQ_SCORING_CHOSEN) {
        softmax(weight, r->chosen);
    }
    float sum = 0.0f;
    for (int64_t i = 0; i < r->chosen; i++) {
        sum += weight[i];
    }
    for (int64_t i = 0; i < r->chosen; i++) {
        weight[i] = (r->normalize ? weight[i] / (sum + LEAST_SUM) : weight[i]) * r->scale;
    }
}

struct choose_job {
    const struct sq_router *router;
    float *scores;
    int32_t *expert;
    float *weight;
};

static void
choose_rows(void *context, int64_t begin, int64_t end, int thread)
{
    const struct choose_job *j = context;
    const struct sq_router *r = j->router;
    (void)thread;
    for (int64_t t = begin; t < end; t++) {
        choose(r, j->scores + t * r->count, j->expert + t * r->chosen, j->weight + t * r->chosen);
    }
}

sq_status
sq_router_choose(const struct sq_router *router, const float *x, int64_t m, int64_t hidden,
                 float *scores, int32_t *expert, float *weight)
{
    struct choose_job j = {.router = router, .scores = scores, .expert = expert, .weight = weight};
    SQ_TRY(sq_linear_steady(router->dtype, router->weight, x, m, router->count, hidden, scores));
    sq_parallel_for(m, sq_row_grain(router->count * router->chosen), choose_rows, &j);
    return sq_stop_status(); /* the experts index what was chosen */
}
