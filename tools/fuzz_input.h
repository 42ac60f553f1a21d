/* SPDX-License-Identifier: Apache-2.0 */
/* What a fuzzed byte string decides: numbers, sizes, and buffers of exactly the promised bytes. */
#ifndef FUZZ_INPUT_H
#define FUZZ_INPUT_H

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { BUFFERS = 256, MOST_BYTES = 1 << 20 };

struct input {
    const uint8_t *at;
    size_t left;
    uint64_t state; /* of the numbers that follow the last byte */
    int wild;       /* sizes may be anything; otherwise they suit */
    int too_large; /* a buffer of more than MOST_BYTES was asked for: the sizes are not to be met */
    int count;
    void *buffers[BUFFERS];
};

static inline uint8_t
next_byte(struct input *in)
{
    if (in->left) {
        in->left--;
        return *in->at++;
    }
    in->state = in->state * 6364136223846793005u + 1442695040888963407u;
    return (uint8_t)(in->state >> 56);
}

static inline int64_t
any_int64(struct input *in)
{
    uint64_t value = 0;
    for (int i = 0; i < 8; i++) {
        value = value << 8 | next_byte(in);
    }
    return (int64_t)(value >> next_byte(in) % 64);
}

static inline int64_t
up_to(struct input *in, int64_t most)
{
    return next_byte(in) % (most + 1);
}

/* `usual`, or in a wild input now and then something else. */
static inline int64_t
number(struct input *in, int64_t usual)
{
    if (!in->wild || next_byte(in) % 32) {
        return usual;
    }
    switch (next_byte(in) % 4) {
        case 0:
            return any_int64(in);
        case 1:
            return usual + 1 - up_to(in, 2);
        case 2:
            return -(int64_t)next_byte(in);
        default:
            return up_to(in, 80);
    }
}

static inline float
any_float(struct input *in)
{
    uint32_t bits = 0;
    for (int i = 0; i < 4; i++) {
        bits = bits << 8 | next_byte(in);
    }
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

static inline float
real(struct input *in, float usual)
{
    return in->wild && next_byte(in) % 32 == 0 ? any_float(in) : usual;
}

/* count [elements] of `bytes` each, of which nobody may touch what lies beside. The content is the
 * input's. */
static inline void *
buffer(struct input *in, int64_t count, int64_t bytes)
{
    int64_t size;
    if (count < 0 || __builtin_mul_overflow(count, bytes, &size) || size > MOST_BYTES ||
        in->count == BUFFERS) {
        in->too_large = 1;
        size = 0;
    }
    uint8_t *p = NULL;
    if (posix_memalign((void **)&p, 64, size ? (size_t)size : 1)) {
        abort();
    }
    const int64_t own = size < 64 ? size : 64;
    uint64_t state = 0x9e3779b97f4a7c15u;
    for (int64_t i = 0; i < own; i++) {
        p[i] = next_byte(in);
        state = (state ^ p[i]) * 0x100000001b3u;
    }
    for (int64_t i = own; i < size; i++) {
        state = state * 6364136223846793005u + 1442695040888963407u;
        p[i] = (uint8_t)(state >> 56);
    }
    if (in->count < BUFFERS) {
        in->buffers[in->count++] = p;
    }
    return p;
}

/* rows * columns elements. */
static inline void *
matrix(struct input *in, int64_t rows, int64_t columns, int64_t bytes)
{
    int64_t count;
    if (rows < 0 || columns < 0 || __builtin_mul_overflow(rows, columns, &count)) {
        in->too_large = 1;
        count = 0;
    }
    return buffer(in, count, bytes);
}

/* Floats between -2 and 2, in some inputs with whatever bits there are. */
static inline float *
floats(struct input *in, int64_t rows, int64_t columns)
{
    float *x = matrix(in, rows, columns, sizeof *x);
    const int raw = next_byte(in) % 16 == 0;
    for (int64_t i = 0; !in->too_large && !raw && i < rows * columns; i++) {
        int32_t bits;
        memcpy(&bits, x + i, sizeof bits);
        x[i] = (float)bits * 0x1p-30f;
    }
    return x;
}

static inline void
free_buffers(struct input *in)
{
    while (in->count) {
        free(in->buffers[--in->count]);
    }
}

/* Ends the program where a promise is broken: the fuzzer keeps the input. */
#define HOLDS(ok)                                                    \
    do {                                                             \
        if (!(ok)) {                                                 \
            fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #ok); \
            abort();                                                 \
        }                                                            \
    } while (0)

/* fuzz_layer.c: a layer is sealed, and run where it was not refused. */
void
fuzz_layer(struct input *in);

#endif
