/* SPDX-License-Identifier: Apache-2.0 */
/* The tokens of a call. */
#ifndef SQ_TOKENS_H
#define SQ_TOKENS_H

#include <stdint.h>

/* Token t of sequence[t] stands at position[t]. Sequences and positions are below 2^31 - 1 and
 * 2^31. */
struct sq_tokens {
    int64_t m;
    int64_t length; /* one more than the largest position */
    const int32_t *sequence;
    const int64_t *position;
};

#endif
