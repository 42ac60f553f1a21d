/* SPDX-License-Identifier: Apache-2.0 */
/* Memory that a thread keeps from call to call. */
#include "core/sq_scratch.h"

#include <pthread.h>

#include "core/sq_internal.h"

static _Thread_local struct {
    void *memory;
    size_t bytes;
} scratch;

static pthread_once_t once = PTHREAD_ONCE_INIT;
static pthread_key_t key; /* frees the memory of threads that end */

static void
make_key(void)
{
    (void)pthread_key_create(&key, free);
}

void *
sq_thread_scratch(size_t bytes)
{
    if (scratch.bytes < bytes) {
        (void)pthread_once(&once, make_key);
        free(scratch.memory);
        scratch.memory = sq_alloc(bytes);
        scratch.bytes = scratch.memory ? bytes : 0;
        (void)pthread_setspecific(key, scratch.memory);
    }
    return scratch.memory;
}
