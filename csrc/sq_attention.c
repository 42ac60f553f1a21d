/* SPDX-License-Identifier: Apache-2.0 */
/* Rotary embedding, the key and value cache, and blocked causal attention with grouped queries. */
#include "sq_attention.h"

#include <math.h>
#include <stdatomic.h>
#include <string.h>

#include "sq_kernels.h"
#include "sq_threads.h"

/* ---- rotary embedding ------------------------------------------------------------------- */

enum {
    SINCOS_GRAIN = 256, /* pairs of angles in one chunk, about */
    STORE_TOKENS = 64,  /* tokens whose keys are transposed together: 64 * 128 floats fit in L1 */
};

struct rotary_job {
    const struct sq_architecture *a;
    const float *table;
    float *table_out;
    float *q, *k;
    const float *v;
    const int32_t *sequence;
    const int64_t *position;
    struct sq_kv_cache *cache;
};

static void
fill_table(void *context, int64_t begin, int64_t end, int thread)
{
    const struct rotary_job *j = context;
    const int64_t half = j->a->head_dim / 2;
    (void)thread;
    for (int64_t t = begin; t < end; t++) {
        float *row = j->table_out + t * half * 2;
        for (int64_t i = 0; i < half; i++) {
            /* The product is rounded to float32 before cos and sin, as the models were trained. */
            const float angle = (float)j->position[t] * j->a->inv_freq[i];
            row[2 * i] = (float)cos((double)angle) * j->a->rope_scale;
            row[2 * i + 1] = (float)sin((double)angle) * j->a->rope_scale;
        }
    }
}

void
sq_rotary_table(const struct sq_architecture *a, const int64_t *position, int64_t m, float *table)
{
    struct rotary_job j = {.a = a, .position = position, .table_out = table};
    sq_parallel_for(m, sq_max_i64(1, SINCOS_GRAIN / (a->head_dim / 2)), fill_table, &j);
}

/* Pairs are (i, i + d / 2): the first half of a head against the second. */
static void
rotate_heads(float *x, int64_t heads, int64_t d, const float *table)
{
    const int64_t half = d / 2;
    for (int64_t h = 0; h < heads; h++, x += d) {
        for (int64_t i = 0; i < half; i++) {
            const float c = table[2 * i], s = table[2 * i + 1];
            const float first = x[i], second = x[i + half];
            x[i] = first * c - second * s;
            x[i + half] = second * c + first * s;
        }
    }
}

/* One block of tokens: rotate, then store values by rows and keys transposed. */
static void
store_block(const struct rotary_job *j, int64_t begin, int64_t end)
{
    const struct sq_architecture *a = j->a;
    const int64_t d = a->head_dim, kv = a->kv_heads, capacity = j->cache->capacity;
    for (int64_t t = begin; t < end; t++) {
        const float *table = j->table + t * d;
        rotate_heads(j->q + t * a->heads * d, a->heads, d, table);
        rotate_heads(j->k + t * kv * d, kv, d, table);
        for (int64_t h = 0; h < kv; h++) {
            memcpy(j->cache->values + ((j->sequence[t] * kv + h) * capacity + j->position[t]) * d,
                   j->v + (t * kv + h) * d, (size_t)d * sizeof(float));
        }
    }
    for (int64_t i = 0; i < kv * d; i++) {
        for (int64_t t = begin; t < end; t++) {
            j->cache->keys[(j->sequence[t] * kv * d + i) * capacity + j->position[t]] =
                j->k[t * kv * d + i];
        }
    }
}

static void
store_range(void *context, int64_t begin, int64_t end, int thread)
{
    (void)thread;
    store_block(context, begin, end);
}

void
sq_rotate_and_store(const struct sq_architecture *a, const float *table, float *q, float *k,
                    const float *v, const int32_t *sequence, const int64_t *position, int64_t m,
                    struct sq_kv_cache *cache)
{
    struct rotary_job j = {.a = a,
                           .table = table,
                           .q = q,
                           .k = k,
                           .v = v,
                           .sequence = sequence,
                           .position = position,
                           .cache = cache};
    sq_parallel_for(m, STORE_TOKENS, store_range, &j);
}

/* ---- attention -----------------------------------------------------------------------------
 * An item is (block of consecutive tokens of one sequence, kv head): its rows are the block's
 * tokens times the query heads that share the kv head. scores = Q K^T and out = P V go through
 * gemm_f32, whose elements are chains over the inner index in ascending order. Keys past a token's
 * position (or before its window) get probability 0, and a term 0 * v does not change a chain for
 * finite v (where one is not, each token is done again over its own keys); hence a token's output
 * does not depend on which tokens share its block, nor on how a prompt is cut. */

enum {
    ROWS_PER_BLOCK = 32,
    SCORE_ALIGN = SQ_ALIGN_BYTES / (int)sizeof(float),
};

struct token_block {
    int64_t begin, end;
};

struct attention_job {
    const struct sq_kernels *kernels;
    const struct sq_architecture *a;
    const struct sq_kv_cache *cache;
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
tokens_per_block(const struct sq_architecture *a)
{
    return sq_max_i64(1, ROWS_PER_BLOCK * a->kv_heads / a->heads);
}

static int64_t
lane_count(const struct sq_architecture *a, int64_t m)
{
    return sq_min_i64(SQ_ATTENTION_LANES, sq_max_i64(1, m * a->kv_heads));
}

/* Row length of the scores; one line more than needed keeps rows off a power of two's stride. */
static int64_t
score_stride(int64_t columns)
{
    return sq_round_up(columns, SCORE_ALIGN) + SCORE_ALIGN;
}

/* A lane holds queries [rows][d], outputs [rows][d] and scores [rows][capacity]. */
static int64_t
lane_floats(const struct sq_architecture *a, int64_t m, int64_t capacity)
{
    const int64_t rows = sq_min_i64(tokens_per_block(a), m) * (a->heads / a->kv_heads);
    return sq_round_up(rows * (2 * a->head_dim + score_stride(capacity)), SCORE_ALIGN);
}

static size_t
blocks_bytes(int64_t m)
{
    return sq_align_bytes((size_t)m * sizeof(struct token_block));
}

size_t
sq_attention_workspace_bytes(const struct sq_architecture *a, int64_t m, int64_t capacity)
{
    return blocks_bytes(m) +
           (size_t)(lane_count(a, m) * lane_floats(a, m, capacity)) * sizeof(float);
}

/* Cuts the tokens where the sequence changes and after tokens_per_block. Returns the number. */
static int64_t
cut_blocks(const struct sq_architecture *a, const int32_t *sequence, int64_t m,
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
window_start(const struct sq_architecture *a, int64_t position)
{
    return a->sliding_window ? sq_max_i64(0, position - a->sliding_window + 1) : 0;
}

/* scores [group][ld]: softmax over the keys this token sees, zeros on the other columns. */
static void
normalise_scores(const struct attention_job *j, float *scores, int64_t ld, int64_t position,
                 int64_t first, int64_t columns)
{
    const int64_t group = j->a->heads / j->a->kv_heads;
    const int64_t start = window_start(j->a, position) - first;
    const float scale = (float)(1.0 / sqrt((double)j->a->head_dim));
    for (int64_t g = 0; g < group; g++) {
        float *row = scores + g * ld;
        memset(row, 0, (size_t)start * sizeof *row);
        j->kernels->softmax_row(row + start, position - first - start + 1, columns - start, scale);
    }
}

static void
attend(const struct attention_job *j, const struct token_block *block, int64_t kv_head,
       float *scratch)
{
    const struct sq_architecture *a = j->a;
    const int64_t d = a->head_dim, group = a->heads / a->kv_heads,
                  tokens = block->end - block->begin;
    const int64_t rows = tokens * group, capacity = j->cache->capacity;
    const int64_t slot = j->sequence[block->begin] * a->kv_heads + kv_head;
    float *queries = scratch, *out = queries + rows * d, *scores = out + rows * d;
    float *q = j->q + block->begin * a->heads * d + kv_head * group * d;

    int64_t first = INT64_MAX, last = 0; /* keys that some token of the block sees */
    for (int64_t t = 0; t < tokens; t++) {
        const int64_t position = j->position[block->begin + t];
        first = sq_min_i64(first, window_start(a, position));
        last = sq_max_i64(last, position);
        memcpy(queries + t * group * d, q + t * a->heads * d, (size_t)(group * d) * sizeof *q);
    }
    const int64_t columns = last - first + 1, ld = score_stride(columns);
    const float *keys = j->cache->keys + slot * d * capacity + first;
    const float *values = j->cache->values + (slot * capacity + first) * d;

    j->kernels->gemm_f32(rows, columns, d, queries, d, keys, capacity, scores, ld);
    for (int64_t t = 0; t < tokens; t++) {
        normalise_scores(j, scores + t * group * ld, ld, j->position[block->begin + t], first,
                         columns);
    }
    j->kernels->gemm_f32(rows, d, columns, scores, ld, values, d, out, d);
    if (tokens > 1 && !sq_all_finite(out, rows * d)) { /* 0 * Inf somewhere */
        for (int64_t t = 0; t < tokens; t++) {
            const int64_t position = j->position[block->begin + t];
            const int64_t start = window_start(a, position) - first;
            j->kernels->gemm_f32(group, d, position - first - start + 1,
                                 scores + t * group * ld + start, ld, values + start * d, d,
                                 out + t * group * d, d);
        }
    }
    for (int64_t t = 0; t < tokens; t++) {
        memcpy(q + t * a->heads * d, out + t * group * d, (size_t)(group * d) * sizeof *q);
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
            if (item >= j->items) {
                break;
            }
            attend(j, &j->blocks[item / j->a->kv_heads], item % j->a->kv_heads,
                   j->scratch + lane * j->lane_floats);
        }
    }
}

void
sq_attention(const struct sq_architecture *a, const struct sq_kv_cache *cache,
             const int32_t *sequence, const int64_t *position, int64_t m, float *q, void *workspace)
{
    struct attention_job j = {.kernels = sq_kernels_active(),
                              .a = a,
                              .cache = cache,
                              .sequence = sequence,
                              .position = position,
                              .q = q,
                              .blocks = workspace,
                              .scratch = (float *)(void *)((char *)workspace + blocks_bytes(m)),
                              .lane_floats = lane_floats(a, m, cache->capacity)};
    j.items = cut_blocks(a, sequence, m, j.blocks) * a->kv_heads;
    sq_parallel_for(lane_count(a, m), 1, attend_lanes, &j);
}
