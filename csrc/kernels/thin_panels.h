/* SPDX-License-Identifier: Apache-2.0 */
/* Thin panels: panels of bytes whose codes have 5 or 6 bits, as they lie in memory.
 *
 * A block of B bytes of the wide panel, the table's thin_block, becomes B / 2 bytes of low halves
 * and, for each bit above four, B / 8 bytes more. Byte j of the low halves holds code j in its low
 * four bits and code j + B / 2 in the others, as code + 2^(bits - 1). Behind them are the upper
 * bits: with one of them byte j has those of codes j, j + B / 8, j + 2 B / 8 and so on from the
 * lowest on, with two of them those of codes j, j + B / 4, j + 2 B / 4 and j + 3 B / 4. So widening
 * is shifts and masks of whole words. */
#ifndef SQ_THIN_PANELS_H
#define SQ_THIN_PANELS_H

#include <stdint.h>
#include <string.h>

#include "core/sq_internal.h"

/* Bytes ahead of those that are read of panels that memory is asked for: few tokens wait for it. */
enum { SQ_PANEL_AHEAD = 8192 };

#define SQ_EACH_BYTE(x) ((uint64_t)(x)*UINT64_C(0x0101010101010101))

/* Whether codes of so many bits have thin panels. */
static inline int
is_thin(int bits)
{
    return bits == 5 || bits == 6;
}

/* Asks for the lines of `bytes` bytes. It is a hint: where there is no memory nothing happens. */
static ALWAYS_INLINE void
ask_lines(const uint8_t *from, const int bytes)
{
    UNROLL
    for (int i = 0; i < bytes; i += SQ_ALIGN_BYTES) {
        __builtin_prefetch(from + i, 0, 2);
    }
}

/* Memory that will be read soon, asked for bit by bit while something else is computed. */
struct sq_asks {
    const uint8_t *from;
    int64_t at, due, step; /* bytes: asked for up to here, what shall be, and of one bit */
};

static ALWAYS_INLINE void
ask_more(struct sq_asks *asks)
{
    for (asks->due += asks->step; asks->at < asks->due; asks->at += SQ_ALIGN_BYTES) {
        ask_lines(asks->from + asks->at, SQ_ALIGN_BYTES);
    }
}

static ALWAYS_INLINE uint64_t
word_at(const uint8_t *bytes, int64_t i)
{
    uint64_t word;
    memcpy(&word, bytes + i * (int64_t)sizeof word, sizeof word);
    return word;
}

static ALWAYS_INLINE void
widen_blocks(const uint8_t *restrict thin, int64_t bytes, int zero, uint8_t *restrict panel,
             const int bits, const int block)
{
    enum { WORD = sizeof(uint64_t) };
    const int upper = bits - 4, planes = 8 / upper, words = block / planes / WORD;
    const int low_words = block / 2 / WORD;
    const uint64_t mask = SQ_EACH_BYTE((1 << bits) - 16);
    const int is_raw = zero == 1 << (bits - 1);
    const uint64_t bias = SQ_EACH_BYTE(is_raw ? 0 : 128 - (1 << (bits - 1))); /* no carry */
    const uint64_t flip = SQ_EACH_BYTE(is_raw ? 0 : 128 ^ zero);
    for (int64_t b = 0; b < bytes; b += block) {
        const uint8_t *high = thin + block / 2;
        ask_lines(thin + SQ_PANEL_AHEAD, block / 8 * bits);
        UNROLL
        for (int e = 0; e < planes; e++) {
            const int first = e * words, half = first / low_words, shift = 4 - e * upper;
            for (int i = 0; i < words; i++) {
                const uint64_t low = word_at(thin, first % low_words + i) >> (4 * half);
                const uint64_t top = word_at(high, i) << (shift > 0 ? shift : 0);
                const uint64_t code =
                    (low & SQ_EACH_BYTE(15)) | (top >> (shift < 0 ? -shift : 0) & mask);
                const uint64_t out = (code + bias) ^ flip;
                memcpy(panel + b + (first + i) * WORD, &out, WORD);
            }
        }
        thin = high + words * WORD;
    }
}

/* panel [bytes], a multiple of block, from the thin one of `bits` (5 or 6). zero: the byte of code
 * 0 in the panel, 0, 128 or 2^(bits - 1); the others follow it modulo 256. */
static ALWAYS_INLINE void
widen_panel(int bits, const uint8_t *thin, int64_t bytes, int zero, uint8_t *panel, const int block)
{
    if (bits == 5) {
        widen_blocks(thin, bytes, zero, panel, 5, block);
    }
    else {
        widen_blocks(thin, bytes, zero, panel, 6, block);
    }
}

#endif
