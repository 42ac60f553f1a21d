/* SPDX-License-Identifier: Apache-2.0 */
/* A pool of pthreads that hands out chunks by an atomic counter; safe across fork. */
#include "core/sq_threads.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stddef.h>
#include <time.h>
#include <unistd.h>

#include "core/sq_cgroup.h"
#include "core/sq_internal.h"
#include "core/sq_interrupt.h"

/* One job at a time. What stands in `state` says all that a worker must know to join: which job it
 * is, whether it may be joined, how many workers are invited and how many have joined. A worker
 * joins by one exchange that fails when any of this has changed. It takes chunks until none is left
 * and leaves. The caller takes chunks too, closes the job when there are no more and waits for
 * those who joined: on a busy machine it never waits for a worker that the system has not scheduled
 * yet.
 *
 * The jobs of a decoder follow one another within microseconds, while waking a thread takes tens of
 * them. So a worker that has taken part looks out for the next job for SPIN_NS before it sleeps,
 * and the caller for its workers' end. They pause for PAUSE_NS and then yield the CPU to
 * whoever wants it. Locks are taken only to sleep and to wake those who do. */
enum { SPIN_NS = 50000, PAUSE_NS = 10000, PAUSES = 8 };
/* Of a worker: a call of the AMX kernels holds 100 KiB, and some C libraries give 128 KiB. */
enum { STACK_BYTES = 1 << 20 };
/* The caller wakes so often while workers finish, to ask whether its call shall stop. */
enum { DONE_WAIT_NS = 50000000 };

/* state: the job's number, OPEN, the invited, the joined. */
enum { COUNT_BITS = 12 };
#define COUNT_MASK (((uint64_t)1 << COUNT_BITS) - 1)
#define OPEN ((uint64_t)1 << 2 * COUNT_BITS)
#define NEXT_JOB (OPEN << 1)
_Static_assert(SQ_THREADS_MAX <= COUNT_MASK, "the numbers of workers fit their fields");

static struct {
    pthread_mutex_t owner; /* held by the caller whose job runs; guards started */
    pthread_mutex_t lock;  /* held to sleep and to wake */
    pthread_cond_t wake, done;
    _Atomic uint64_t state;
    _Atomic int sleeping; /* workers that wait for `wake` */
    _Atomic int awaited;  /* the caller waits for `done` */
    _Atomic int wanted;
    int started;
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

static uint64_t
job_of(uint64_t state)
{
    return state / NEXT_JOB;
}

static int
joined(uint64_t state)
{
    return (int)(state & COUNT_MASK);
}

static int
invited(uint64_t state)
{
    return (int)(state >> COUNT_BITS & COUNT_MASK);
}

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

static void
pause_cpu(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* Waits for a while: pauses at first, then yields. 0 when SPIN_NS are over. */
static int
wait_a_while(int64_t *begin)
{
    for (int i = 0; i < PAUSES; i++) {
        pause_cpu();
    }
    const int64_t now = now_ns();
    *begin = *begin ? *begin : now;
    if (now - *begin > PAUSE_NS) {
        sched_yield();
    }
    return now - *begin < SPIN_NS;
}

/* Looks at the state until a job newer than `seen` has come; 0 after SPIN_NS. */
static int
spin_for_job(uint64_t seen)
{
    int64_t begin = 0;
    do {
        if (job_of(atomic_load(&pool.state)) != seen) {
            return 1;
        }
    } while (wait_a_while(&begin));
    return 0;
}

/* Looks at the state until nobody works on the job; 0 after SPIN_NS. */
static int
spin_for_workers(void)
{
    int64_t begin = 0;
    do {
        if (!joined(atomic_load(&pool.state))) {
            return 1;
        }
    } while (wait_a_while(&begin));
    return 0;
}

/* `sleeping` is raised before the state is looked at again, and the caller changes the state before
 * it looks at `sleeping`: one of them sees the other. */
static void
sleep_until_job(uint64_t seen)
{
    pthread_mutex_lock(&pool.lock);
    atomic_fetch_add(&pool.sleeping, 1);
    while (job_of(atomic_load(&pool.state)) == seen) {
        pthread_cond_wait(&pool.wake, &pool.lock);
    }
    atomic_fetch_sub(&pool.sleeping, 1);
    pthread_mutex_unlock(&pool.lock);
}

/* The same between `awaited` and the last worker's leaving. */
static void
sleep_until_done(void)
{
    pthread_mutex_lock(&pool.lock);
    atomic_store(&pool.awaited, 1);
    while (joined(atomic_load(&pool.state))) {
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
    atomic_store(&pool.awaited, 0);
    pthread_mutex_unlock(&pool.lock);
}

static void
leave(void)
{
    if (joined(atomic_fetch_sub(&pool.state, 1)) == 1 && atomic_load(&pool.awaited)) {
        pthread_mutex_lock(&pool.lock);
        pthread_cond_signal(&pool.done);
        pthread_mutex_unlock(&pool.lock);
    }
}

static void *
worker(void *argument)
{
    const int thread = (int)(intptr_t)argument;
    uint64_t seen = job_of(atomic_load(&pool.state)) - 1; /* the job that started it is new */
    for (;;) {
        sleep_until_job(seen);
        do {
            uint64_t state = atomic_load(&pool.state);
            seen = job_of(state);
            while (job_of(state) == seen && state & OPEN && thread <= invited(state)) {
                if (atomic_compare_exchange_weak(&pool.state, &state, state + 1)) {
                    sq_watch_join(pool.watch);
                    take_chunks(thread);
                    sq_watch_join(NULL);
                    leave();
                    break;
                }
            }
        } while (spin_for_job(seen));
    }
    return NULL;
}

/* With owner held: brings the number of workers up to wanted - 1; fewer if the system refuses. */
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
    return (int)sq_min_i64(pool.started, pool.wanted - 1);
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
    pool.fn = fn;
    pool.context = context;
    pool.items = items;
    pool.grain = grain;
    pool.watch = sq_watch_current();
    atomic_store(&pool.next, 0);
    const uint64_t guests = (uint64_t)start_workers();
    const uint64_t job = (job_of(atomic_load(&pool.state)) + 1) * NEXT_JOB;
    atomic_store(&pool.state, job | OPEN | guests << COUNT_BITS);
    if (atomic_load(&pool.sleeping)) {
        pthread_mutex_lock(&pool.lock);
        pthread_cond_broadcast(&pool.wake);
        pthread_mutex_unlock(&pool.lock);
    }

    take_chunks(0);

    atomic_fetch_and(&pool.state, ~OPEN);
    if (!spin_for_workers()) {
        sleep_until_done();
    }
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
    const int quota = sq_cgroup_cpus("");
#ifdef __linux__
    cpu_set_t set;
    const int allowed = sched_getaffinity(0, sizeof set, &set) ? 1 : CPU_COUNT(&set);
#else
    const int allowed = (int)sysconf(_SC_NPROCESSORS_ONLN); /* a thread has no affinity */
#endif
    return (int)sq_max_i64(1, quota ? sq_min_i64(quota, allowed) : allowed);
}

/* A thread that forks waits for the job that runs, so that the child finds BLAS at rest. It does
 * not where the job's caller asks whether to stop: that may wait for a lock (Python's) which the
 * forking thread holds, or the forking thread is that caller, in a signal handler. */
enum { FORK_PAUSE_NS = 1000000 };
static _Thread_local int fork_owns_pool;

static void
before_fork(void)
{
    const struct timespec pause = {.tv_nsec = FORK_PAUSE_NS};
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
    pool.sleeping = 0;
    pool.awaited = 0;
    atomic_fetch_and(&pool.state, ~COUNT_MASK);
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
