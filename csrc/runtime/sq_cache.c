/* SPDX-License-Identifier: Apache-2.0 */
/* The KV cache: pages taken and given back, and keys and values in 32, 16, 8 or 4 bits.
 *
 * A page is SQ_PAGE_TOKENS positions of one sequence in one layer, block by block of a kv head. An
 * item of attention reads one block after the other, so that a block lies together: codes of the
 * keys, codes of the values, then scales and minima. Keys are transposed, as the product with the
 * queries wants them, tokens side by side. */
#include "runtime/sq_cache.h"

#include <math.h>
#include <stdatomic.h>
#include <string.h>

#include "core/sq_internal.h"
#include "kernels/sq_kernels.h"

enum {
    TOKENS = SQ_PAGE_TOKENS,
    STACK_CODES = 256, /* of a head at a time; a multiple of every group of codes */
};
#define MAX_SEQUENCES INT32_MAX
#define MAX_CAPACITY ((int64_t)1 << 31)
#define MAX_HEAD_DIM ((int64_t)1 << 24)
#define F16_NAN 0x7e00
_Static_assert(TOKENS % 16 == 0, "a row of transposed 4-bit keys has whole groups");

struct page_table {
    int64_t count;
    uint8_t **pages; /* owned, NULL where nothing was written */
};

/* A free page: the next one, in its first bytes. */
struct free_page {
    struct free_page *next;
};

struct sq_kv_cache_t {
    struct sq_kv_shape shape;
    float *hadamard_t;         /* owned, [head_dim][head_dim], transposed; NULL: fast, or none */
    int64_t row_bytes;         /* of one value */
    int64_t values, meta;      /* offsets of values and scales in a block */
    int64_t block_bytes;       /* of one kv head */
    int64_t page_bytes;        /* of all heads */
    struct page_table *tables; /* owned, [layers][sequences] */
    struct free_page *pool;    /* owned */
    int64_t pooled, used;
    _Atomic int64_t bytes;
};

/* Scales and minima stand behind the codes, [TOKENS] each. They are float16, 4.25 bits a number at
 * 4 bits and head_dim 128 where float32 would be 4.5: rounding keys and values of a 25.7M-parameter
 * LLaMA (head_dim 64) alone gives a KL of 0.00255 against 0.00250 with float32 at 4 bits, of
 * 0.0000084 against 0.0000082 at 8. So little, because the codes are those of the rounded scale and
 * minimum. */
enum { KEY_SCALES, KEY_MINIMA, VALUE_SCALES, VALUE_MINIMA, META };

/* ---- making it -------------------------------------------------------------------------- */

static int64_t
row_bytes(int bits, int64_t n)
{
    return bits >= 16 ? n * (bits / 8) : sq_ceil_div(n, 64 / bits) * 8;
}

static int
lay_out(sq_kv_cache_t *c)
{
    const struct sq_kv_shape *s = &c->shape;
    c->row_bytes = row_bytes(s->bits, s->head_dim);
    c->values = s->head_dim * row_bytes(s->bits, TOKENS);
    c->meta = c->values + TOKENS * c->row_bytes;
    c->block_bytes = c->meta;
    if (s->bits < 16) {
        c->block_bytes += META * TOKENS * (int64_t)sizeof(uint16_t);
    }
    c->block_bytes = sq_round_up(c->block_bytes, SQ_ALIGN_BYTES);
    return sq_product(c->block_bytes, s->kv_heads, &c->page_bytes) &&
           c->page_bytes <= INT64_MAX / 2;
}

/* The transposed matrix where head_dim is no power of two. */
static sq_status
make_hadamard(sq_kv_cache_t *c)
{
    const int64_t d = c->shape.head_dim;
    int64_t elements;
    if (!c->shape.hadamard || !(d & (d - 1))) {
        return SQ_OK;
    }
    if (!sq_product(d, d, &elements) || elements > INT64_MAX / (int64_t)sizeof(double)) {
        return SQ_ERR_NOMEM;
    }
    double *matrix = sq_alloc((size_t)elements * sizeof *matrix);
    c->hadamard_t = sq_alloc((size_t)elements * sizeof *c->hadamard_t);
    sq_status status = matrix && c->hadamard_t ? sq_hadamard_matrix(d, matrix) : SQ_ERR_NOMEM;
    for (int64_t i = 0; status == SQ_OK && i < elements; i++) {
        c->hadamard_t[i % d * d + i / d] = (float)matrix[i];
    }
    free(matrix);
    return status;
}

static sq_status
check_shape(const struct sq_kv_shape *s)
{
    if (s->layers < 1 || s->sequences < 1 || s->kv_heads < 1 || s->head_dim < 1 ||
        s->capacity < 1 || s->limit_bytes < 0 || s->sequences > MAX_SEQUENCES ||
        s->capacity > MAX_CAPACITY || s->head_dim > MAX_HEAD_DIM ||
        (s->bits != 4 && s->bits != 8 && s->bits != 16 && s->bits != 32)) {
        return SQ_ERR_RANGE;
    }
    return SQ_OK;
}

sq_status
sq_kv_cache_create(const struct sq_kv_shape *shape, sq_kv_cache_t **out)
{
    int64_t tables, bytes;
    if (!shape || !out) {
        return SQ_ERR_NULL;
    }
    SQ_TRY(check_shape(shape));
    if (!sq_product(shape->layers, shape->sequences, &tables) ||
        !sq_product(tables, sizeof(struct page_table), &bytes)) {
        return SQ_ERR_NOMEM;
    }
    sq_kv_cache_t *c = calloc(1, sizeof *c);
    if (!c) {
        return SQ_ERR_NOMEM;
    }
    c->shape = *shape;
    c->shape.hadamard = shape->hadamard && shape->bits < 16;
    sq_status status = lay_out(c) ? make_hadamard(c) : SQ_ERR_NOMEM;
    if (status == SQ_OK && !(c->tables = calloc((size_t)bytes, 1))) {
        status = SQ_ERR_NOMEM;
    }
    if (status != SQ_OK) {
        sq_kv_cache_destroy(c);
        return status;
    }
    *out = c;
    return SQ_OK;
}

static void
empty_pool(sq_kv_cache_t *c, int64_t keep)
{
    while (c->pooled > keep) {
        struct free_page *page = c->pool;
        c->pool = page->next;
        c->pooled--;
        free(page);
    }
    atomic_store(&c->bytes, (c->used + c->pooled) * c->page_bytes);
}

void
sq_kv_cache_destroy(sq_kv_cache_t *cache)
{
    if (!cache) {
        return;
    }
    const int64_t tables = cache->tables ? cache->shape.layers * cache->shape.sequences : 0;
    for (int64_t i = 0; i < tables; i++) {
        for (int64_t page = 0; page < cache->tables[i].count; page++) {
            free(cache->tables[i].pages[page]);
        }
        free(cache->tables[i].pages);
    }
    empty_pool(cache, 0);
    free(cache->tables);
    free(cache->hadamard_t);
    free(cache);
}

const struct sq_kv_shape *
sq_kv_cache_shape(const sq_kv_cache_t *cache)
{
    return &cache->shape;
}

int64_t
sq_kv_cache_page_bytes(const sq_kv_cache_t *cache)
{
    return cache->page_bytes;
}

int64_t
sq_kv_cache_bytes(const sq_kv_cache_t *cache)
{
    return atomic_load(&((sq_kv_cache_t *)cache)->bytes);
}

/* ---- pages ------------------------------------------------------------------------------ */

static struct page_table *
table_of(const sq_kv_cache_t *c, int64_t layer, int64_t sequence)
{
    return &c->tables[layer * c->shape.sequences + sequence];
}

/* Room for page number `page`. Doubling keeps appending linear. */
static int
grow_table(struct page_table *t, int64_t page, int64_t capacity)
{
    if (page < t->count) {
        return 1;
    }
    const int64_t most = sq_ceil_div(capacity, TOKENS);
    const int64_t count = sq_min_i64(most, sq_max_i64(page + 1, 2 * t->count));
    uint8_t **pages = calloc((size_t)count, sizeof *pages);
    if (!pages) {
        return 0;
    }
    if (t->count) {
        memcpy(pages, t->pages, (size_t)t->count * sizeof *pages);
    }
    free(t->pages);
    t->pages = pages;
    t->count = count;
    return 1;
}

/* Stands in a table for a page that the running _reserve is about to take. */
static uint8_t wanted;

struct reservation {
    sq_kv_cache_t *cache;
    int64_t first, last, m;
    const int32_t *sequence;
    const int64_t *position;
};

/* Marks the pages that are missing. Their number, or -1 when a table cannot grow. */
static int64_t
mark_missing(const struct reservation *r)
{
    int64_t missing = 0;
    for (int64_t layer = r->first; layer < r->last; layer++) {
        for (int64_t t = 0; t < r->m; t++) {
            struct page_table *table = table_of(r->cache, layer, r->sequence[t]);
            const int64_t page = r->position[t] / TOKENS;
            if (!grow_table(table, page, r->cache->shape.capacity)) {
                return -1;
            }
            if (!table->pages[page]) {
                table->pages[page] = &wanted;
                missing++;
            }
        }
    }
    return missing;
}

/* Puts pages of the pool where marks are, or nothing at all. */
static void
replace_marks(const struct reservation *r, int with_pages)
{
    sq_kv_cache_t *c = r->cache;
    for (int64_t layer = r->first; layer < r->last; layer++) {
        for (int64_t t = 0; t < r->m; t++) {
            const struct page_table *table = table_of(c, layer, r->sequence[t]);
            const int64_t page = r->position[t] / TOKENS;
            if (page >= table->count || table->pages[page] != &wanted) {
                continue;
            }
            table->pages[page] = NULL;
            if (with_pages) {
                struct free_page *taken = c->pool;
                c->pool = taken->next;
                c->pooled--;
                c->used++;
                table->pages[page] = memset(taken, 0, (size_t)c->page_bytes);
            }
        }
    }
}

static sq_status
fill_pool(sq_kv_cache_t *c, int64_t count)
{
    const int64_t limit = c->shape.limit_bytes;
    if (limit && count > limit / c->page_bytes - c->used) {
        return SQ_ERR_NOMEM;
    }
    while (c->pooled < count) {
        struct free_page *page = sq_alloc((size_t)c->page_bytes);
        if (!page) {
            return SQ_ERR_NOMEM;
        }
        page->next = c->pool;
        c->pool = page;
        c->pooled++;
    }
    return SQ_OK;
}

static sq_status
check_tokens(const struct sq_kv_shape *s, const int32_t *sequence, const int64_t *position,
             int64_t m)
{
    for (int64_t t = 0; t < m; t++) {
        if (sequence[t] < 0 || sequence[t] >= s->sequences || position[t] < 0 ||
            position[t] >= s->capacity) {
            return SQ_ERR_RANGE;
        }
    }
    return SQ_OK;
}

sq_status
sq_kv_cache_reserve(sq_kv_cache_t *cache, int64_t first, int64_t last, const int32_t *sequence,
                    const int64_t *position, int64_t m)
{
    if (!cache || !sequence || !position) {
        return SQ_ERR_NULL;
    }
    if (first < 0 || last < first || last > cache->shape.layers || m < 0) {
        return SQ_ERR_RANGE;
    }
    SQ_TRY(check_tokens(&cache->shape, sequence, position, m));
    const struct reservation r = {cache, first, last, m, sequence, position};
    const int64_t missing = mark_missing(&r);
    if (missing == 0) {
        return SQ_OK;
    }
    const sq_status status = missing < 0 ? SQ_ERR_NOMEM : fill_pool(cache, missing);
    replace_marks(&r, status == SQ_OK);
    empty_pool(cache, cache->used);
    return status;
}

sq_status
sq_kv_cache_release(sq_kv_cache_t *cache, int64_t sequence)
{
    if (!cache) {
        return SQ_ERR_NULL;
    }
    if (sequence < 0 || sequence >= cache->shape.sequences) {
        return SQ_ERR_RANGE;
    }
    for (int64_t layer = 0; layer < cache->shape.layers; layer++) {
        struct page_table *table = table_of(cache, layer, sequence);
        for (int64_t i = 0; i < table->count; i++) {
            struct free_page *page = (struct free_page *)(void *)table->pages[i];
            if (page) {
                page->next = cache->pool;
                cache->pool = page;
                cache->pooled++;
                cache->used--;
            }
        }
        free(table->pages);
        *table = (struct page_table){0, NULL};
    }
    empty_pool(cache, cache->used);
    return SQ_OK;
}

uint8_t *
sq_cache_block(const sq_kv_cache_t *cache, int64_t layer, int64_t sequence, int64_t page,
               int64_t head)
{
    const struct page_table *table = table_of(cache, layer, sequence);
    uint8_t *begin = page < table->count ? table->pages[page] : NULL;
    return begin ? begin + head * cache->block_bytes : NULL;
}

/* ---- Hadamard --------------------------------------------------------------------------- */

/* Fast Walsh-Hadamard transform of x [n], n a power of two, over sqrt(n). */
static void
walsh_hadamard(float *x, int64_t n)
{
    for (int64_t h = 1; h < n; h *= 2) {
        for (int64_t i = 0; i < n; i += 2 * h) {
            for (int64_t j = i; j < i + h; j++) {
                const float a = x[j], b = x[j + h];
                x[j] = a + b;
                x[j + h] = a - b;
            }
        }
    }
    const float scale = (float)(1.0 / sqrt((double)n));
    for (int64_t i = 0; i < n; i++) {
        x[i] *= scale;
    }
}

void
sq_cache_rotate(const sq_kv_cache_t *cache, const struct sq_kernels *kernels, float *x,
                int64_t heads, float *scratch)
{
    const int64_t d = cache->shape.head_dim;
    if (!cache->shape.hadamard) {
        return;
    }
    if (cache->hadamard_t) {
        kernels->gemm_f32(heads, d, d, x, d, cache->hadamard_t, d, scratch, d);
        memcpy(x, scratch, (size_t)(heads * d) * sizeof *x);
        return;
    }
    for (int64_t h = 0; h < heads; h++) {
        walsh_hadamard(x + h * d, d);
    }
}

/* ---- quantizing ------------------------------------------------------------------------- */

static uint16_t
to_f16(const struct sq_kernels *kernels, float x)
{
    uint16_t half;
    kernels->f32_to_f16(&x, 1, &half);
    return half;
}

static float
from_f16(const struct sq_kernels *kernels, uint16_t half)
{
    float x;
    kernels->f16_to_f32(&half, 1, &x);
    return x;
}

/* How one head is rounded: code = rint((x - minimum) * inv_scale), 0 .. high. */
struct head_code {
    uint16_t scale16, minimum16;
    float minimum, inv_scale, high;
};

/* The minimum is rounded down and the scale up, to the next float16, so that the codes reach both
 * ends of the head: to nearest, 8 bits would lose an eighth of a step there. */
static struct head_code
choose_code(const struct sq_kernels *kernels, int bits, const float *x, int64_t n)
{
    struct head_code code = {.high = (float)((1 << bits) - 1)};
    float low, high;
    if (!kernels->extremes(x, n, &low, &high)) {
        code.scale16 = code.minimum16 = F16_NAN;
        return code;
    }
    code.minimum16 = to_f16(kernels, low + 0.0f); /* of 0 and -0 extremes may give either: 0 */
    code.minimum = from_f16(kernels, code.minimum16);
    if (code.minimum > low && code.minimum > -65504.0f) {
        /* of float16's bits one less is nearer to zero: of a positive number that is down */
        code.minimum16 = (uint16_t)(code.minimum > 0    ? code.minimum16 - 1
                                    : code.minimum == 0 ? 0x8001
                                                        : code.minimum16 + 1);
        code.minimum = from_f16(kernels, code.minimum16);
    }
    const float step = (high - code.minimum) / code.high;
    code.scale16 = to_f16(kernels, step);
    float scale = from_f16(kernels, code.scale16);
    if (scale < step && scale < 65504.0f) {
        code.scale16++;
        scale = from_f16(kernels, code.scale16);
    }
    code.inv_scale = scale > 0 ? 1.0f / scale : 0.0f;
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
        const struct head_code code = choose_code(kernels, bits, x + t * n, n);
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
meta_of(const sq_kv_cache_t *c, const uint8_t *block, int which)
{
    return (uint16_t *)(void *)(block + c->meta) + which * TOKENS;
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

static void
store_codes(const sq_kv_cache_t *c, const struct sq_kernels *kernels, uint8_t *block, int64_t slot,
            const float *x, int is_key)
{
    const int64_t d = c->shape.head_dim;
    const int bits = c->shape.bits;
    const struct head_code code = choose_code(kernels, bits, x, d);
    uint8_t codes[STACK_CODES];
    for (int64_t i = 0; i < d; i += STACK_CODES) {
        const int64_t count = sq_min_i64(d - i, STACK_CODES);
        make_codes(kernels, &code, x + i, count, codes);
        if (is_key) {
            store_key_codes(bits, block, slot, i, count, codes);
        }
        else {
            store_value_codes(bits, block + c->values + slot * c->row_bytes, i, count, codes);
        }
    }
    meta_of(c, block, is_key ? KEY_SCALES : VALUE_SCALES)[slot] = code.scale16;
    meta_of(c, block, is_key ? KEY_MINIMA : VALUE_MINIMA)[slot] = code.minimum16;
}

static void
store_halves(const sq_kv_cache_t *c, const struct sq_kernels *kernels, uint8_t *block, int64_t slot,
             const float *key, const float *value)
{
    const int64_t d = c->shape.head_dim;
    uint16_t halves[STACK_CODES], *keys = (uint16_t *)(void *)block;
    for (int64_t i = 0; i < d; i += STACK_CODES) {
        const int64_t count = sq_min_i64(d - i, STACK_CODES);
        kernels->f32_to_f16(key + i, count, halves);
        for (int64_t j = 0; j < count; j++) {
            keys[(i + j) * TOKENS + slot] = halves[j];
        }
    }
    kernels->f32_to_f16(value, d, (uint16_t *)(void *)(block + c->values) + slot * d);
}

void
sq_cache_store(const sq_kv_cache_t *cache, const struct sq_kernels *kernels, uint8_t *block,
               int64_t slot, const float *key, const float *value)
{
    const int64_t d = cache->shape.head_dim;
    if (cache->shape.bits < 16) {
        store_codes(cache, kernels, block, slot, key, 1);
        store_codes(cache, kernels, block, slot, value, 0);
        return;
    }
    if (cache->shape.bits == 16) {
        store_halves(cache, kernels, block, slot, key, value);
        return;
    }
    float *keys = (float *)(void *)block;
    for (int64_t i = 0; i < d; i++) {
        keys[i * TOKENS + slot] = key[i];
    }
    memcpy(block + cache->values + slot * cache->row_bytes, value, (size_t)d * sizeof *value);
}

const float *
sq_cache_keys(const sq_kv_cache_t *cache, const struct sq_kernels *kernels, const uint8_t *block,
              float *tile)
{
    const int64_t d = cache->shape.head_dim;
    if (!block) {
        return memset(tile, 0, (size_t)(d * TOKENS) * sizeof *tile);
    }
    switch (cache->shape.bits) {
        case 32:
            return (const float *)(const void *)block;
        case 16:
            kernels->f16_to_f32((const uint16_t *)(const void *)block, d * TOKENS, tile);
            return tile;
        default:
            (cache->shape.bits == 8 ? kernels->kv8_to_f32 : kernels->kv4_to_f32)(
                block, meta_of(cache, block, KEY_SCALES), meta_of(cache, block, KEY_MINIMA), 0, d,
                TOKENS, tile);
            return tile;
    }
}

const float *
sq_cache_values(const sq_kv_cache_t *cache, const struct sq_kernels *kernels, const uint8_t *block,
                int64_t from, int64_t count, float *tile)
{
    const int64_t d = cache->shape.head_dim;
    if (!block) {
        return memset(tile, 0, (size_t)(count * d) * sizeof *tile);
    }
    const uint8_t *rows = block + cache->values + from * cache->row_bytes;
    switch (cache->shape.bits) {
        case 32:
            return (const float *)(const void *)rows;
        case 16:
            kernels->f16_to_f32((const uint16_t *)(const void *)rows, count * d, tile);
            return tile;
        default:
            (cache->shape.bits == 8 ? kernels->kv8_to_f32 : kernels->kv4_to_f32)(
                rows, meta_of(cache, block, VALUE_SCALES) + from,
                meta_of(cache, block, VALUE_MINIMA) + from, 1, count, d, tile);
            return tile;
    }
}

sq_status
sq_kv_cache_read(const sq_kv_cache_t *cache, int64_t layer, int64_t sequence, int64_t count,
                 float *keys, float *values)
{
    if (!cache || !keys || !values) {
        return SQ_ERR_NULL;
    }
    const struct sq_kv_shape *s = &cache->shape;
    if (layer < 0 || layer >= s->layers || sequence < 0 || sequence >= s->sequences || count < 0 ||
        count > s->capacity) {
        return SQ_ERR_RANGE;
    }
    const struct sq_kernels *kernels = sq_kernels_active();
    const int64_t d = s->head_dim;
    float *tile = sq_alloc((size_t)(d * TOKENS) * sizeof *tile);
    if (!tile) {
        return SQ_ERR_NOMEM;
    }
    for (int64_t t = 0; t < count; t++) {
        for (int64_t h = 0; h < s->kv_heads; h++) {
            const uint8_t *block = sq_cache_block(cache, layer, sequence, t / TOKENS, h);
            const int64_t row = (t * s->kv_heads + h) * d;
            memcpy(values + row, sq_cache_values(cache, kernels, block, t % TOKENS, 1, tile),
                   (size_t)d * sizeof *values);
            const float *block_keys = sq_cache_keys(cache, kernels, block, tile);
            for (int64_t i = 0; i < d; i++) {
                keys[row + i] = block_keys[i * TOKENS + t % TOKENS];
            }
        }
    }
    free(tile);
    return SQ_OK;
}
