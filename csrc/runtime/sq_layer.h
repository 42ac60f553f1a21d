/* SPDX-License-Identifier: Apache-2.0 */
/* A decoder layer made of blocks. Fill it in, seal it once, then run it. */
#ifndef SQ_LAYER_H
#define SQ_LAYER_H

#include "runtime/sq_attention.h"
#include "runtime/sq_experts.h"
#include "runtime/sq_mlp.h"
#include "runtime/sq_norm.h"
#include "runtime/sq_site.h"

/* With mix = attention and feed = the MLP or the experts, norms of kind SQ_NORM_NONE left out:
 *     x += residual_scale * after_attention(mix(before_attention(x)))
 *     x += residual_scale * after_mlp(feed(before_mlp(x)))
 * or with norm_sums x = after_attention(x + residual_scale * mix(before_attention(x))), and so on.
 * In a parallel layer both read the x that comes in; one without before_mlp feeds on
 * before_attention(x), which is one value, so that one site may serve both. */
struct sq_layer {
    int64_t hidden;
    int parallel;
    float residual_scale;
    int norm_sums; /* not in a parallel layer */
    struct sq_norm before_attention, after_attention, before_mlp, after_mlp; /* [hidden] */
    struct sq_attention attention;
    struct sq_mlp mlp;         /* where there are no experts */
    struct sq_experts experts; /* where router.count > 0 */
    struct sq_site *sites;     /* borrowed, [n_sites], in an order of the caller's choice */
    int n_sites;
};

/* Proves all that the functions below rely on. SQ_ERR_...: fault says what does not fit. */
sq_status
sq_layer_seal(struct sq_layer *layer, struct sq_fault *fault);

/* Bytes of workspace for m tokens at positions below length, m <= SQ_TOKENS_MAX and length <= 2^31.
 */
size_t
sq_layer_workspace_bytes(const struct sq_layer *layer, int64_t m, int64_t length);

/* What layers that run one after the other on the same tokens share. */
struct sq_pass {
    struct sq_tokens tokens;
    sq_kv_cache_t *cache;
    float *hidden;                  /* [m][hidden] */
    void *workspace;                /* of the largest sq_layer_workspace_bytes among them */
    const struct sq_rotary *rotary; /* whose table lies in workspace; NULL: none does yet */
};

/* pass->hidden is updated in place by a sealed layer, number index of the cache. The keys and
 * values of the tokens are written to the cache first, whose pages are reserved for them; token t
 * attends to positions 0 .. position[t] of its own sequence. record [n_sites], or NULL, gets the
 * inputs of each site, an expert's those of the tokens routed to it. */
sq_status
sq_layer_forward(const struct sq_layer *layer, struct sq_pass *pass, int64_t index,
                 struct sq_record *record);

#endif
