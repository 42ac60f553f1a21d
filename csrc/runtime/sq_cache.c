/* SPDX-License-Identifier: Apache-2.0 */
/* The KV cache: pages taken and given back, and what is noted of the keys and values in them.
 *
 * A page is SQ_PAGE_TOKENS positions of one sequence in one layer, block by block of a kv head: an
 * item of attention reads one block after the other. sq_cache_block.c tells what a block holds. */
#include "runtime/sq_cache.h"

#include <math.h>
#include <stdatomic.h>
#include <string.h>

#include "core/sq_huge.h"
#include "core/sq_internal.h"
#include "kernels/sq_kernels.h"
#include "runtime/sq_cache_block.h"

enum { TOKENS = SQ_PAGE_TOKENS };
#define MAX_SEQUENCES INT32_MAX
#define MAX_CAPACITY ((int64_t)1 << 31)
#define MAX_HEAD_DIM ((int64_t)1 << 24)

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
    struct sq_block_form form;
    float *hadamard_t;         /* owned, [head_dim][head_dim], transposed; NULL: fast, or none */
    int64_t page_bytes;        /* of the blocks of all heads */
    struct page_table *tables; /* owned, [layers][sequences] */
    struct free_page *pool;    /* owned */
    int64_t pooled, used;
    _Atomic int64_t bytes, clamped;
    _Atomic float largest;
};

/* ---- making it -------------------------------------------------------------------------- */

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
    c->shape.bfloat16 = shape->bfloat16 && shape->bits < 32;
    c->form = sq_block_form(shape->bits, c->shape.bfloat16, shape->head_dim);
    const int fits = sq_product(c->form.bytes, shape->kv_heads, &c->page_bytes) &&
                     c->page_bytes <= INT64_MAX / 2;
    sq_status status = fits ? make_hadamard(c) : SQ_ERR_NOMEM;
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
        sq_huge_free(page, (size_t)c->page_bytes);
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
            sq_huge_free(cache->tables[i].pages[page], (size_t)cache->page_bytes);
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

float
sq_kv_cache_largest(const sq_kv_cache_t *cache)
{
    return atomic_load(&((sq_kv_cache_t *)cache)->largest);
}

int64_t
sq_kv_cache_clamped(const sq_kv_cache_t *cache)
{
    return atomic_load(&((sq_kv_cache_t *)cache)->clamped);
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
            if (with_pages && !sq_stopped()) {
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
        struct free_page *page = sq_huge_alloc((size_t)c->page_bytes);
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
    return status == SQ_OK ? sq_stop_status() : status;
}

/* Pages 0 .. last - 1 of a table, as far as there are such, go to the pool. */
static void
pool_pages(sq_kv_cache_t *c, struct page_table *table, int64_t last)
{
    for (int64_t i = 0; i < sq_min_i64(last, table->count); i++) {
        struct free_page *page = (struct free_page *)(void *)table->pages[i];
        if (page) {
            page->next = c->pool;
            c->pool = page;
            c->pooled++;
            c->used--;
            table->pages[i] = NULL;
        }
    }
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
        pool_pages(cache, table, table->count);
        free(table->pages);
        *table = (struct page_table){0, NULL};
    }
    empty_pool(cache, cache->used);
    return SQ_OK;
}

sq_status
sq_kv_cache_forget(sq_kv_cache_t *cache, int64_t layer, int64_t sequence, int64_t position)
{
    if (!cache) {
        return SQ_ERR_NULL;
    }
    if (layer < 0 || layer >= cache->shape.layers || sequence < 0 ||
        sequence >= cache->shape.sequences || position < 0) {
        return SQ_ERR_RANGE;
    }
    pool_pages(cache, table_of(cache, layer, sequence), position / TOKENS);
    empty_pool(cache, cache->used);
    return SQ_OK;
}

uint8_t *
sq_cache_block(const sq_kv_cache_t *cache, int64_t layer, int64_t sequence, int64_t page,
               int64_t head)
{
    const struct page_table *table = table_of(cache, layer, sequence);
    uint8_t *begin = page < table->count ? table->pages[page] : NULL;
    return begin ? begin + head * cache->form.bytes : NULL;
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

/* ---- storing and reading ---------------------------------------------------------------- */

/* A maximum and a sum do not depend on the order in which threads come. Almost no call writes. */
static void
note(sq_kv_cache_t *c, struct sq_block_watch seen)
{
    float largest = atomic_load_explicit(&c->largest, memory_order_relaxed);
    while (seen.largest > largest &&
           !atomic_compare_exchange_weak(&c->largest, &largest, seen.largest)) {
    }
    if (seen.clamped) {
        atomic_fetch_add(&c->clamped, seen.clamped);
    }
}

void
sq_cache_store(sq_kv_cache_t *cache, const struct sq_kernels *kernels, uint8_t *block, int64_t slot,
               const float *key, const float *value)
{
    note(cache, sq_block_store(&cache->form, kernels, block, slot, key, value));
}

const float *
sq_cache_keys(const sq_kv_cache_t *cache, const struct sq_kernels *kernels, const uint8_t *block,
              float *tile)
{
    return sq_block_keys(&cache->form, kernels, block, tile);
}

const uint16_t *
sq_cache_half_keys(const sq_kv_cache_t *cache, const uint8_t *block)
{
    return cache->form.bits == 16 ? (const uint16_t *)(const void *)block : NULL;
}

const uint16_t *
sq_cache_half_values(const sq_kv_cache_t *cache, const uint8_t *block)
{
    const int has = block && cache->form.bits == 16;
    return has ? (const uint16_t *)(const void *)(block + cache->form.values) : NULL;
}

const float *
sq_cache_values(const sq_kv_cache_t *cache, const struct sq_kernels *kernels, const uint8_t *block,
                int64_t from, int64_t count, float *tile)
{
    return sq_block_values(&cache->form, kernels, block, from, count, tile);
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
    for (int64_t t = 0; t < count && !sq_stopped(); t++) {
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
