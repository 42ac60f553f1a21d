/* SPDX-License-Identifier: Apache-2.0 */
/* The feed-forward block: up, or gate and up, an activation, down. */
#ifndef SQ_MLP_H
#define SQ_MLP_H

#include "runtime/sq_site.h"

/* SILU x / (1 + e^-x); GELU x Phi(x); GELU_TANH its approximation by tanh; RELU2 max(x, 0)^2;
 * QUICK_GELU x / (1 + e^-1.702x).
 * SWIGLU_CLAMPED exists with a gate alone: (u + 1) g / (1 + e^-1.702g) of the gate g, at most
 * limit, and of up u, within +-limit. */
enum sq_activation {
    SQ_SILU,
    SQ_GELU,
    SQ_GELU_TANH,
    SQ_RELU,
    SQ_RELU2,
    SQ_QUICK_GELU,
    SQ_SWIGLU_CLAMPED,
    SQ_N_ACTIVATIONS
};

/* down(activation(gate(x)) * up(x)), or down(activation(up(x))) when not gated. */
struct sq_mlp {
    enum sq_activation activation;
    float limit; /* more than 0 for SQ_SWIGLU_CLAMPED, 0 for all else */
    int gated;
    struct sq_linear gate, up, down; /* gate: only if gated */
};

/* Proves that the activation exists, with the gate or without, and that limit is one of it. name
 * starts the texts of faults. */
sq_status
sq_activation_check(enum sq_activation activation, float limit, int gated, const char *name,
                    struct sq_fault *fault);

/* Proves the block; x is the value `value`, of `hidden` channels, and down reads SQ_VALUE_INNER, or
 * value + 1 in an expert. name starts the texts of faults. */
sq_status
sq_mlp_seal(const struct sq_mlp *mlp, int64_t hidden, int value, const char *name,
            struct sq_site *sites, int n_sites, struct sq_fault *fault);

/* y [m][n] <- activation(gate) * up, or activation(up) where gate is NULL. y may be gate or up.
 * Parallel over rows. */
void
sq_activate(enum sq_activation activation, float limit, const float *gate, const float *up,
            int64_t m, int64_t n, float *y);

/* out [m][hidden] <- the block of x [m][hidden], tokens of the reader's chunk. gate and up are
 * scratch of [m][n of up]. */
sq_status
sq_mlp_feed(const struct sq_mlp *mlp, struct sq_reader *reader, const float *x, float *gate,
            float *up, float *out);

#endif
