/* SPDX-License-Identifier: Apache-2.0 */
/* Calibration keeps the inputs of all sites of a layer: of a 70B model's, 8192 tokens take 1.7 GB.
 * In a file they are no anonymous memory: the system writes them out when it needs the room. The
 * file has no name, and goes with the block. */
#include "core/sq_states.h"

#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>
#ifdef __GLIBC__
#include <malloc.h>
#endif

#include "core/sq_internal.h"

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static size_t limit = SIZE_MAX;
static int folder = -1;

void
sq_states_map(size_t most, int descriptor)
{
    pthread_mutex_lock(&mutex);
    if (folder >= 0) {
        (void)close(folder);
    }
    limit = descriptor < 0 ? SIZE_MAX : most;
    folder = descriptor;
    pthread_mutex_unlock(&mutex);
}

/* A file without a name, of a block that is more than the limit; -1 where it stays on the heap. */
static int
open_file(size_t bytes)
{
    int file = -1;
#ifdef O_TMPFILE
    pthread_mutex_lock(&mutex);
    if (folder >= 0 && bytes > limit) {
        file = openat(folder, ".", O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
    }
    pthread_mutex_unlock(&mutex);
#else
    (void)bytes;
#endif
    return file;
}

void *
sq_states_alloc(size_t bytes, size_t *mapped)
{
    *mapped = 0;
    const int file = open_file(bytes);
    if (file >= 0) {
        void *memory = MAP_FAILED;
        /* the disk's room is taken now: a write to a page without any would raise SIGBUS */
        if (posix_fallocate(file, 0, (off_t)bytes) == 0) {
            memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
        }
        (void)close(file);
        if (memory != MAP_FAILED) {
            *mapped = bytes;
            return memory;
        }
    }
    return sq_alloc(bytes);
}

void
sq_states_free(void *memory, size_t mapped)
{
    if (mapped) {
        (void)munmap(memory, mapped);
    }
    else {
        free(memory);
    }
}

void
sq_trim_heap(void)
{
#ifdef __GLIBC__
    (void)malloc_trim(0);
#endif
}
