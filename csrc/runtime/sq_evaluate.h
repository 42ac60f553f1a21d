/* SPDX-License-Identifier: Apache-2.0 */
/* Measures of logits. */
#ifndef SQ_EVALUATE_H
#define SQ_EVALUATE_H

#include "core/sq_types.h"

/* nll [m] <- -log softmax(logits [m][v])[target [m]], in float64. */
sq_status
sq_negative_log_likelihood(const float *logits, const int64_t *target, int64_t m, int64_t v,
                           double *nll);

/* kl [m] <- KL(softmax(p) || softmax(q)) in nats; same_top [m] <- 1 where the argmax agree. */
sq_status
sq_kl_divergence(const float *p, const float *q, int64_t m, int64_t v, double *kl,
                 uint8_t *same_top);

/* Bytes of workspace for each logit. */
#define SQ_SAMPLE_BYTES 16

/* Next token from logits [v]: temperature 0 is argmax; top_k 0 and top_p 1 are off. uniform is
 * the caller's random number, in [0, 1). workspace: v * SQ_SAMPLE_BYTES. */
sq_status
sq_sample(const float *logits, int64_t v, float temperature, int64_t top_k, float top_p,
          double uniform, void *workspace, int64_t *token);

/* token [m] <- the next token of each row of logits [m][v], by uniform [m]. workspace: workers * v
 * * SQ_SAMPLE_BYTES, for so many workers side by side; their number changes no token. */
sq_status
sq_sample_rows(const float *logits, int64_t m, int64_t v, float temperature, int64_t top_k,
               float top_p, const double *uniform, int64_t workers, void *workspace,
               int64_t *token);

#endif
