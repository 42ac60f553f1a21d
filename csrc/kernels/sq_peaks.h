/* SPDX-License-Identifier: Apache-2.0 */
/* What the machine can do at most: multiply steps from registers alone, and reading memory. */
#ifndef SQ_PEAKS_H
#define SQ_PEAKS_H

#include <stddef.h>
#include <stdint.h>

#include "singlequant.h"

/* One multiply step of an instruction set, as the packed kernels use it. */
struct sq_peak {
    const char *name;
    int (*runs_here)(void);       /* asks CPU and OS; call it before loop */
    void (*loop)(int64_t rounds); /* on registers alone; independent chains hide the latency */
    int64_t operations;           /* of a round; a multiply-add counts two */
};

/* All steps compiled in; ended by a NULL name. */
const struct sq_peak *
sq_peaks(void);

/* The named step, or NULL. */
const struct sq_peak *
sq_peak_find(const char *name);

/* Operations per second of this thread's CPU time, the best of runs that fill `seconds` of the wall
 * clock. Time in which the CPU worked for others does not count. Takes longer than `seconds` where
 * others leave this thread less than one run. SQ_ERR_RANGE unless 0 < seconds <= 60 and the step
 * runs here. */
sq_status
sq_peak_measure(const struct sq_peak *peak, double seconds, double *operations_per_second);

#define SQ_READ_STREAMS_MAX 16

/* Reads all bytes once, in parallel, in `streams` interleaved runs, with prefetches
 * prefetch_bytes ahead (0: none). *out: the exclusive or of all 8-byte words, the tail padded with
 * zeros, so that nothing is left out. SQ_ERR_RANGE unless streams is 1 .. SQ_READ_STREAMS_MAX and
 * prefetch_bytes 0 .. 2^20. */
sq_status
sq_read_all(const void *data, size_t bytes, int64_t prefetch_bytes, int streams, uint64_t *out);

/* Seconds of a clock that only goes forward. */
double
sq_clock(void);

#endif
