/* SPDX-License-Identifier: Apache-2.0 */
/* Keys and values of one head in 32, 16, 8 or 4 bits.
 *
 * A block holds the codes of the keys, the codes of the values, then scales and minima. Keys are
 * transposed, as the product with the queries wants them, tokens side by side. */
#include "runtime/sq_cache_block.h"

#include <math.h>
#include <string.h>

#include "core/sq_internal.h"
#include "kernels/sq_kernels.h"
#include "runtime/sq_cache.h"

enum {
    TOKENS = SQ_PAGE_TOKENS,
    STACK_CODES = 256, /* of a head at a time; a multiple of every group of codes */
};
_Static_assert(TOKENS % 16 == 0, "a row of transposed 4-bit keys has whole groups");

/* Scales and minima stand behind the codes, [TOKENS] each. They are float16, 4.25 bits a number at
 * 4 bits and head_dim 128 where float32 would be 4.5: rounding keys and values of a 25.7M-parameter
 * LLaMA (head_dim 64) alone gives a KL of 0.00255 against 0.00250 with float32 at 4 bits, of
 * 0.0000084 against 0.0000082 at 8. So little, because the codes are those of the rounded scale and
 * minimum. */
enum { KEY_SCALES, KEY_MINIMA, VALUE_SCALES, VALUE_MINIMA, META };

static int64_t
row_bytes(int bits, int64_t n)
{
    return bits >= 16 ? n * (bits / 8) : sq_ceil_div(n, 64 / bits) * 8;
}

struct sq_block_form
sq_block_form(int bits, int bfloat16, int64_t head_dim)
{
    struct sq_block_form f = {.bits = bits, .bfloat16 = bfloat16, .head_dim = head_dim};
    f.row_bytes = row_bytes(bits, head_dim);
    f.values = head_dim * row_bytes(bits, TOKENS);
    f.meta = f.values + TOKENS * f.row_bytes;
    f.bytes = f.meta + (bits < 16 ? META * TOKENS * (int64_t)sizeof(uint16_t) : 0);
    f.bytes = sq_round_up(f.bytes, SQ_ALIGN_BYTES);
    return f;
}

/* ---- 16-bit floats ---------------------------------------------------------------------- */

#define F16_LARGEST 65504.0f
#define BF16_LARGEST 0x1.fep127f
/* Of bfloat16 minima and scales: 255 * scale + minimum stays a float32. */
#define BF16_MINIMUM_LIMIT 0x1p126f
#define BF16_SCALE_LIMIT 0x1p119f
/* Of scales: 1 over a smaller one would be beyond float32. */
#define LEAST_SCALE 0x1p-126f

/* Halves to even, beyond the largest becomes that, NaN stays NaN; no branch, for vectors. */
static void
f32_to_bf16(const float *in, int64_t count, uint16_t *out)
{
    for (int64_t i = 0; i < count; i++) {
        uint32_t bits;
        memcpy(&bits, in + i, sizeof bits);
        const uint32_t sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
        uint32_t half = (magnitude + 0x7fff + (magnitude >> 16 & 1)) >> 16;
        half = half > 0x7f7f ? 0x7f7f : half;
        half = magnitude > 0x7f800000 ? 0x7fc0 : half;
        out[i] = (uint16_t)(sign | half);
    }
}

static void
narrow(const struct sq_kernels *kernels, int bfloat16, const float *in, int64_t count,
       uint16_t *out)
{
    if (bfloat16) {
        f32_to_bf16(in, count, out);
    }
    else {
        kernels->f32_to_f16(in, count, out);
    }
}

static void
widen(const struct sq_kernels *kernels, int bfloat16, const uint16_t *in, int64_t count, float *out)
{
    (bfloat16 ? kernels->bf16_to_f32 : kernels->f16_to_f32)(in, count, out);
}

static uint16_t
to_half(const struct sq_kernels *kernels, int bfloat16, float x)
{
    uint16_t half;
    narrow(kernels, bfloat16, &x, 1, &half);
    return half;
}

static float
from_half(const struct sq_kernels *kernels, int bfloat16, uint16_t half)
{
    float x;
    widen(kernels, bfloat16, &half, 1, &x);
    return x;
}

/* ---- what a head holds ------------------------------------------------------------------ */

struct head_range {
    float low, high; /* where all are finite */
    int finite;
    float largest; /* magnitude, NaN left out */
};

/* Of NaN and a number the number, where b is it. */
static float
larger(float a, float b)
{
    return a > b ? a : b;
}

static struct head_range
range_of(const struct sq_kernels *kernels, const float *x, int64_t n)
{
    struct head_range r = {0};
    r.finite = kernels->extremes(x, n, &r.low, &r.high);
    if (r.finite) {
        r.largest = larger(-r.low, r.high);
        return r;
    }
    for (int64_t i = 0; i < n; i++) {
        r.largest = larger(fabsf(x[i]), r.largest);
    }
    return r;
}

/* How many of x are below low or above high. */
static int64_t
count_beyond(const float *x, int64_t n, double low, double high)
{
    int64_t count = 0;
    for (int64_t i = 0; i < n; i++) {
        count += x[i] < low || x[i] > high;
    }
    return count;
}

/* ---- quantizing ------------------------------------------------------------------------- */

/* How one head is rounded: code = rint((x - minimum) * inv_scale), 0 .. high. */
struct head_code {
    uint16_t scale16, minimum16;
    float minimum, inv_scale, high;
    int64_t clamped; /* numbers that no code reaches */
};

/* The minimum is rounded down and the scale up, to the next 16-bit float, so that the codes reach
 * both ends of the head: to nearest, 8 bits would lose an eighth of a step there. */
static struct head_code
choose_code(const struct sq_kernels *kernels, int bits, int bfloat16,
            const struct head_range *range, const float *x, int64_t n)
{
    struct head_code code = {.high = (float)((1 << bits) - 1)};
    const float lowest = bfloat16 ? -BF16_MINIMUM_LIMIT : -F16_LARGEST;
    const float widest = bfloat16 ? BF16_SCALE_LIMIT : F16_LARGEST;
    if (!range->finite) {
        code.scale16 = code.minimum16 = bfloat16 ? 0x7fc0 : 0x7e00; /* NaN */
        return code;
    }
    /* of 0 and -0 extremes may give either: 0 */
    const float low = range->low < lowest ? lowest : range->low + 0.0f;
    code.minimum16 = to_half(kernels, bfloat16, low);
    code.minimum = from_half(kernels, bfloat16, code.minimum16);
    if (code.minimum > low) {
        /* of a half's bits one less is nearer to zero: of a positive number that is down */
        code.minimum16 = (uint16_t)(code.minimum > 0    ? code.minimum16 - 1
                                    : code.minimum == 0 ? 0x8001
                                                        : code.minimum16 + 1);
        code.minimum = from_half(kernels, bfloat16, code.minimum16);
    }
    const float spread = range->high - code.minimum, exact = spread / code.high;
    const float least = spread > 0 ? LEAST_SCALE : 0.0f;
    const float step = exact < least ? least : exact < widest ? exact : widest;
    code.scale16 = to_half(kernels, bfloat16, step);
    float scale = from_half(kernels, bfloat16, code.scale16);
    if (scale < step) {
        code.scale16++;
        scale = from_half(kernels, bfloat16, code.scale16);
    }
    code.inv_scale = scale > 0 ? 1.0f / scale : 0.0f;
    if (range->low < lowest || step == widest) {
        code.clamped = count_beyond(x, n, code.minimum, (double)scale * code.high + code.minimum);
    }
    return code;
}

/* codes [count] of x [count], count at most STACK_CODES. */
static void
make_codes(const struct sq_kernels *kernels, const struct head_code *code, const float *x,
           int64_t count, uint8_t *codes)
{
    float above[STACK_CODES];
    for (int64_t i = 0; i < count; i++) {
        above[i] = x[i] - code->minimum;
    }
    kernels->quantize_codes(above, count, code->inv_scale, 0.0f, code->high, 0, (int8_t *)codes);
}

sq_status
sq_kv_quantize(int bits, const float *x, int64_t m, int64_t n, uint8_t *codes, uint16_t *scales,
               uint16_t *minima)
{
    int64_t elements;
    if (!x || !codes || !scales || !minima) {
        return SQ_ERR_NULL;
    }
    if (m < 0 || n < 1) {
        return SQ_ERR_SHAPE;
    }
    if ((bits != 4 && bits != 8) || !sq_product(m, n, &elements)) {
        return SQ_ERR_RANGE;
    }
    const struct sq_kernels *kernels = sq_kernels_active();
    for (int64_t t = 0; t < m; t++) {
        const struct head_range range = range_of(kernels, x + t * n, n);
        const struct head_code code = choose_code(kernels, bits, 0, &range, x + t * n, n);
        for (int64_t i = 0; i < n; i += STACK_CODES) {
            make_codes(kernels, &code, x + t * n + i, sq_min_i64(n - i, STACK_CODES),
                       codes + t * n + i);
        }
        scales[t] = code.scale16;
        minima[t] = code.minimum16;
    }
    return SQ_OK;
}

/* ---- storing and reading ---------------------------------------------------------------- */

static uint16_t *
meta_of(const struct sq_block_form *f, const uint8_t *block, int which)
{
    return (uint16_t *)(void *)(block + f->meta) + which * TOKENS;
}

/* Codes of channels i .. i + count - 1 of the key in place slot: a column. */
static void
store_key_codes(int bits, uint8_t *keys, int64_t slot, int64_t i, int64_t count,
                const uint8_t *codes)
{
    if (bits == 8) {
        for (int64_t j = 0; j < count; j++) {
            keys[(i + j) * TOKENS + slot] = codes[j];
        }
        return;
    }
    uint8_t *column = keys + slot / 16 * 8 + slot % 8;
    const int shift = slot % 16 < 8 ? 0 : 4;
    for (int64_t j = 0; j < count; j++) {
        uint8_t *byte = column + (i + j) * (TOKENS / 2);
        *byte = (uint8_t)((*byte & 0xf0 >> shift) | codes[j] << shift);
    }
}

/* The same of a value: a row. codes has room for whole groups. */
static void
store_value_codes(int bits, uint8_t *row, int64_t i, int64_t count, uint8_t *codes)
{
    if (bits == 8) {
        memcpy(row + i, codes, (size_t)count);
        return;
    }
    for (int64_t j = count; j % 16; j++) {
        codes[j] = 0;
    }
    for (int64_t j = 0; j < count; j += 16) {
        for (int64_t b = 0; b < 8; b++) {
            row[(i + j) / 2 + b] = (uint8_t)(codes[j + b] | codes[j + b + 8] << 4);
        }
    }
}

static struct sq_block_watch
store_codes(const struct sq_block_form *f, const struct sq_kernels *kernels, uint8_t *block,
            int64_t slot, const float *x, int is_key)
{
    const int64_t d = f->head_dim;
    const struct head_range range = range_of(kernels, x, d);
    const struct head_code code = choose_code(kernels, f->bits, f->bfloat16, &range, x, d);
    uint8_t codes[STACK_CODES];
    for (int64_t i = 0; i < d; i += STACK_CODES) {
        const int64_t count = sq_min_i64(d - i, STACK_CODES);
        make_codes(kernels, &code, x + i, count, codes);
        if (is_key) {
            store_key_codes(f->bits, block, slot, i, count, codes);
        }
        else {
            store_value_codes(f->bits, block + f->values + slot * f->row_bytes, i, count, codes);
        }
    }
    meta_of(f, block, is_key ? KEY_SCALES : VALUE_SCALES)[slot] = code.scale16;
    meta_of(f, block, is_key ? KEY_MINIMA : VALUE_MINIMA)[slot] = code.minimum16;
    return (struct sq_block_watch){range.largest, code.clamped};
}

static void
store_halves(const struct sq_block_form *f, const struct sq_kernels *kernels, uint8_t *block,
             int64_t slot, const float *key, const float *value)
{
    const int64_t d = f->head_dim;
    uint16_t halves[STACK_CODES], *keys = (uint16_t *)(void *)block;
    for (int64_t i = 0; i < d; i += STACK_CODES) {
        const int64_t count = sq_min_i64(d - i, STACK_CODES);
        narrow(kernels, f->bfloat16, key + i, count, halves);
        for (int64_t j = 0; j < count; j++) {
            keys[(i + j) * TOKENS + slot] = halves[j];
        }
    }
    narrow(kernels, f->bfloat16, value, d, (uint16_t *)(void *)(block + f->values) + slot * d);
}

static struct sq_block_watch
add(struct sq_block_watch a, struct sq_block_watch b)
{
    return (struct sq_block_watch){larger(a.largest, b.largest), a.clamped + b.clamped};
}

/* Of floats x [n]. */
static struct sq_block_watch
watch_floats(const struct sq_block_form *f, const struct sq_kernels *kernels, const float *x,
             int64_t n)
{
    const float limit = f->bits == 32 ? INFINITY : f->bfloat16 ? BF16_LARGEST : F16_LARGEST;
    struct sq_block_watch w = {.largest = range_of(kernels, x, n).largest};
    if (w.largest > limit) {
        w.clamped = count_beyond(x, n, -limit, limit);
    }
    return w;
}

struct sq_block_watch
sq_block_store(const struct sq_block_form *form, const struct sq_kernels *kernels, uint8_t *block,
               int64_t slot, const float *key, const float *value)
{
    const int64_t d = form->head_dim;
    if (form->bits < 16) {
        return add(store_codes(form, kernels, block, slot, key, 1),
                   store_codes(form, kernels, block, slot, value, 0));
    }
    if (form->bits == 16) {
        store_halves(form, kernels, block, slot, key, value);
    }
    else {
        float *keys = (float *)(void *)block;
        for (int64_t i = 0; i < d; i++) {
            keys[i * TOKENS + slot] = key[i];
        }
        memcpy(block + form->values + slot * form->row_bytes, value, (size_t)d * sizeof *value);
    }
    return add(watch_floats(form, kernels, key, d), watch_floats(form, kernels, value, d));
}

/* Codes [rows][n] of a block to tile [rows][n]; count scales and minima at scales and minima. */
static void
read_codes(const struct sq_block_form *f, const struct sq_kernels *kernels, const uint8_t *codes,
           const uint16_t *scales, const uint16_t *minima, int by_row, int64_t rows, int64_t n,
           float *tile)
{
    float scale[TOKENS], minimum[TOKENS];
    const int64_t count = by_row ? rows : n;
    widen(kernels, f->bfloat16, scales, count, scale);
    widen(kernels, f->bfloat16, minima, count, minimum);
    (f->bits == 8 ? kernels->kv8_to_f32 : kernels->kv4_to_f32)(codes, scale, minimum, by_row, rows,
                                                               n, tile);
}

const float *
sq_block_keys(const struct sq_block_form *form, const struct sq_kernels *kernels,
              const uint8_t *block, float *tile)
{
    const int64_t d = form->head_dim;
    if (!block) {
        return memset(tile, 0, (size_t)(d * TOKENS) * sizeof *tile);
    }
    switch (form->bits) {
        case 32:
            return (const float *)(const void *)block;
        case 16:
            widen(kernels, form->bfloat16, (const uint16_t *)(const void *)block, d * TOKENS, tile);
            return tile;
        default:
            read_codes(form, kernels, block, meta_of(form, block, KEY_SCALES),
                       meta_of(form, block, KEY_MINIMA), 0, d, TOKENS, tile);
            return tile;
    }
}

const float *
sq_block_values(const struct sq_block_form *form, const struct sq_kernels *kernels,
                const uint8_t *block, int64_t from, int64_t count, float *tile)
{
    const int64_t d = form->head_dim;
    if (!block) {
        return memset(tile, 0, (size_t)(count * d) * sizeof *tile);
    }
    const uint8_t *rows = block + form->values + from * form->row_bytes;
    switch (form->bits) {
        case 32:
            return (const float *)(const void *)rows;
        case 16:
            widen(kernels, form->bfloat16, (const uint16_t *)(const void *)rows, count * d, tile);
            return tile;
        default:
            read_codes(form, kernels, rows, meta_of(form, block, VALUE_SCALES) + from,
                       meta_of(form, block, VALUE_MINIMA) + from, 1, count, d, tile);
            return tile;
    }
}
