/* SPDX-License-Identifier: Apache-2.0 */
/* Codes to the words of the file and back: a dense stream of bits, the lowest first. */
#include "quantize/sq_quantize.h"

#include <stdatomic.h>
#include <string.h>

#include "core/sq_internal.h"
#include "core/sq_threads.h"

enum { WORD_BITS = 32, NIBBLES = 8, CHUNK_WORDS = 1 << 13 };
_Static_assert(NIBBLES * 4 == WORD_BITS, "eight nibbles fill a word");

int
sq_weight_bits_valid(int bits)
{
    return bits == 4 || bits == 5 || bits == 6 || bits == 8;
}

int64_t
sq_packed_words(int bits, int64_t k)
{
    /* k bits / 32 without overflow for any k */
    return k / WORD_BITS * bits + sq_ceil_div(k % WORD_BITS * bits, WORD_BITS);
}

/* ---- rows ------------------------------------------------------------------------------- */

/* Eight bytes of 0 .. 15, the first one lowest, to eight nibbles: neighbours are merged three
 * times. */
static uint32_t
merge_nibbles(uint64_t bytes)
{
    bytes = (bytes | bytes >> 4) & 0x00ff00ff00ff00ffu;
    bytes = (bytes | bytes >> 8) & 0x0000ffff0000ffffu;
    return (uint32_t)(bytes | bytes >> 16);
}
_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "byte 0 becomes the lowest nibble");

static void
pack_nibbles(const uint8_t *codes, int64_t k, int32_t *words)
{
    for (int64_t w = 0; w < k / NIBBLES; w++) {
        uint64_t bytes;
        memcpy(&bytes, codes + w * NIBBLES, sizeof bytes);
        words[w] = (int32_t)merge_nibbles(bytes);
    }
    if (k % NIBBLES) {
        uint64_t bytes = 0x0808080808080808u;
        memcpy(&bytes, codes + k / NIBBLES * NIBBLES, (size_t)(k % NIBBLES));
        words[k / NIBBLES] = (int32_t)merge_nibbles(bytes);
    }
}

/* How many times eight codes of a row of k begin where eight bytes of its words follow. */
static ALWAYS_INLINE int64_t
eights(const int bits, int64_t k)
{
    const int64_t bytes = sq_packed_words(bits, k) * (int64_t)sizeof(int32_t);
    return sq_min_i64(k / 8, bytes < 8 ? 0 : (bytes - 8) / bits + 1);
}

/* In each pair of fields that `low` marks, the upper one moves down by `shift` to join the lower.
 */
static ALWAYS_INLINE uint64_t
join_fields(uint64_t x, uint64_t low, const int width, const int shift)
{
    return (x & low) | (x >> shift & low << width);
}

/* Of eight codes, the first one, the first two and the first four, joined: bits that repeat. */
static ALWAYS_INLINE uint64_t
ones_of(const int count, const int bits)
{
    return (UINT64_MAX >> (64 - count * bits)) * (count == 4   ? 1u
                                                  : count == 2 ? 0x0000000100000001u
                                                               : 0x0001000100010001u);
}

/* As many codes of a row as words of eight bytes inside its words have room for, eight at a time:
 * neighbours are joined three times, to `bits` bytes. Returns how many. */
static ALWAYS_INLINE int64_t
pack_eights(const uint8_t *codes, int64_t k, int32_t *words, const int bits)
{
    const int64_t count = eights(bits, k);
    for (int64_t i = 0; i < count; i++) {
        uint64_t x;
        memcpy(&x, codes + i * 8, sizeof x);
        x = join_fields(x, ones_of(1, bits), bits, 8 - bits);
        x = join_fields(x, ones_of(2, bits), 2 * bits, 16 - 2 * bits);
        x = join_fields(x, ones_of(4, bits), 4 * bits, 32 - 4 * bits);
        memcpy((char *)words + i * bits, &x, sizeof x);
    }
    return count * 8;
}

static int64_t
pack_most(int bits, const uint8_t *codes, int64_t k, int32_t *words)
{
    switch (bits) {
        case 5:
            return pack_eights(codes, k, words, 5);
        case 6:
            return pack_eights(codes, k, words, 6);
        default:
            return pack_eights(codes, k, words, 8);
    }
}

/* A row's codes follow each other in the words, and codes 0 follow them. */
void
sq_pack_row(int bits, const uint8_t *codes, int64_t k, int32_t *words)
{
    if (bits == 4) {
        pack_nibbles(codes, k, words);
        return;
    }
    const uint64_t zero = (uint64_t)1 << (bits - 1);
    int64_t j = pack_most(bits, codes, k, words);
    int64_t w = j * bits / WORD_BITS, filled = j * bits % WORD_BITS;
    uint64_t held = filled ? (uint32_t)words[w] & (((uint64_t)1 << filled) - 1) : 0;
    for (; w < sq_packed_words(bits, k); w++) {
        for (; filled < WORD_BITS; filled += bits, j++) {
            held |= (j < k ? codes[j] : zero) << filled;
        }
        words[w] = (int32_t)(uint32_t)held;
        held >>= WORD_BITS;
        filled -= WORD_BITS;
    }
}

/* In each of the fields that `low` marks, the upper half moves up by `shift`. */
static ALWAYS_INLINE uint64_t
split_fields(uint64_t x, uint64_t low, const int width, const int shift)
{
    return (x & low) | (x & low << width) << shift;
}

/* As many codes of a row as words of eight bytes inside it hold, eight at a time: `bits` bytes are
 * halved three times. Returns how many. */
static ALWAYS_INLINE int64_t
unpack_eights(const int32_t *words, int64_t k, int8_t *codes, const int bits)
{
    const uint64_t half = (uint64_t)1 << (bits - 1);
    const uint64_t each = 0x0101010101010101u, bias = each * (128 - half); /* within a byte */
    const int64_t count = eights(bits, k);
    for (int64_t i = 0; i < count; i++) {
        uint64_t x;
        memcpy(&x, (const char *)words + i * bits, sizeof x);
        x = split_fields(x, ones_of(4, bits), 4 * bits, 32 - 4 * bits);
        x = split_fields(x, ones_of(2, bits), 2 * bits, 16 - 2 * bits);
        x = split_fields(x, ones_of(1, bits), bits, 8 - bits);
        x = (x + bias) ^ each * 128; /* code - half, modulo 256 */
        memcpy(codes + i * 8, &x, sizeof x);
    }
    return count * 8;
}

static int64_t
unpack_most(int bits, const int32_t *words, int64_t k, int8_t *codes)
{
    switch (bits) {
        case 4:
            return unpack_eights(words, k, codes, 4);
        case 5:
            return unpack_eights(words, k, codes, 5);
        case 6:
            return unpack_eights(words, k, codes, 6);
        default:
            return unpack_eights(words, k, codes, 8);
    }
}

void
sq_unpack_row(int bits, const int32_t *words, int64_t k, int8_t *codes)
{
    const int half = 1 << (bits - 1), mask = 2 * half - 1;
    const int64_t done = unpack_most(bits, words, k, codes);
    const int64_t bit = done * bits;
    words += bit / WORD_BITS;
    int filled = (int)(-bit & (WORD_BITS - 1)); /* bits of the word that `done` ends in */
    uint64_t held = filled ? (uint64_t)(uint32_t)*words++ >> (WORD_BITS - filled) : 0;
    for (int64_t j = done; j < k; j++) {
        if (filled < bits) {
            held |= (uint64_t)(uint32_t)*words++ << filled;
            filled += WORD_BITS;
        }
        codes[j] = (int8_t)((int)(held & (unsigned)mask) - half);
        held >>= bits;
        filled -= bits;
    }
}

/* ---- matrices --------------------------------------------------------------------------- */

struct words_job {
    const int8_t *codes_in;
    int8_t *codes_out;
    const int32_t *words_in;
    int32_t *words_out;
    int64_t k;
    int bits;
    atomic_int status;
};

static void
pack_rows(void *context, int64_t begin, int64_t end, int thread)
{
    struct words_job *job = context;
    const int64_t k = job->k, words = sq_packed_words(job->bits, k);
    const int half = 1 << (job->bits - 1);
    (void)thread;
    uint8_t *row = sq_alloc((size_t)k);
    if (!row) {
        atomic_store(&job->status, SQ_ERR_NOMEM);
        return;
    }
    unsigned bad = 0; /* the bits that no code + half has */
    for (int64_t i = begin; i < end; i++) {
        const int8_t *codes = job->codes_in + i * k;
        for (int64_t j = 0; j < k; j++) {
            const unsigned code = (unsigned)(codes[j] + half);
            bad |= code >> job->bits;
            row[j] = (uint8_t)(code & (unsigned)(2 * half - 1));
        }
        sq_pack_row(job->bits, row, k, job->words_out + i * words);
    }
    if (bad) {
        atomic_store(&job->status, SQ_ERR_RANGE);
    }
    free(row);
}

static void
unpack_rows(void *context, int64_t begin, int64_t end, int thread)
{
    const struct words_job *job = context;
    const int64_t k = job->k, words = sq_packed_words(job->bits, k);
    (void)thread;
    for (int64_t i = begin; i < end; i++) {
        sq_unpack_row(job->bits, job->words_in + i * words, k, job->codes_out + i * k);
    }
}

static sq_status
run(struct words_job *job, int64_t n, const void *codes, const void *words,
    void (*rows)(void *, int64_t, int64_t, int))
{
    int64_t count;
    if (job->k < 1 || !sq_product(n, job->k, &count)) {
        return SQ_ERR_SHAPE;
    }
    if (count && (!codes || !words)) {
        return SQ_ERR_NULL;
    }
    if (!sq_weight_bits_valid(job->bits)) {
        return SQ_ERR_RANGE;
    }
    const int64_t length = sq_packed_words(job->bits, job->k);
    sq_parallel_for(n, sq_max_i64(1, CHUNK_WORDS / length), rows, job);
    return (sq_status)atomic_load(&job->status);
}

sq_status
sq_pack_codes(int bits, const int8_t *codes, int64_t n, int64_t k, int32_t *words)
{
    struct words_job job = {.codes_in = codes, .words_out = words, .k = k, .bits = bits};
    return run(&job, n, codes, words, pack_rows);
}

sq_status
sq_unpack_codes(int bits, const int32_t *words, int64_t n, int64_t k, int8_t *codes)
{
    struct words_job job = {.codes_out = codes, .words_in = words, .k = k, .bits = bits};
    return run(&job, n, codes, words, unpack_rows);
}
