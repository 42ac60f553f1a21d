/* SPDX-License-Identifier: Apache-2.0 */
/* The feed-forward block: up, or gate and up, an activation, down. */
#ifndef SQ_MLP_H
#define SQ_MLP_H

#include "runtime/sq_site.h"

/* SILU x / (1 + e^-x); GELU x Phi(x); GELU_TANH its approximation by tanh; RELU2 max(x, 0)^2. */
enum sq_activation { SQ_SILU, SQ_GELU, SQ_GELU_TANH, SQ_RELU, SQ_RELU2, SQ_N_ACTIVATIONS };

/* down(activation(gate(x)) * up(x)), or down(activation(up(x))) when not gated. */
struct sq_mlp {
    enum sq_activation activation;
    int gated;
    struct sq_linear gate, up, down; /* gate: only if gated */
};

/* Proves the block; x is the value `value`, of `hidden` channels. */
sq_status
sq_mlp_seal(const struct sq_mlp *mlp, int64_t hidden, enum sq_value value, struct sq_site *sites,
            int n_sites, struct sq_fault *fault);

/* y [m][n] <- activation(gate) * up, or activation(up) where gate is NULL. y may be gate or up.
 * Parallel over rows. */
void
sq_activate(enum sq_activation activation, const float *gate, const float *up, int64_t m, int64_t n,
            float *y);

/* out [m][hidden] <- the block of x [m][hidden], tokens of the reader's chunk. gate and up are
 * scratch of [m][n of up]. */
sq_status
sq_mlp_feed(const struct sq_mlp *mlp, struct sq_reader *reader, const float *x, float *gate,
            float *up, float *out);

#endif
