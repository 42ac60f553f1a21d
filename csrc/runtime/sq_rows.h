/* SPDX-License-Identifier: Apache-2.0 */
/* Grain of loops over rows. */
#ifndef SQ_ROWS_H
#define SQ_ROWS_H

#include "core/sq_internal.h"

/* Rows of `width` elements in one chunk of a parallel loop. */
static inline int64_t
sq_row_grain(int64_t width)
{
    enum { ROW_GRAIN = 1 << 12 }; /* elements of a chunk */
    return sq_max_i64(1, ROW_GRAIN / sq_max_i64(width, 1));
}

#endif
