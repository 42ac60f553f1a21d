/* SPDX-License-Identifier: Apache-2.0 */
/* Drives the pool, interrupts and the KV cache from several threads, for a compiler's thread
 * sanitizer or valgrind to watch, and checks that every item is done once and that results are
 * those of one thread. Usage: check_threads ROUNDS. */
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "core/sq_internal.h"
#include "core/sq_threads.h"
#include "kernels/sq_kernels.h"

enum { CALLERS = 3, ITEMS = 203, POOL = 4 };
static int rounds;
static atomic_long passed, failed;

#define CHECK(ok, ...)                                \
    do {                                              \
        if (ok) {                                     \
            atomic_fetch_add(&passed, 1);             \
        }                                             \
        else if (atomic_fetch_add(&failed, 1) < 20) { \
            printf("FAILED " __VA_ARGS__);            \
            printf("\n");                             \
        }                                             \
    } while (0)

static void
together(void *(*work)(void *), int count)
{
    pthread_t threads[CALLERS + 1];
    for (int i = 0; i < count; i++) {
        if (pthread_create(&threads[i], NULL, work, (void *)(intptr_t)i)) {
            printf("no thread\n");
            _exit(2);
        }
    }
    for (int i = 0; i < count; i++) {
        pthread_join(threads[i], NULL);
    }
}

/* ---- the pool --------------------------------------------------------------------------- */

/* done and busy are plain: only the pool keeps threads apart. */
struct count_job {
    int done[ITEMS];
    int busy[SQ_THREADS_MAX];
    int nested;
};

static void
count_one(void *context, int64_t begin, int64_t end, int thread)
{
    (void)thread;
    for (int64_t i = begin; i < end; i++) {
        ((int *)context)[i]++;
    }
}

static void
count_items(void *context, int64_t begin, int64_t end, int thread)
{
    struct count_job *job = context;
    job->busy[thread]++;
    for (int64_t i = begin; i < end; i++) {
        job->done[i]++;
    }
    if (job->nested) {
        int inner[7] = {0};
        sq_parallel_for(7, 1, count_one, inner);
        CHECK(inner[0] == 1 && inner[6] == 1, "a loop inside a loop");
    }
    job->busy[thread]--;
}

static void *
call_pool(void *argument)
{
    const int caller = (int)(intptr_t)argument;
    for (int round = 0; round < rounds; round++) {
        struct count_job job = {.nested = round % 5 == 0};
        const int64_t items = 1 + (round * 37 + caller * 11) % ITEMS;
        sq_parallel_for(items, 1 + round % 3, count_items, &job);
        int64_t once = 0, busy = 0;
        for (int64_t i = 0; i < ITEMS; i++) {
            once += job.done[i] == (i < items);
        }
        for (int i = 0; i < SQ_THREADS_MAX; i++) {
            busy += job.busy[i];
        }
        CHECK(once == ITEMS && !busy, "%d items, round %d", (int)items, round);
        if (caller == 0 && round % 16 == 0) {
            sq_set_num_threads(2 + round / 16 % POOL);
            CHECK(sq_get_num_threads() >= 2, "number of threads");
        }
        if (round % 7 == caller) {
            usleep(200); /* the workers go to sleep */
        }
    }
    return NULL;
}

/* ---- interrupts ------------------------------------------------------------------------- */

struct stopped_call {
    struct sq_watch watch;
    atomic_int asked, begun, after;
    int stop_at;
};

/* Calls the core on its own, as a signal handler may. */
static int
wants_stop(void *context)
{
    struct stopped_call *call = context;
    int inner[9] = {0};
    sq_parallel_for(9, 2, count_one, inner);
    CHECK(inner[0] == 1 && inner[8] == 1, "a loop inside a handler");
    return atomic_fetch_add(&call->asked, 1) + 1 >= call->stop_at;
}

static void
slow_items(void *context, int64_t begin, int64_t end, int thread)
{
    struct stopped_call *call = context;
    (void)begin;
    (void)end;
    (void)thread;
    atomic_fetch_add(&call->begun, 1);
    if (atomic_load(&call->watch.stopped)) {
        atomic_fetch_add(&call->after, 1); /* at most the chunks that were about to begin */
    }
    usleep(5000);
}

static void *
stop_calls(void *argument)
{
    const int caller = (int)(intptr_t)argument;
    enum { CHUNKS = 400 };
    struct stopped_call call = {.stop_at = 1 + caller};
    sq_watch_begin(&call.watch, wants_stop, &call);
    sq_parallel_for(CHUNKS, 1, slow_items, &call);
    sq_parallel_for(CHUNKS, 1, slow_items, &call);
    CHECK(sq_stop_status() == SQ_ERR_INTERRUPTED, "status of a stopped call");
    CHECK(sq_watch_end(&call.watch) == 1, "end of a stopped call");
    CHECK(atomic_load(&call.begun) < 2 * CHUNKS, "a stopped call went on to its end");
    CHECK(atomic_load(&call.after) <= POOL, "chunks begun after a stop");
    CHECK(sq_stop_status() == SQ_OK, "status behind a stopped call");
    return NULL;
}

/* ---- forks ------------------------------------------------------------------------------ */

static void *
fork_often(void *argument)
{
    (void)argument;
    for (int round = 0; round < rounds / 20; round++) {
        const pid_t child = fork();
        if (child == 0) {
            int done[ITEMS] = {0};
            sq_parallel_for(ITEMS, 1, count_one, done);
            _exit(done[0] == 1 && done[ITEMS - 1] == 1 ? 0 : 1);
        }
        int status = 1;
        CHECK(child > 0 && waitpid(child, &status, 0) == child && status == 0, "a forked child");
    }
    return NULL;
}

static void *
fork_or_call(void *argument)
{
    return argument ? call_pool(argument) : fork_often(argument);
}

/* ---- a layer and its cache --------------------------------------------------------------- */

enum { HIDDEN = 64, HEADS = 4, HEAD_DIM = 16, INNER = 96, TOKENS = 70, LINEARS = 7 };

static struct sq_site sites[4];
static struct sq_layer layer;
static float norm_weight[HIDDEN], expected[TOKENS * HIDDEN];

static float
value_of(uint64_t i)
{
    return (float)(int32_t)((uint32_t)(i * 2654435761u) ^ (uint32_t)(i << 7)) * 0x1p-32f;
}

static struct sq_linear
make_linear(int64_t n, int64_t k, int site)
{
    float *scales = malloc((size_t)n * sizeof *scales);
    int32_t *words = malloc((size_t)(n * sq_packed_words(4, k)) * sizeof *words);
    sq_packed_t *packed = NULL;
    for (int64_t i = 0; i < n; i++) {
        scales[i] = 0.01f;
    }
    for (int64_t i = 0; i < n * sq_packed_words(4, k); i++) {
        words[i] = (int32_t)((uint64_t)(i + site) * 0x9e3779b97f4a7c15u >> 16);
    }
    CHECK(sq_packed_create(sq_kernels_active(), words, scales, n, k, 0, 0, 4, &packed) == SQ_OK,
          "packed weights");
    free(words);
    free(scales);
    return (struct sq_linear){.site = site, .n = n, .k = k, .packed = packed};
}

static void
make_layer(void)
{
    const int64_t widths[] = {HIDDEN, HIDDEN, HIDDEN, INNER};
    const struct sq_norm norm = {SQ_NORM_RMS, 1e-5f, HIDDEN, 1, norm_weight, NULL};
    struct sq_fault fault = {.site = -1};
    for (int i = 0; i < HIDDEN; i++) {
        norm_weight[i] = 1.0f;
    }
    for (int i = 0; i < 4; i++) {
        sites[i] = (struct sq_site){.bits = 8, .clip = 1.0f, .k = widths[i]};
    }
    layer =
        (struct sq_layer){.hidden = HIDDEN, .residual_scale = 1.0f, .sites = sites, .n_sites = 4};
    layer.before_attention = layer.before_mlp = norm;
    layer.attention = (struct sq_attention){
        .heads = HEADS, .kv_heads = HEADS, .head_dim = HEAD_DIM, .scale = 0.25f};
    layer.attention.q = make_linear(HIDDEN, HIDDEN, 0);
    layer.attention.k = make_linear(HIDDEN, HIDDEN, 0);
    layer.attention.v = make_linear(HIDDEN, HIDDEN, 0);
    layer.attention.o = make_linear(HIDDEN, HIDDEN, 1);
    layer.mlp = (struct sq_mlp){.activation = SQ_SILU, .gated = 1};
    layer.mlp.gate = make_linear(INNER, HIDDEN, 2);
    layer.mlp.up = make_linear(INNER, HIDDEN, 2);
    layer.mlp.down = make_linear(HIDDEN, INNER, 3);
    CHECK(sq_layer_seal(&layer, &fault) == SQ_OK, "layer: %s", fault.text);
}

static void
free_layer(void)
{
    const struct sq_attention *a = &layer.attention;
    const struct sq_linear *all[] = {&a->q,           &a->k,         &a->v,          &a->o,
                                     &layer.mlp.gate, &layer.mlp.up, &layer.mlp.down};
    for (int i = 0; i < LINEARS; i++) {
        sq_packed_destroy((sq_packed_t *)all[i]->packed);
    }
}

static sq_kv_cache_t *watched;
static atomic_int all_done;

/* hidden [TOKENS][HIDDEN] <- the layer's output, on a cache of its own, two calls. */
static void
run_layer(float *hidden, int bits, int is_watched)
{
    const struct sq_kv_shape shape = {.layers = 1,
                                      .sequences = 1,
                                      .kv_heads = HEADS,
                                      .head_dim = HEAD_DIM,
                                      .capacity = TOKENS,
                                      .bits = bits,
                                      .hadamard = 1};
    int32_t sequence[TOKENS] = {0};
    int64_t position[TOKENS];
    sq_kv_cache_t *cache = NULL;
    void *workspace = sq_alloc(sq_layer_workspace_bytes(&layer, TOKENS, TOKENS));
    CHECK(workspace && sq_kv_cache_create(&shape, &cache) == SQ_OK, "cache");
    for (int i = 0; i < TOKENS * HIDDEN; i++) {
        hidden[i] = value_of((uint64_t)i);
        position[i / HIDDEN] = i / HIDDEN;
    }
    for (int64_t begin = 0; begin < TOKENS; begin += 65) {
        const int64_t m = sq_min_i64(65, TOKENS - begin);
        struct sq_pass pass = {.tokens = {m, begin + m, sequence, position + begin},
                               .cache = is_watched ? watched : cache,
                               .hidden = hidden + begin * HIDDEN,
                               .workspace = workspace};
        CHECK(sq_kv_cache_reserve(pass.cache, 0, 1, sequence, position + begin, m) == SQ_OK &&
                  sq_layer_forward(&layer, &pass, 0, NULL) == SQ_OK,
              "forward");
    }
    sq_kv_cache_destroy(cache);
    free(workspace);
}

/* Thread 0 asks about the cache that thread 1 fills; the others have caches of their own. */
static void *
run_layers(void *argument)
{
    const int caller = (int)(intptr_t)argument;
    float *hidden = malloc(sizeof expected);
    while (caller == 0 && !atomic_load(&all_done)) {
        CHECK(sq_kv_cache_bytes(watched) >= 0 && sq_kv_cache_clamped(watched) == 0 &&
                  sq_kv_cache_largest(watched) >= 0,
              "what a cache tells");
        usleep(100);
    }
    for (int round = 0; caller && round < 1 + rounds / 100; round++) {
        run_layer(hidden, 16, caller == 1);
        CHECK(memcmp(hidden, expected, sizeof expected) == 0, "a layer, thread %d", caller);
        if (caller == 1) {
            CHECK(sq_kv_cache_release(watched, 0) == SQ_OK, "release");
        }
    }
    if (caller == 1) {
        atomic_store(&all_done, 1);
    }
    free(hidden);
    return NULL;
}

static void
check_layers(void)
{
    const struct sq_kv_shape shape = {.layers = 1,
                                      .sequences = 1,
                                      .kv_heads = HEADS,
                                      .head_dim = HEAD_DIM,
                                      .capacity = TOKENS,
                                      .bits = 16};
    sq_set_num_threads(1);
    run_layer(expected, 16, 0);
    sq_set_num_threads(POOL);
    CHECK(sq_kv_cache_create(&shape, &watched) == SQ_OK, "cache");
    together(run_layers, CALLERS);
    sq_kv_cache_destroy(watched);
}

int
main(int argc, char **argv)
{
    if (argc != 2 || (rounds = atoi(argv[1])) < 1 || sq_kernels_init(NULL)) {
        printf("usage: check_threads ROUNDS\n");
        return 2;
    }
    sq_threads_init();
    sq_set_num_threads(POOL);
    together(call_pool, CALLERS);
    sq_set_num_threads(POOL);
    together(stop_calls, CALLERS);
    sq_set_num_threads(POOL);
    together(fork_or_call, CALLERS);
    make_layer();
    check_layers();
    free_layer();
    printf("%ld passed, %ld failed\n", atomic_load(&passed), atomic_load(&failed));
    return atomic_load(&failed) != 0;
}
