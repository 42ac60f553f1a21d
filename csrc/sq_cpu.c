/* SPDX-License-Identifier: Apache-2.0 */
/* cpuid and xgetbv to feature bits: a bit is set only when the CPU and the OS agree. */
#include "sq_cpu.h"

#if defined(__x86_64__) || defined(__i386__)
#include <cpuid.h>

static uint64_t
read_xcr0(void)
{
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return ((uint64_t)high << 32) | low;
}

uint32_t
sq_cpu_features(void)
{
    uint32_t a, b, c, d, features = 0;
    if (!__get_cpuid(1, &a, &b, &c, &d)) {
        return 0;
    }
    const int osxsave = (c >> 27) & 1, fma = (c >> 12) & 1, f16c = (c >> 29) & 1;
    if (!osxsave || (read_xcr0() & 6) != 6) { /* the OS must save xmm (bit 1) and ymm (bit 2) */
        return 0;
    }
    if (__get_cpuid_count(7, 0, &a, &b, &c, &d) && ((b >> 5) & 1) && fma && f16c) {
        features |= SQ_CPU_AVX2;
    }
    return features;
}
#else
uint32_t
sq_cpu_features(void)
{
    return 0;
}
#endif
