/* SPDX-License-Identifier: Apache-2.0 */
/* Latent attention: queries, keys and values from vectors of low rank. */
#ifndef SQ_LATENT_H
#define SQ_LATENT_H

#include "runtime/sq_attention.h"

/* Proves the linears and norms of a->latent, and a->q where it is used. All functions here are for
 * a->is_latent; the sizes and the rotary embedding of a were proved. */
sq_status
sq_latent_seal(const struct sq_attention *a, int64_t hidden, struct sq_site *sites, int n_sites,
               struct sq_fault *fault);

/* Floats of scratch per token; 0 unless a->is_latent. */
int64_t
sq_latent_floats(const struct sq_attention *a);

/* q, k, v [m][heads * head_dim] <- those of x [m][hidden], before the rotary embedding. */
sq_status
sq_latent_project(const struct sq_attention *a, struct sq_reader *reader, const float *x, float *q,
                  float *k, float *v, float *scratch);

/* out [m][heads * value_dim] <- the first value_dim channels of heads, mixed [m][heads *
 * head_dim]. */
void
sq_latent_values(const struct sq_attention *a, const float *mixed, int64_t m, float *out);

#endif
