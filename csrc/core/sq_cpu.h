/* SPDX-License-Identifier: Apache-2.0 */
/* What the CPU and the operating system both allow; nothing else. */
#ifndef SQ_CPU_H
#define SQ_CPU_H

#include <stdint.h>

enum {
    SQ_CPU_AVX2 = 1u << 0,        /* AVX2, FMA and F16C, with ymm state enabled by the OS */
    SQ_CPU_AVX_VNNI = 1u << 1,    /* VEX-encoded vpdpbusd on ymm */
    SQ_CPU_AVX512_VNNI = 1u << 2, /* AVX-512 F, BW, DQ, VL and VNNI, with zmm and mask state */
    SQ_CPU_AMX_INT8 = 1u << 3,    /* tiles of int8; see sq_cpu_permit */
    SQ_CPU_NEON_DOT = 1u << 4,    /* Advanced SIMD with the dot product instructions */
};

/* Feature bits of this machine. Reads cpuid (or hwcap) each time; call once and keep. */
uint32_t
sq_cpu_features(void);

/* Asks the system for what a process gets on request only, the tiles: 1, or 0 where it refuses.
 * Call before the first use of such features; calling again does no harm. */
int
sq_cpu_permit(uint32_t features);

/* Names of all bits, for people: "avx2", "avx-vnni", ... NULL past the last. */
const char *
sq_cpu_feature_name(int bit);

#endif
