/* SPDX-License-Identifier: Apache-2.0 */
/* Status codes and element types. */
#ifndef SQ_TYPES_H
#define SQ_TYPES_H

#include <stddef.h>
#include <stdint.h>

typedef enum sq_status {
    SQ_OK = 0,
    SQ_ERR_NULL = 1,
    SQ_ERR_SHAPE = 2,
    SQ_ERR_RANGE = 3,
    SQ_ERR_DTYPE = 4,
    SQ_ERR_NOMEM = 5,
    SQ_ERR_FORMAT = 6,
    SQ_ERR_NONFINITE = 7,
    SQ_ERR_INTERNAL = 8,
    SQ_ERR_INTERRUPTED = 9
} sq_status;

/* Static text of a status; never NULL. */
const char *
sq_status_text(sq_status status);

/* Element types of weights that stay in 16 or 32 bits. Numbers are pinned. */
typedef enum sq_dtype { SQ_F32 = 0, SQ_F16 = 1, SQ_BF16 = 2 } sq_dtype;

#endif
