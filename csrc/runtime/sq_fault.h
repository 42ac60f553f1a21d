/* SPDX-License-Identifier: Apache-2.0 */
/* Why a layer was refused, in words that name the part, the expected and the found. */
#ifndef SQ_FAULT_H
#define SQ_FAULT_H

#include "core/sq_types.h"

struct sq_fault {
    int site; /* the site that the text speaks of, or -1 */
    char text[160];
};

/* Fills fault, unless it is NULL, and returns status. */
sq_status
sq_refuse(struct sq_fault *fault, sq_status status, int site, const char *format, ...)
    __attribute__((format(printf, 4, 5)));

/* SQ_OK if least <= found <= most, otherwise SQ_ERR_RANGE and a fault that starts with name. */
sq_status
sq_expect_range(struct sq_fault *fault, const char *name, int64_t found, int64_t least,
                int64_t most);

#endif
