/* SPDX-License-Identifier: Apache-2.0 */
/* What the CPU and the operating system both allow; nothing else. */
#ifndef SQ_CPU_H
#define SQ_CPU_H

#include <stdint.h>

enum {
    SQ_CPU_AVX2 = 1u << 0, /* AVX2, FMA and F16C, with ymm state enabled by the OS */
};

/* Feature bits of this machine. Reads cpuid each time; call once and keep. */
uint32_t
sq_cpu_features(void);

#endif
