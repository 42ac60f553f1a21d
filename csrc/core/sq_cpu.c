/* SPDX-License-Identifier: Apache-2.0 */
/* cpuid and xgetbv, or hwcap, to feature bits: a bit is set only when the CPU and the OS agree.
 * Model numbers are never read: virtual machines report odd ones. */
#include "core/sq_cpu.h"

#include <stddef.h>

const char *
sq_cpu_feature_name(int bit)
{
    static const char *const names[] = {"avx2", "avx-vnni", "avx512-vnni", "amx-int8", "neon-dot"};
    return bit >= 0 && bit < (int)(sizeof names / sizeof names[0]) ? names[bit] : NULL;
}

#if defined(__x86_64__) || defined(__i386__)
#include <cpuid.h>
#ifdef __x86_64__
#include <errno.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

/* State components of xcr0 that must all be saved by the OS. */
enum {
    STATE_YMM = 0x06,    /* xmm (bit 1) and ymm (2) */
    STATE_ZMM = 0xe6,    /* those, masks (5), upper halves (6) and the upper sixteen (7) of zmm */
    STATE_TILE = 0x60000 /* tile configuration (17) and data (18) */
};

static uint64_t
read_xcr0(void)
{
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return ((uint64_t)high << 32) | low;
}

static int
has_bits(uint64_t value, uint64_t mask)
{
    return (value & mask) == mask;
}

/* Linux hands out the 8 KiB of tile data on request only; without permission the first tile
 * instruction is a SIGILL. The permission holds for all threads of the process. */
enum {
    ARCH_GET_XCOMP_SUPP = 0x1021, /* what may be asked for */
    ARCH_REQ_XCOMP_PERM = 0x1023,
    XFEATURE_XTILEDATA = 18
};

#ifdef __x86_64__
static int
succeeds(long option, uintptr_t argument)
{
    const int before = errno;
    const long failed = syscall(SYS_arch_prctl, option, argument);
    errno = before;
    return failed == 0;
}

static int
may_ask_for_tiles(void)
{
    uint64_t components = 0;
    return succeeds(ARCH_GET_XCOMP_SUPP, (uintptr_t)&components) &&
           has_bits(components, 1u << XFEATURE_XTILEDATA);
}

int
sq_cpu_permit(uint32_t features)
{
    return !(features & SQ_CPU_AMX_INT8) || succeeds(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA);
}
#else
static int
may_ask_for_tiles(void)
{
    return 0;
}

int
sq_cpu_permit(uint32_t features)
{
    return !(features & SQ_CPU_AMX_INT8);
}
#endif

uint32_t
sq_cpu_features(void)
{
    uint32_t a, b, c, d, features = 0;
    if (!__get_cpuid(1, &a, &b, &c, &d)) {
        return 0;
    }
    const int osxsave = (c >> 27) & 1, fma = (c >> 12) & 1, f16c = (c >> 29) & 1;
    const uint64_t saved = osxsave ? read_xcr0() : 0;
    if (!has_bits(saved, STATE_YMM) || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) {
        return 0;
    }
    if (!((b >> 5) & 1) || !fma || !f16c) {
        return 0;
    }
    features |= SQ_CPU_AVX2;
    /* F (16), DQ (17), BW (30) and VL (31) of ebx, VNNI (11) of ecx */
    if (has_bits(saved, STATE_ZMM) && has_bits(b, 0xc0030000u) && ((c >> 11) & 1)) {
        features |= SQ_CPU_AVX512_VNNI;
        /* AMX-TILE (24) and AMX-INT8 (25) of edx */
        if (has_bits(saved, STATE_TILE) && has_bits(d, 0x03000000u) && may_ask_for_tiles()) {
            features |= SQ_CPU_AMX_INT8;
        }
    }
    if (a >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d) && ((a >> 4) & 1)) {
        features |= SQ_CPU_AVX_VNNI;
    }
    return features;
}
#else
int
sq_cpu_permit(uint32_t features)
{
    (void)features;
    return 1;
}

#if defined(__aarch64__) && defined(__APPLE__)
#include <stddef.h>
#include <sys/sysctl.h>

uint32_t
sq_cpu_features(void)
{
    int has = 0;
    size_t bytes = sizeof has;
    const int failed = sysctlbyname("hw.optional.arm.FEAT_DotProd", &has, &bytes, NULL, 0);
    return !failed && has ? SQ_CPU_NEON_DOT : 0;
}
#elif defined(__aarch64__)
#include <asm/hwcap.h>
#include <sys/auxv.h>

/* The kernel saves the vector registers of every process; hwcap says what it lets them use. */
uint32_t
sq_cpu_features(void)
{
    return getauxval(AT_HWCAP) & HWCAP_ASIMDDP ? SQ_CPU_NEON_DOT : 0;
}
#else
uint32_t
sq_cpu_features(void)
{
    return 0;
}
#endif
#endif
