/* SPDX-License-Identifier: Apache-2.0 */
/* Stopping a long call before its end: who asks for it, and how loops learn of it. */
#ifndef SQ_INTERRUPT_H
#define SQ_INTERRUPT_H

#include <stdint.h>

#include "core/sq_types.h"

/* A call of the core that may be stopped. From _begin to _end its thread asks wants_stop every
 * 100 ms or so, between two chunks of work. Once that returns 1 the call is stopped for good: no
 * chunk begins any more, in whatever loop, so none works on what another has left undone. The call
 * returns soon, with any status. Nothing that it wrote is of use, and _end returns 1.
 *
 * wants_stop may call the core, as a call of its own. It must neither fork and let the call go on
 * in the child (which ends there as if stopped) nor change the number of threads (which is
 * refused). */
struct sq_watch {
    int (*wants_stop)(void *context);
    void *context;
    int64_t next_ns; /* when to ask again */
    _Atomic int stopped;
    const void *asker; /* stands for the thread that asks */
    struct sq_watch *outer;
};

void
sq_watch_begin(struct sq_watch *watch, int (*wants_stop)(void *), void *context);

int
sq_watch_end(struct sq_watch *watch);

/* The watch of this thread's call, or NULL. */
struct sq_watch *
sq_watch_current(void);

/* Lets this thread work for another's call, or, with NULL, for none any more. */
void
sq_watch_join(struct sq_watch *watch);

/* 1 if the call that this thread works for is stopped; asks, where it is time to. Costs some 10 ns.
 * What takes long between two chunks, and chunks that take long, ask too. */
int
sq_stopped(void);

/* SQ_ERR_INTERRUPTED if so, SQ_OK otherwise. */
sq_status
sq_stop_status(void);

/* 1 while some thread is in its wants_stop. */
int
sq_asking(void);

#endif
