/* SPDX-License-Identifier: Apache-2.0 */
/* Long-lived blocks that share huge pages, each of them too small for one of its own. */
#ifndef SQ_HUGE_H
#define SQ_HUGE_H

#include <stddef.h>

/* At least so many bytes, aligned to SQ_ALIGN_BYTES; NULL: no memory. For what decoding reads once
 * for every token: panels, pages of a KV cache. */
void *
sq_huge_alloc(size_t bytes);

/* Gives back a block and how many bytes were asked for; NULL is none. A region's memory goes back
 * to the system with the last block of it. */
void
sq_huge_free(void *block, size_t bytes);

/* Registers the fork handlers; call once. */
void
sq_huge_init(void);

#endif
