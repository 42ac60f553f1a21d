/* SPDX-License-Identifier: Apache-2.0 */
/* Status numbers to text. */
#include "singlequant.h"

const char *
sq_status_text(sq_status status)
{
    switch (status) {
        case SQ_OK:
            return "ok";
        case SQ_ERR_NULL:
            return "a required array is missing";
        case SQ_ERR_SHAPE:
            return "shapes do not agree";
        case SQ_ERR_RANGE:
            return "a value is out of range";
        case SQ_ERR_DTYPE:
            return "unsupported element type";
        case SQ_ERR_NOMEM:
            return "out of memory";
        case SQ_ERR_FORMAT:
            return "malformed data";
        case SQ_ERR_NONFINITE:
            return "NaN or Inf found";
        case SQ_ERR_INTERNAL:
            return "internal error";
        case SQ_ERR_INTERRUPTED:
            return "interrupted";
    }
    return "unknown status";
}
