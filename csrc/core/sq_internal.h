/* SPDX-License-Identifier: Apache-2.0 */
/* Shared by the core's C files: restrict, alignment, assertions, checked products. */
#ifndef SQ_INTERNAL_H
#define SQ_INTERNAL_H

#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __linux__
#include <sys/mman.h>
#endif

#include "singlequant.h"

#define SQ_ALIGN_BYTES 64

/* For inner loops whose bounds are constants once they are inlined. */
#define ALWAYS_INLINE inline __attribute__((always_inline))
#ifdef __clang__
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

#ifdef SQ_DEBUG
#include <assert.h>
#define SQ_ASSERT(x) assert(x)
#else
#define SQ_ASSERT(x) ((void)0)
#endif

#define SQ_TRY(call)                \
    do {                            \
        sq_status sq_try_ = (call); \
        if (sq_try_ != SQ_OK) {     \
            return sq_try_;         \
        }                           \
    } while (0)

static inline int64_t
sq_min_i64(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

static inline int64_t
sq_max_i64(int64_t a, int64_t b)
{
    return a > b ? a : b;
}

static inline int64_t
sq_ceil_div(int64_t a, int64_t b)
{
    return a / b + (a % b > 0);
}

static inline int64_t
sq_round_up(int64_t a, int64_t b)
{
    return sq_ceil_div(a, b) * b;
}

static inline size_t
sq_align_bytes(size_t bytes)
{
    return (bytes + SQ_ALIGN_BYTES - 1) & ~(size_t)(SQ_ALIGN_BYTES - 1);
}

/* The next bytes of a workspace that is laid out part by part, *used of it so far; NULL where base
 * is, when only *used is wanted. */
static inline void *
sq_take_bytes(char *base, size_t *used, size_t bytes)
{
    void *p = base ? base + *used : NULL;
    *used += sq_align_bytes(bytes);
    return p;
}

/* *out = a * b, or 0 is returned on overflow or a negative operand. */
static inline int
sq_product(int64_t a, int64_t b, int64_t *out)
{
    return a >= 0 && b >= 0 && !__builtin_mul_overflow(a, b, out);
}

/* Elements of a long pass over memory between two looks at whether the call is stopped. */
#define SQ_STOP_STEP ((int64_t)1 << 22)

/* An exponent of all ones is NaN or Inf; no branch, so that the loop vectorizes. */
static inline int
sq_all_finite(const float *x, int64_t count)
{
    const uint32_t exponent = 0x7f800000u;
    for (int64_t begin = 0; begin < count; begin += 4096) {
        const int64_t end = sq_min_i64(begin + 4096, count);
        uint32_t bad = 0;
        for (int64_t i = begin; i < end; i++) {
            uint32_t bits;
            memcpy(&bits, x + i, sizeof bits);
            bad |= (bits & exponent) == exponent;
        }
        if (bad) {
            return 0;
        }
        if (end % SQ_STOP_STEP == 0 && sq_stopped()) {
            return 1; /* whatever the rest holds: nobody will use it */
        }
    }
    return 1;
}

static inline int
sq_all_finite_f64(const double *x, int64_t count)
{
    int bad = 0;
    for (int64_t i = 0; i < count; i++) {
        bad |= !(x[i] >= -0x1.fffffffffffffp1023 && x[i] <= 0x1.fffffffffffffp1023);
    }
    return !bad;
}

/* Aligned scratch and long-lived blocks; NULL when there is no memory. Free with free(). Large ones
 * ask for huge pages: decoding reads weights once each, where a page table walk every 4 KiB costs a
 * quarter of the bandwidth. */
#define SQ_HUGE_PAGE_BYTES ((size_t)1 << 21)
static inline void *
sq_alloc(size_t bytes)
{
    bytes = sq_align_bytes(bytes ? bytes : 1);
#ifdef MADV_HUGEPAGE
    if (bytes >= 2 * SQ_HUGE_PAGE_BYTES) {
        void *p = NULL;
        if (posix_memalign(&p, SQ_HUGE_PAGE_BYTES, bytes)) {
            return NULL;
        }
        (void)madvise(p, bytes / SQ_HUGE_PAGE_BYTES * SQ_HUGE_PAGE_BYTES, MADV_HUGEPAGE);
        return p;
    }
#endif
    return aligned_alloc(SQ_ALIGN_BYTES, bytes);
}

#endif
