/* SPDX-License-Identifier: Apache-2.0 */
/* The order of the x86 and the neon panels (docs/kernels.md): sub-panels of dwords of 8 k each,
 * or of 4 k where a code has a byte. */
#ifndef SQ_PANEL_DWORDS_H
#define SQ_PANEL_DWORDS_H

#include <stdint.h>
#include <string.h>

/* Moves nibble j to the low half of byte j (j < 4) or the high half of byte j - 4. */
static inline uint32_t
interleave_nibbles(uint32_t word)
{
    uint32_t low = word & 0xffff, high = word >> 16;
    low = (low | low << 8) & 0x00ff00ff;
    low = (low | low << 4) & 0x0f0f0f0f;
    high = (high | high << 8) & 0x00ff00ff;
    high = (high | high << 4) & 0x0f0f0f0f;
    return low | high << 4;
}

/* words [subs][outputs][k / 8] -> panel [subs][k / 8][outputs] dwords. */
static inline void
pack_sub_panels(const int32_t *words, int64_t k, int64_t subs, int64_t outputs, uint8_t *panel)
{
    const int64_t blocks = k / 8;
    for (int64_t s = 0; s < subs; s++) {
        for (int64_t b = 0; b < blocks; b++) {
            for (int64_t j = 0; j < outputs; j++) {
                const uint32_t v =
                    interleave_nibbles((uint32_t)words[(s * outputs + j) * blocks + b]);
                memcpy(panel + ((s * blocks + b) * outputs + j) * 4, &v, sizeof v);
            }
        }
    }
}

/* codes [subs][outputs][k], to which offset (0 or 128) is added modulo 256, -> panel
 * [subs][k / 4][outputs] dwords of 4 bytes each. */
static inline void
pack_sub_panels_w8(const int8_t *codes, int64_t k, int64_t subs, int64_t outputs, int offset,
                   uint8_t *panel)
{
    const int64_t blocks = k / 4;
    const uint32_t flip = 0x01010101u * (uint32_t)offset; /* adds it: 128 has no other carry */
    for (int64_t s = 0; s < subs; s++) {
        for (int64_t b = 0; b < blocks; b++) {
            for (int64_t j = 0; j < outputs; j++) {
                uint32_t v;
                memcpy(&v, codes + (s * outputs + j) * k + b * 4, sizeof v);
                v ^= flip;
                memcpy(panel + ((s * blocks + b) * outputs + j) * 4, &v, sizeof v);
            }
        }
    }
}

#endif
