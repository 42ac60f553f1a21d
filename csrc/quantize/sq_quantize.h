/* SPDX-License-Identifier: Apache-2.0 */
/* One group at a time: what the loops over groups of sq_quantize.c and sq_weights.c share. */
#ifndef SQ_QUANTIZE_H
#define SQ_QUANTIZE_H

#include <stdint.h>

#include "singlequant.h"

/* SQ_OK if q's bits, clip and group suit rows of k; q->group 0 is the whole row. */
sq_status
sq_quantizer_check(const struct sq_quantizer *q, int64_t k);

/* Elements of the scratch that sq_quantize_group takes for groups of k, SQ_ALIGN_BYTES aligned. */
int64_t
sq_quantize_scratch(int64_t k);

/* One group x [k]: codes [k] + offset, scale and zero (0 when symmetric). 1, or 0 if x holds NaN or
 * Inf. */
int
sq_quantize_group(const struct sq_kernels *kernels, const struct sq_quantizer *q, const float *x,
                  int64_t k, int offset, int16_t *scratch, int8_t *codes, float *scale,
                  int32_t *zero);

/* words [ceil(k / 8)] <- nibbles [k], code + 8 in each byte, which is readable and written as code
 * 0 up to the next multiple of eight. */
void
sq_pack_nibbles(uint8_t *nibbles, int64_t k, int32_t *words);

#endif
