/* SPDX-License-Identifier: Apache-2.0 */
/* One watch per call, found by a thread-local pointer; a flag tells the pool's threads. */
#include "core/sq_interrupt.h"

#include <stdatomic.h>
#include <stddef.h>
#include <time.h>

#define ASK_NS INT64_C(100000000)
#ifdef CLOCK_MONOTONIC_COARSE
#define COARSE_CLOCK CLOCK_MONOTONIC_COARSE
#else
#define COARSE_CLOCK CLOCK_MONOTONIC /* macOS */
#endif

static _Thread_local struct sq_watch *current;
static _Atomic int asking; /* threads that ask */

/* Some milliseconds coarse, but it reads no counter of the CPU. */
static int64_t
coarse_ns(void)
{
    struct timespec t;
    clock_gettime(COARSE_CLOCK, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

void
sq_watch_begin(struct sq_watch *watch, int (*wants_stop)(void *), void *context)
{
    *watch = (struct sq_watch){.wants_stop = wants_stop,
                               .context = context,
                               .next_ns = coarse_ns() + ASK_NS,
                               .asker = &current,
                               .outer = current};
    current = watch;
}

int
sq_watch_end(struct sq_watch *watch)
{
    current = watch->outer;
    return atomic_load(&watch->stopped);
}

struct sq_watch *
sq_watch_current(void)
{
    return current;
}

void
sq_watch_join(struct sq_watch *watch)
{
    current = watch;
}

int
sq_stopped(void)
{
    struct sq_watch *watch = current;
    if (!watch) {
        return 0;
    }
    if (watch->asker == &current && !atomic_load(&watch->stopped) &&
        coarse_ns() >= watch->next_ns) {
        current = NULL; /* what wants_stop calls is no part of this call */
        atomic_fetch_add(&asking, 1);
        if (watch->wants_stop(watch->context)) {
            atomic_store(&watch->stopped, 1);
        }
        atomic_fetch_sub(&asking, 1);
        current = watch;
        watch->next_ns = coarse_ns() + ASK_NS;
    }
    return atomic_load(&watch->stopped);
}

int
sq_asking(void)
{
    return atomic_load(&asking) > 0;
}

sq_status
sq_stop_status(void)
{
    return sq_stopped() ? SQ_ERR_INTERRUPTED : SQ_OK;
}
