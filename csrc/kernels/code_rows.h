/* SPDX-License-Identifier: Apache-2.0 */
/* Rows of codes as a file has them, of an embedding or a head: their layout, and what they mean. */
#ifndef CODE_ROWS_H
#define CODE_ROWS_H

#include <stdint.h>
#include <string.h>

/* k inputs a row, in blocks of SQ_ROW_BLOCK that have a scale each. With 8 bits a row is k signed
 * codes, the last block as short as k makes it. With 4 bits each block has 16 bytes: byte j holds
 * input j in the low nibble and input j + 16 in the high one, as code + 8. With 6 bits it has 24:
 * these 16 hold the low four bits of code + 32, and byte 16 + j the upper two of inputs j, j + 8,
 * j + 16 and j + 24, from the lowest bits on. Inputs behind k are code 0. Scales are bfloat16, so
 * that scale * code is exact in float32. */
#define SQ_ROW_BLOCK 32
struct sq_code_rows {
    int bits; /* 8, 6 or 4 */
    int64_t k, rows;
    const uint8_t *codes;   /* [rows][sq_code_row_bytes] */
    const uint16_t *scales; /* [rows][sq_code_row_scales] */
};

/* Tokens for such rows: their own codes, also in blocks that have a scale each. A token is the sum
 * of one, two or three rows of codes, each of what those before it leave. What lies behind its
 * inputs is code 0. */
#define SQ_ROW_TOKENS 64 /* rows at once */
#define SQ_ROW_PARTS 3   /* rows of a token, at most */
struct sq_token_rows {
    int parts;              /* rows of a token */
    int64_t blocks, ld;     /* of SQ_ROW_BLOCK inputs; ld: with zeros up to a multiple of 8 */
    const int8_t *codes;    /* [rows][ld * SQ_ROW_BLOCK], -127 .. 127 */
    const float *scales;    /* [rows][ld] */
    const int32_t *offsets; /* [rows][ld]: minus 2^(bits - 1) times the sum of a block's codes, for
                             * weights of `bits`, to take back what makes theirs unsigned */
};

static inline int
sq_code_row_bits_valid(int bits)
{
    return bits == 8 || bits == 6 || bits == 4;
}

static inline int64_t
sq_code_row_scales(int64_t k)
{
    return (k + SQ_ROW_BLOCK - 1) / SQ_ROW_BLOCK;
}

static inline int64_t
sq_code_row_bytes(int bits, int64_t k)
{
    return bits == 8 ? k : sq_code_row_scales(k) * (SQ_ROW_BLOCK * bits / 8);
}

static inline float
sq_float_of_bf16(uint16_t bits)
{
    const uint32_t wide = (uint32_t)bits << 16;
    float x;
    memcpy(&x, &wide, sizeof x);
    return x;
}

/* Nearest, halves to even; x is finite. */
static inline uint16_t
sq_bf16_of_float(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

/* Code p of a row [sq_code_row_bytes]. */
static inline int
sq_code_of_row(int bits, const uint8_t *row, int64_t p)
{
    enum { HALF = SQ_ROW_BLOCK / 2, QUARTER = SQ_ROW_BLOCK / 4 };
    if (bits == 8) {
        return (int8_t)row[p];
    }
    const uint8_t *block = row + sq_code_row_bytes(bits, p / SQ_ROW_BLOCK * SQ_ROW_BLOCK);
    const int i = (int)(p % SQ_ROW_BLOCK), byte = block[i % HALF];
    const int low = i < HALF ? byte & 15 : byte >> 4;
    if (bits == 4) {
        return low - 8;
    }
    return (low | (block[HALF + i % QUARTER] >> (i / QUARTER * 2) & 3) << 4) - 32;
}

/* The scale of code p of a row. */
static inline float
sq_scale_of_row(const struct sq_code_rows *w, int64_t row, int64_t p)
{
    return sq_float_of_bf16(w->scales[row * sq_code_row_scales(w->k) + p / SQ_ROW_BLOCK]);
}

#endif
