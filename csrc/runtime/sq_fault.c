/* SPDX-License-Identifier: Apache-2.0 */
/* Texts of refused layers. */
#include "runtime/sq_fault.h"

#include <stdarg.h>
#include <stdio.h>

sq_status
sq_refuse(struct sq_fault *fault, sq_status status, int site, const char *format, ...)
{
    if (fault) {
        va_list values;
        va_start(values, format);
        fault->site = site;
        (void)vsnprintf(fault->text, sizeof fault->text, format, values);
        va_end(values);
    }
    return status;
}

sq_status
sq_expect_range(struct sq_fault *fault, const char *name, int64_t found, int64_t least,
                int64_t most)
{
    if (found >= least && found <= most) {
        return SQ_OK;
    }
    return sq_refuse(fault, SQ_ERR_RANGE, -1, "%s: expected %lld to %lld, got %lld", name,
                     (long long)least, (long long)most, (long long)found);
}
