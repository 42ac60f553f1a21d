/* SPDX-License-Identifier: Apache-2.0 */
/* A pool of pthreads that hands out chunks by an atomic counter; safe across fork. */
#include "core/sq_threads.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stddef.h>
#include <time.h>

#include "core/sq_cgroup.h"
#include "core/sq_internal.h"
#include "core/sq_interrupt.h"

/* One job at a time. Workers wait until generation changes, join the job if they are among the
 * invited, 1 .. invited, and take chunks until none is left. The caller takes chunks too, withdraws
 * the invitation when there are no more and waits for those who joined: on a busy machine it never
 * waits for a worker that the system has not scheduled yet. A worker that has taken part looks out
 * for the next job for SPIN_NS before it sleeps, yielding the CPU to whoever wants it, since the
 * jobs of a decoder follow one another within microseconds and waking a thread takes tens. */
enum { SPIN_NS = 50000 };
/* Of a worker: a call of the AMX kernels holds 100 KiB, and some C libraries give 128 KiB. */
enum { STACK_BYTES = 1 << 20 };
/* The caller wakes so often while workers finish, to ask whether its call shall stop. */
enum { DONE_WAIT_NS = 50000000 };

static struct {
    pthread_mutex_t owner; /* held by the caller whose job runs */
    pthread_mutex_t lock;  /* guards everything below but the atomics */
    pthread_cond_t wake, done;
    _Atomic int wanted;
    int started, invited;
    _Atomic int running; /* workers that joined and are not done; changed with lock held */
    _Atomic uint64_t generation;
    sq_range_fn fn;
    void *context;
    int64_t items, grain;
    struct sq_watch *watch; /* of the call that the job is part of, or NULL */
    _Atomic int64_t next;
} pool = {.owner = PTHREAD_MUTEX_INITIALIZER,
          .lock = PTHREAD_MUTEX_INITIALIZER,
          .wake = PTHREAD_COND_INITIALIZER,
          .done = PTHREAD_COND_INITIALIZER,
          .wanted = 1};

/* 1 in the thread that holds pool.owner: what a signal handler calls may find it held by itself. */
static _Thread_local int owns_pool;

static void
take_chunks(int thread)
{
    while (!sq_stopped()) {
        const int64_t begin = atomic_fetch_add(&pool.next, pool.grain);
        if (begin >= pool.items) {
            return;
        }
        pool.fn(pool.context, begin, sq_min_i64(begin + pool.grain, pool.items), thread);
    }
}

static int64_t
now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

/* Returns when a job newer than `seen` has come, or after SPIN_NS. */
static void
await_job(uint64_t seen)
{
    const int64_t end = now_ns() + SPIN_NS;
    while (atomic_load(&pool.generation) == seen && now_ns() < end) {
        sched_yield();
    }
}

/* Returns when nobody works on the job any more, or after SPIN_NS. */
static void
await_workers(void)
{
    const int64_t end = now_ns() + SPIN_NS;
    while (atomic_load(&pool.running) > 0 && now_ns() < end) {
        sched_yield();
    }
}

static void *
worker(void *argument)
{
    const int thread = (int)(intptr_t)argument;
    pthread_mutex_lock(&pool.lock);
    uint64_t seen = pool.generation - 1; /* the job that started this worker counts as new */
    for (;;) {
        while (seen == pool.generation) {
            pthread_cond_wait(&pool.wake, &pool.lock);
        }
        seen = pool.generation;
        if (thread > pool.invited) { /* not part of this job, or too late */
            continue;
        }
        pool.running++;
        sq_watch_join(pool.watch);
        pthread_mutex_unlock(&pool.lock);
        take_chunks(thread);
        sq_watch_join(NULL);
        pthread_mutex_lock(&pool.lock);
        if (--pool.running == 0) {
            pthread_cond_signal(&pool.done);
        }
        pthread_mutex_unlock(&pool.lock);
        await_job(seen);
        pthread_mutex_lock(&pool.lock);
    }
    return NULL;
}

/* With lock held, which is given back while it waits: until no worker is at the job any more. */
static void
wait_for_workers(void)
{
    while (pool.running > 0) {
        struct timespec until;
        clock_gettime(CLOCK_REALTIME, &until);
        until.tv_nsec += DONE_WAIT_NS;
        until.tv_sec += until.tv_nsec / 1000000000;
        until.tv_nsec %= 1000000000;
        if (pthread_cond_timedwait(&pool.done, &pool.lock, &until)) {
            pthread_mutex_unlock(&pool.lock);
            (void)sq_stopped(); /* for the workers to see */
            pthread_mutex_lock(&pool.lock);
        }
    }
}

/* With lock held: brings the number of workers up to wanted - 1; fewer if the system refuses. */
static int
start_workers(void)
{
    while (pool.started < pool.wanted - 1) {
        pthread_t id;
        pthread_attr_t attributes;
        if (pthread_attr_init(&attributes)) {
            break;
        }
        pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
        (void)pthread_attr_setstacksize(&attributes, STACK_BYTES);
        const int failed =
            pthread_create(&id, &attributes, worker, (void *)(intptr_t)(pool.started + 1));
        pthread_attr_destroy(&attributes);
        if (failed) {
            break;
        }
        pool.started++;
    }
    return sq_min_i64(pool.started, pool.wanted - 1);
}

void
sq_parallel_for(int64_t items, int64_t grain, sq_range_fn fn, void *context)
{
    if (items <= 0) {
        return;
    }
    grain = sq_max_i64(grain, 1);
    if (items <= grain || pool.wanted == 1 || pthread_mutex_trylock(&pool.owner)) {
        for (int64_t begin = 0; begin < items && !sq_stopped(); begin += grain) {
            fn(context, begin, sq_min_i64(begin + grain, items), 0);
        }
        return;
    }
    owns_pool = 1;
    pthread_mutex_lock(&pool.lock);
    pool.fn = fn;
    pool.context = context;
    pool.items = items;
    pool.grain = grain;
    pool.watch = sq_watch_current();
    atomic_store(&pool.next, 0);
    pool.invited = start_workers();
    pool.generation++;
    pthread_cond_broadcast(&pool.wake);
    pthread_mutex_unlock(&pool.lock);

    take_chunks(0);

    pthread_mutex_lock(&pool.lock);
    pool.invited = 0;
    if (pool.running > 0) {
        pthread_mutex_unlock(&pool.lock);
        await_workers();
        pthread_mutex_lock(&pool.lock);
    }
    wait_for_workers();
    pthread_mutex_unlock(&pool.lock);
    owns_pool = 0;
    pthread_mutex_unlock(&pool.owner);
}

int
sq_set_num_threads(int count)
{
    if (owns_pool) {
        return 1;
    }
    pthread_mutex_lock(&pool.owner);
    pool.wanted = (int)sq_max_i64(1, sq_min_i64(count, SQ_THREADS_MAX));
    pthread_mutex_unlock(&pool.owner);
    return 0;
}

int
sq_get_num_threads(void)
{
    return pool.wanted;
}

int
sq_available_cpus(void)
{
    cpu_set_t set;
    const int quota = sq_cgroup_cpus("");
    const int allowed = sched_getaffinity(0, sizeof set, &set) ? 1 : CPU_COUNT(&set);
    return (int)sq_max_i64(1, quota ? sq_min_i64(quota, allowed) : allowed);
}

/* A thread that forks waits for the job that runs, so that the child finds BLAS at rest. It does
 * not where the job's caller asks whether to stop: that may wait for a lock (Python's) which the
 * forking thread holds, or the forking thread is that caller, in a signal handler. */
enum { PAUSE_NS = 1000000 };
static _Thread_local int fork_owns_pool;

static void
before_fork(void)
{
    const struct timespec pause = {.tv_nsec = PAUSE_NS};
    fork_owns_pool = 1;
    while (fork_owns_pool && pthread_mutex_trylock(&pool.owner)) {
        fork_owns_pool = !sq_asking();
        nanosleep(&pause, NULL);
    }
    pthread_mutex_lock(&pool.lock);
}

static void
after_fork_parent(void)
{
    pthread_mutex_unlock(&pool.lock);
    if (fork_owns_pool) {
        pthread_mutex_unlock(&pool.owner);
    }
}

/* The child has no workers; the locks were held by this thread, the conditions had waiters. Chunks
 * of a job that a signal handler forked in are lost with the workers that had them. */
static void
after_fork_child(void)
{
    pthread_mutex_init(&pool.owner, NULL);
    pthread_mutex_init(&pool.lock, NULL);
    pthread_cond_init(&pool.wake, NULL);
    pthread_cond_init(&pool.done, NULL);
    pool.started = 0;
    pool.invited = 0;
    pool.running = 0;
    if (owns_pool) {
        pthread_mutex_lock(&pool.owner);
        atomic_store(&pool.watch->stopped, 1);
    }
}

void
sq_threads_init(void)
{
    pthread_atfork(before_fork, after_fork_parent, after_fork_child);
}
