/* SPDX-License-Identifier: Apache-2.0 */
/* The KVCache type as the layers use it. */
#ifndef SQ_PY_CACHE_H
#define SQ_PY_CACHE_H

#include "python/py_args.h"

#include <sys/types.h>

typedef struct {
    PyObject_HEAD sq_kv_cache_t *cache; /* owned */
    PyThread_type_lock lock;            /* held by the call that uses cache */
    pid_t process;                      /* the one that the lock was last seen free in */
    unsigned long holder;               /* the thread that took it last */
    void *workspace;                    /* owned: of the last forward(), for the next one */
    size_t workspace_bytes;
} KVCache;

/* Waits for other calls that use the cache. 0, or -1 with RuntimeError in a forked child. */
int
sq_py_cache_lock(KVCache *self);
void
sq_py_cache_unlock(KVCache *self);

/* With the lock held: self->workspace has at least `bytes`. 0, or -1 with MemoryError. */
int
sq_py_cache_workspace(KVCache *self, size_t bytes);

/* The tokens of a call. Copies, as the arrays may change while the GIL is free. */
struct sq_py_tokens {
    int64_t m, length; /* length: one more than the largest position */
    int32_t *sequence; /* owned */
    int64_t *position; /* owned */
};

/* m tokens (m < 0: any number) that fit the cache. 0, or -1 with an exception that names the
 * argument. Clear tokens either way. */
int
sq_py_tokens(const KVCache *self, PyObject *sequence, PyObject *position, int64_t m,
             struct sq_py_tokens *tokens);

void
sq_py_tokens_clear(struct sq_py_tokens *tokens);

/* Sets the exception of a status that a cache gave; returns NULL. */
PyObject *
sq_py_cache_raise(PyObject *module, const KVCache *self, sq_status status, const char *context);

/* 0, or -1 with an exception. */
int
sq_py_add_cache_type(PyObject *module);

#endif
