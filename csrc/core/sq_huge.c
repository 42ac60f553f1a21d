/* SPDX-License-Identifier: Apache-2.0 */
/* Regions of a huge page each, cut into granules that a byte map tells the state of. */
#include "core/sq_huge.h"

#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "core/sq_internal.h"

#define GRANULE_BYTES ((size_t)4096)
#define REGION_BYTES SQ_HUGE_PAGE_BYTES
#define GRANULES (REGION_BYTES / GRANULE_BYTES)
/* What is smaller wastes much of a granule; what is larger has huge pages of its own. */
#define LEAST_BYTES (4 * GRANULE_BYTES)
#define MOST_BYTES REGION_BYTES

struct region {
    struct region *next;
    char *memory; /* [REGION_BYTES] */
    size_t free;  /* granules */
    uint8_t used[GRANULES];
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct region *regions; /* guarded by the lock */

/* An address sanitizer sees a block's ends when it comes from malloc. clang tells of one by
 * __has_feature, which gcc 14 has too, and which only a directive may ask. */
#ifdef __has_feature
#if __has_feature(address_sanitizer)
#define SEES_BLOCKS
#endif
#endif
#if defined(__SANITIZE_ADDRESS__) && !defined(SEES_BLOCKS)
#define SEES_BLOCKS
#endif
#if defined(MADV_HUGEPAGE) && !defined(SEES_BLOCKS)
enum { HAS_REGIONS = 1 };
#else
enum { HAS_REGIONS = 0 };
#endif

/* Whether a block of so many bytes lies in a region. */
static int
is_shared(size_t bytes)
{
    return HAS_REGIONS && bytes >= LEAST_BYTES && bytes < MOST_BYTES;
}

static size_t
granules_of(size_t bytes)
{
    return (bytes + GRANULE_BYTES - 1) / GRANULE_BYTES;
}

/* The first of `count` free granules in a row; GRANULES: there are none. */
static size_t
find_run(const struct region *r, size_t count)
{
    size_t run = 0;
    for (size_t i = 0; i < GRANULES; i++) {
        run = r->used[i] ? 0 : run + 1;
        if (run == count) {
            return i + 1 - count;
        }
    }
    return GRANULES;
}

/* Memory of a region, straight from the system, which the heap's own blocks never keep back. */
static char *
map_region(void)
{
    const size_t bytes = REGION_BYTES + SQ_HUGE_PAGE_BYTES;
    char *begin = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (begin == MAP_FAILED) {
        return NULL;
    }
    const size_t before = -(uintptr_t)begin % SQ_HUGE_PAGE_BYTES;
    char *memory = begin + before;
    if (before) {
        (void)munmap(begin, before);
    }
    (void)munmap(memory + REGION_BYTES, bytes - REGION_BYTES - before);
#ifdef MADV_HUGEPAGE
    (void)madvise(memory, REGION_BYTES, MADV_HUGEPAGE);
#endif
    return memory;
}

/* With the lock held: an empty region at *link, the end of the list; NULL: no memory. */
static struct region *
add_region(struct region **link)
{
    struct region *r = calloc(1, sizeof *r);
    char *memory = r ? map_region() : NULL;
    if (!memory) {
        free(r);
        return NULL;
    }
    r->memory = memory;
    r->free = GRANULES;
    *link = r;
    return r;
}

/* With the lock held: a block of `count` granules, in the oldest region that has room. */
static void *
take(size_t count)
{
    struct region **link = &regions, *r;
    size_t first = 0;
    for (; (r = *link); link = &r->next) {
        if (r->free >= count && (first = find_run(r, count)) < GRANULES) {
            break;
        }
    }
    if (!r) {
        first = 0;
        r = add_region(link);
    }
    if (!r) {
        return NULL;
    }
    memset(r->used + first, 1, count);
    r->free -= count;
    return r->memory + first * GRANULE_BYTES;
}

void *
sq_huge_alloc(size_t bytes)
{
    if (!is_shared(bytes)) {
        return sq_alloc(bytes);
    }
    pthread_mutex_lock(&lock);
    void *block = take(granules_of(bytes));
    pthread_mutex_unlock(&lock);
    return block;
}

void
sq_huge_free(void *block, size_t bytes)
{
    if (!block || !is_shared(bytes)) {
        free(block);
        return;
    }
    const size_t count = granules_of(bytes);
    const uintptr_t address = (uintptr_t)block;
    pthread_mutex_lock(&lock);
    struct region **link = &regions, *r = regions;
    while (address - (uintptr_t)r->memory >= REGION_BYTES) {
        link = &r->next;
        r = *link;
        SQ_ASSERT(r);
    }
    memset(r->used + (address - (uintptr_t)r->memory) / GRANULE_BYTES, 0, count);
    r->free += count;
    const int is_empty = r->free == GRANULES;
    if (is_empty) {
        *link = r->next;
    }
    pthread_mutex_unlock(&lock);
    if (is_empty) {
        (void)munmap(r->memory, REGION_BYTES);
        free(r);
    }
}

static void
before_fork(void)
{
    pthread_mutex_lock(&lock);
}

static void
after_fork(void)
{
    pthread_mutex_unlock(&lock);
}

void
sq_huge_init(void)
{
    pthread_atfork(before_fork, after_fork, after_fork);
}
