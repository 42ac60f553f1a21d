/* SPDX-License-Identifier: Apache-2.0 */
/* Memory that a thread keeps from call to call. */
#ifndef SQ_SCRATCH_H
#define SQ_SCRATCH_H

#include <stddef.h>

/* At least so many bytes, aligned to SQ_ALIGN_BYTES, of the calling thread's own; NULL: no memory.
 * They are the same memory as the call before gave, so one user at a time. Freed when the thread
 * ends. */
void *
sq_thread_scratch(size_t bytes);

#endif
