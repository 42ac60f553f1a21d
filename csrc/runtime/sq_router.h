/* SPDX-License-Identifier: Apache-2.0 */
/* The router: which experts a token goes to, and with which weights. */
#ifndef SQ_ROUTER_H
#define SQ_ROUTER_H

#include "core/sq_types.h"
#include "runtime/sq_fault.h"

#define SQ_EXPERTS_MAX 2048

/* Scores of the logits: SOFTMAX over all experts; SIGMOID of each; CHOSEN: the logits themselves,
 * whose softmax over the chosen ones gives the weights. */
enum sq_scoring { SQ_SCORING_SOFTMAX, SQ_SCORING_SIGMOID, SQ_SCORING_CHOSEN, SQ_N_SCORINGS };

/* Score of a group of experts: its largest, or the sum of its two largest. */
enum sq_group_score { SQ_GROUP_MAX, SQ_GROUP_TOP2, SQ_N_GROUP_SCORES };

/* logits = x w^T + bias in float32, scores from them; the experts with the largest scores +
 * correction are chosen, where there are groups from the chosen_groups best of them. Equal ones:
 * the lower index first. Weights are the chosen scores, divided by their sum where `normalize`,
 * times scale. */
struct sq_router {
    int64_t count, chosen;
    enum sq_scoring scoring;
    int normalize;
    float scale;
    int64_t groups, chosen_groups; /* of count / groups experts each, one after the other */
    enum sq_group_score group_score;
    sq_dtype dtype;
    const void *weight;             /* [count][hidden] of dtype */
    const float *bias, *correction; /* [count] or NULL */
};

/* Proves all but the shape of the arrays, which the caller knows. */
sq_status
sq_router_seal(const struct sq_router *router, struct sq_fault *fault);

/* For x [m][hidden]: expert and weight [m][chosen], largest score first. An expert stands at most
 * once in a token's row, whatever x holds. A token's results do not depend on m. scores [m][count]
 * is scratch. */
sq_status
sq_router_choose(const struct sq_router *router, const float *x, int64_t m, int64_t hidden,
                 float *scores, int32_t *expert, float *weight);

#endif
