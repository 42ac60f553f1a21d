/* SPDX-License-Identifier: Apache-2.0 */
/* Memory for what calibration keeps of a layer: on the heap, or in a file where it is large. */
#ifndef SQ_STATES_H
#define SQ_STATES_H

#include <stddef.h>

/* Blocks of more than `limit` bytes lie in unnamed files of the folder that is open as `folder`,
 * which is the core's from now on; -1: all lie on the heap, as at first. */
void
sq_states_map(size_t limit, int folder);

/* A block of so many bytes, which are not set, aligned as by sq_alloc. *mapped: its bytes if it
 * lies in a file, otherwise 0. Where no file can take it, it lies on the heap. NULL without
 * memory. */
void *
sq_states_alloc(size_t bytes, size_t *mapped);

/* memory may be NULL. mapped: as sq_states_alloc set it. */
void
sq_states_free(void *memory, size_t mapped);

/* Gives back what the heap keeps of freed blocks, as far as the C library can. */
void
sq_trim_heap(void);

#endif
