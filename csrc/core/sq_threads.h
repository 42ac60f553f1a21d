/* SPDX-License-Identifier: Apache-2.0 */
/* The pool: one blocking parallel loop over fixed chunks. */
#ifndef SQ_THREADS_H
#define SQ_THREADS_H

#include <stdint.h>

#define SQ_THREADS_MAX 256

/* Handles items begin .. end - 1. thread is in 0 .. sq_get_num_threads() - 1 and is exclusive to
 * the caller for the duration of the call (an index into per-thread scratch). */
typedef void (*sq_range_fn)(void *context, int64_t begin, int64_t end, int thread);

/* Runs fn over 0 .. items - 1 in chunks of grain items; chunk borders are multiples of grain, so
 * that they do not depend on the number of threads. Returns when all is done, or
 * earlier when the call that it is part of is stopped (sq_interrupt.h). A call made while the pool
 * is busy (another thread's, or from inside fn) runs serially on the caller, as thread 0. */
void
sq_parallel_for(int64_t items, int64_t grain, sq_range_fn fn, void *context);

/* 1 .. SQ_THREADS_MAX; values outside are brought in range. 0, or 1 where a signal handler asks
 * while its thread's own loop runs: nothing changes then. */
int
sq_set_num_threads(int count);

int
sq_get_num_threads(void);

/* CPUs that this process may use at once: by its affinity and by the quotas of its cgroups. */
int
sq_available_cpus(void);

/* Registers the fork handlers; call once. */
void
sq_threads_init(void);

#endif
