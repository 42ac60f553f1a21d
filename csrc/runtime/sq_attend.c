/* SPDX-License-Identifier: Apache-2.0 */
/* Blocked causal attention with grouped queries over the pages of a cache. */
#include "runtime/sq_attend.h"

#include <stdatomic.h>
#include <string.h>

#include "core/sq_internal.h"
#include "core/sq_threads.h"
#include "kernels/sq_kernels.h"

/* An item is (block of consecutive tokens of one sequence, kv head): its rows are the block's
 * tokens times the query heads that share the kv head, and for all of them a page's keys and values
 * are made float32 once. scores = Q K^T and out = P V go through gemm_f32, page by page, whose
 * elements are chains over the inner index in ascending order; the pages' parts of out are added in
 * ascending order. Pages start at fixed positions. Keys past a token's position (or before its
 * window) get probability 0, and a term 0 * v changes neither a chain nor a sum for finite v (where
 * one is not, each token is done again over its own keys); hence a token's output does not depend
 * on which tokens share its block, nor on how a prompt is cut. */

enum {
    ROWS_PER_BLOCK = 32,
    HALF_PAGE_ROWS = 8, /* more rows are faster with a page that is float32 */
    SCORE_ALIGN = SQ_ALIGN_BYTES / (int)sizeof(float),
};

struct token_block {
    int64_t begin, end;
};

struct attention_job {
    const struct sq_kernels *kernels;
    const struct sq_attention *a;
    const sq_kv_cache_t *cache;
    int64_t layer;
    const int32_t *sequence;
    const int64_t *position;
    float *q;
    struct token_block *blocks;
    int64_t items;
    float *scratch; /* [lanes][lane_floats] */
    int64_t lane_floats;
    _Atomic int64_t next;
};

static int64_t
tokens_per_block(const struct sq_attention *a)
{
    return sq_max_i64(1, ROWS_PER_BLOCK * a->kv_heads / a->heads);
}

static int64_t
lane_count(const struct sq_attention *a, int64_t m)
{
    return sq_min_i64(SQ_ATTENTION_LANES, sq_max_i64(1, m * a->kv_heads));
}

/* Row length of the scores; one line more than needed keeps rows off a power of two's stride. */
static int64_t
score_stride(int64_t columns)
{
    return sq_round_up(columns, SCORE_ALIGN) + SCORE_ALIGN;
}

/* A lane holds a page's tile [SQ_PAGE_TOKENS][d], queries, outputs and a page's part of them
 * [rows][d], and scores [rows][length]. */
static int64_t
lane_floats(const struct sq_attention *a, int64_t m, int64_t length)
{
    const int64_t rows = sq_min_i64(tokens_per_block(a), m) * (a->heads / a->kv_heads);
    return SQ_PAGE_TOKENS * a->head_dim +
           sq_round_up(rows * (3 * a->head_dim + score_stride(length + SQ_PAGE_TOKENS)),
                       SCORE_ALIGN);
}

static size_t
blocks_bytes(int64_t m)
{
    return sq_align_bytes((size_t)m * sizeof(struct token_block));
}

size_t
sq_attend_bytes(const struct sq_attention *a, int64_t m, int64_t length)
{
    return blocks_bytes(m) + (size_t)(lane_count(a, m) * lane_floats(a, m, length)) * sizeof(float);
}

/* Cuts the tokens where the sequence changes and after tokens_per_block. Returns the number. */
static int64_t
cut_blocks(const struct sq_attention *a, const int32_t *sequence, int64_t m,
           struct token_block *blocks)
{
    const int64_t limit = tokens_per_block(a);
    int64_t count = 0;
    for (int64_t begin = 0; begin < m;) {
        int64_t end = begin + 1;
        while (end < m && end - begin < limit && sequence[end] == sequence[begin]) {
            end++;
        }
        blocks[count].begin = begin;
        blocks[count++].end = end;
        begin = end;
    }
    return count;
}

static int64_t
window_start(const struct sq_attention *a, int64_t position)
{
    return a->window ? sq_max_i64(0, position - a->window + 1) : 0;
}

/* One item at work: columns of scores are positions from first_page * SQ_PAGE_TOKENS on. */
struct item {
    int32_t sequence;
    int64_t kv_head, rows, first_page;
    int64_t ld; /* of scores */
    float *tile, *queries, *out, *part, *scores;
};

/* To the nearest bfloat16, ties to even; x is finite. */
static float
bfloat16(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    bits = (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000u;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* tanh x within 4e-7 of it, most of which is rounding: Lambert's continued fraction for half of
 * x, t = tanh(x / 2), and tanh x = 2 t / (1 + t^2) are off by 2e-8 at most up to 9.5, from where on
 * tanh is 1 in float32. No calls, so that loops vectorize. NaN stays. */
static ALWAYS_INLINE float
hyperbolic_tangent(float x)
{
    const float y = 0.5f * (x > 9.5f ? 9.5f : x < -9.5f ? -9.5f : x), s = y * y;
    const float top = y * (135135.0f + s * (17325.0f + s * (378.0f + s)));
    const float t = top / (135135.0f + s * (62370.0f + s * (3150.0f + s * 28.0f)));
    return 2.0f * t / (1.0f + t * t);
}

/* What a head does to its scores x [n] before the softmax, scale included. x [i] belongs to the key
 * n - 1 - i positions before the query, which stands at position. */
static void
shape_scores(const struct sq_attention *a, int64_t head, int64_t position, int64_t n, float *x)
{
    const float scale = a->scale, cap = a->softcap, slope = a->slopes ? a->slopes[head] : 0.0f;
    for (int64_t i = 0; i < n; i++) {
        x[i] *= scale;
    }
    for (int64_t i = 0; cap > 0 && i < n; i++) {
        x[i] = cap * hyperbolic_tangent(x[i] / cap);
    }
    if (a->slopes_bfloat16) {
        for (int64_t i = 0; i < n; i++) {
            const float key = bfloat16((float)(position - (n - 1) + i));
            x[i] += scale * bfloat16(bfloat16(slope) * key);
        }
        return;
    }
    const int32_t last = (int32_t)(n - 1); /* positions are below 2^31; the last key gets 0 */
    for (int32_t i = 0; a->slopes && i < last; i++) {
        x[i] += slope * (float)(i - last);
    }
}

/* x [n_padded] <- probabilities of a head's n keys, zeros behind them. x [n] exists even where n is
 * n_padded: a row of scores is longer than its columns. */
static void
soften(const struct attention_job *j, int64_t head, int64_t position, int64_t n, int64_t n_padded,
       float *x)
{
    const struct sq_attention *a = j->a;
    if (!a->sinks && !a->slopes && !(a->softcap > 0)) {
        j->kernels->softmax_row(x, n, n_padded, a->scale);
        return;
    }
    shape_scores(a, head, position, n, x);
    if (a->sinks) {
        x[n] = a->sinks[head]; /* one more key, whose value is 0 */
        j->kernels->softmax_row(x, n + 1, sq_max_i64(n + 1, n_padded), 1.0f);
        x[n] = 0;
    }
    else {
        j->kernels->softmax_row(x, n, n_padded, 1.0f);
    }
    /* Slopes leave far keys probabilities that are subnormal, on which products take ten times as
     * long. */
    for (int64_t i = 0; a->slopes && i < n; i++) {
        x[i] = x[i] < 0x1p-100f ? 0.0f : x[i];
    }
}

/* scores [group][ld]: softmax over the keys this token sees, zeros on the other columns. */
static void
normalise_scores(const struct attention_job *j, const struct item *i, float *scores,
                 int64_t position, int64_t columns)
{
    const int64_t group = j->a->heads / j->a->kv_heads, base = i->first_page * SQ_PAGE_TOKENS;
    const int64_t start = window_start(j->a, position) - base;
    for (int64_t g = 0; g < group; g++) {
        float *row = scores + g * i->ld;
        memset(row, 0, (size_t)start * sizeof *row);
        soften(j, i->kv_head * group + g, position, position - base - start + 1, columns - start,
               row + start);
    }
}

static const uint8_t *
block_of(const struct attention_job *j, const struct item *i, int64_t page)
{
    return sq_cache_block(j->cache, j->layer, i->sequence, page, i->kv_head);
}

/* Whether so few rows meet a page of 16-bit floats that it is widened in registers. */
static int
reads_halves(const struct attention_job *j, int64_t rows, int64_t columns)
{
    return j->kernels->gemm_page && rows <= HALF_PAGE_ROWS && columns % SCORE_ALIGN == 0;
}

/* Where a page of 16-bit floats lies that will be read: the keys that an item begins with. NULL
 * where there is no such item. A guess is enough. */
static const uint16_t *
first_keys(const struct attention_job *j, int64_t item)
{
    if (item >= j->items) {
        return NULL;
    }
    const struct token_block *block = &j->blocks[item / j->a->kv_heads];
    const int64_t page = window_start(j->a, j->position[block->begin]) / SQ_PAGE_TOKENS;
    return sq_cache_half_keys(
        j->cache,
        sq_cache_block(j->cache, j->layer, j->sequence[block->begin], page, item % j->a->kv_heads));
}

/* scores [rows][ld] of columns positions from the first page on. A page's row of keys is read in
 * whole vectors; what that adds to the last page's columns is masked later. */
static void
score_pages(const struct attention_job *j, const struct item *i, int64_t columns)
{
    const int64_t d = j->a->head_dim;
    for (int64_t c = 0; c < columns; c += SQ_PAGE_TOKENS) {
        const int64_t page = i->first_page + c / SQ_PAGE_TOKENS;
        const int64_t n = sq_min_i64(SQ_PAGE_TOKENS, sq_round_up(columns - c, SCORE_ALIGN));
        const uint8_t *block = block_of(j, i, page);
        const uint16_t *halves = sq_cache_half_keys(j->cache, block);
        if (halves && reads_halves(j, i->rows, n)) {
            const int is_last = c + SQ_PAGE_TOKENS >= columns;
            const struct sq_page_args args = {
                .is_bf16 = sq_kv_cache_shape(j->cache)->bfloat16,
                .m = i->rows,
                .n = n,
                .k = d,
                .a = i->queries,
                .ld_a = d,
                .b = halves,
                .ld_b = SQ_PAGE_TOKENS,
                .c = i->scores + c,
                .ld_c = i->ld,
                .next = is_last ? sq_cache_half_values(j->cache, block_of(j, i, i->first_page))
                                : sq_cache_half_keys(j->cache, block_of(j, i, page + 1))};
            j->kernels->gemm_page(&args);
            continue;
        }
        const float *keys = sq_cache_keys(j->cache, j->kernels, block, i->tile);
        j->kernels->gemm_f32(i->rows, n, d, i->queries, d, keys, SQ_PAGE_TOKENS, i->scores + c,
                             i->ld);
    }
}

/* out [rows][d], of rows first_row on, <- probabilities times the values at first .. last. */
static void
mix_pages(const struct attention_job *j, const struct item *i, int64_t first_row, int64_t rows,
          int64_t first, int64_t last)
{
    const int64_t d = j->a->head_dim, base = i->first_page * SQ_PAGE_TOKENS;
    float *out = i->out + first_row * d;
    memset(out, 0, (size_t)(rows * d) * sizeof *out);
    for (int64_t from = first; from <= last;) {
        const int64_t page = from / SQ_PAGE_TOKENS;
        const int64_t to = sq_min_i64(last + 1, (page + 1) * SQ_PAGE_TOKENS);
        const int64_t slot = from % SQ_PAGE_TOKENS;
        const float *shares = i->scores + first_row * i->ld + from - base;
        const uint8_t *block = block_of(j, i, page);
        const uint16_t *halves = sq_cache_half_values(j->cache, block);
        if (halves && reads_halves(j, rows, d)) {
            const struct sq_page_args args = {
                .is_bf16 = sq_kv_cache_shape(j->cache)->bfloat16,
                .m = rows,
                .n = d,
                .k = to - from,
                .a = shares,
                .ld_a = i->ld,
                .b = halves + slot * d,
                .ld_b = d,
                .c = i->part,
                .ld_c = d,
                .next = to > last ? first_keys(j, atomic_load(&j->next))
                                  : sq_cache_half_values(j->cache, block_of(j, i, page + 1))};
            j->kernels->gemm_page(&args);
        }
        else {
            const float *values =
                sq_cache_values(j->cache, j->kernels, block, slot, to - from, i->tile);
            j->kernels->gemm_f32(rows, d, to - from, shares, i->ld, values, d, i->part, d);
        }
        for (int64_t e = 0; e < rows * d; e++) {
            out[e] += i->part[e];
        }
        from = to;
    }
}

static struct item
lay_out_item(const struct attention_job *j, const struct token_block *block, int64_t kv_head,
             int64_t first, int64_t last, float *scratch)
{
    const struct sq_attention *a = j->a;
    struct item i = {.sequence = j->sequence[block->begin],
                     .kv_head = kv_head,
                     .rows = (block->end - block->begin) * (a->heads / a->kv_heads),
                     .first_page = first / SQ_PAGE_TOKENS};
    i.ld = score_stride(last - i.first_page * SQ_PAGE_TOKENS + 1);
    i.tile = scratch;
    i.queries = i.tile + SQ_PAGE_TOKENS * a->head_dim;
    i.out = i.queries + i.rows * a->head_dim;
    i.part = i.out + i.rows * a->head_dim;
    i.scores = i.part + i.rows * a->head_dim;
    return i;
}

static void
attend(const struct attention_job *j, const struct token_block *block, int64_t kv_head,
       float *scratch)
{
    const struct sq_attention *a = j->a;
    const int64_t d = a->head_dim, group = a->heads / a->kv_heads,
                  tokens = block->end - block->begin;
    const int64_t *position = j->position + block->begin;
    float *q = j->q + block->begin * a->heads * d + kv_head * group * d;

    int64_t first = INT64_MAX, last = 0; /* keys that some token of the block sees */
    for (int64_t t = 0; t < tokens; t++) {
        first = sq_min_i64(first, window_start(a, position[t]));
        last = sq_max_i64(last, position[t]);
    }
    const struct item i = lay_out_item(j, block, kv_head, first, last, scratch);
    for (int64_t t = 0; t < tokens; t++) {
        memcpy(i.queries + t * group * d, q + t * a->heads * d, (size_t)(group * d) * sizeof *q);
    }
    const int64_t columns = last - i.first_page * SQ_PAGE_TOKENS + 1;
    score_pages(j, &i, columns);
    for (int64_t t = 0; t < tokens; t++) {
        normalise_scores(j, &i, i.scores + t * group * i.ld, position[t], columns);
    }
    mix_pages(j, &i, 0, i.rows, first, last);
    if (tokens > 1 && !sq_all_finite(i.out, i.rows * d)) { /* 0 * Inf somewhere */
        for (int64_t t = 0; t < tokens; t++) {
            mix_pages(j, &i, t * group, group, window_start(a, position[t]), position[t]);
        }
    }
    for (int64_t t = 0; t < tokens; t++) {
        memcpy(q + t * a->heads * d, i.out + t * group * d, (size_t)(group * d) * sizeof *q);
    }
}

static void
attend_lanes(void *context, int64_t begin, int64_t end, int thread)
{
    struct attention_job *j = context;
    (void)thread;
    for (int64_t lane = begin; lane < end; lane++) {
        for (;;) {
            const int64_t item = atomic_fetch_add(&j->next, 1);
            if (item >= j->items || sq_stopped()) {
                break;
            }
            attend(j, &j->blocks[item / j->a->kv_heads], item % j->a->kv_heads,
                   j->scratch + lane * j->lane_floats);
        }
    }
}

void
sq_attend(const struct sq_attention *a, const struct sq_tokens *tokens, const sq_kv_cache_t *cache,
          int64_t layer, float *q, void *workspace)
{
    const int64_t m = tokens->m;
    struct attention_job j = {.kernels = sq_kernels_active(),
                              .a = a,
                              .cache = cache,
                              .layer = layer,
                              .sequence = tokens->sequence,
                              .position = tokens->position,
                              .q = q,
                              .blocks = workspace,
                              .scratch = (float *)(void *)((char *)workspace + blocks_bytes(m)),
                              .lane_floats = lane_floats(a, m, tokens->length)};
    j.items = cut_blocks(a, tokens->sequence, m, j.blocks) * a->kv_heads;
    sq_parallel_for(lane_count(a, m), 1, attend_lanes, &j);
}
