/* SPDX-License-Identifier: Apache-2.0 */
/* Rotary embedding (arXiv 2104.09864) of halves or of neighbours, with the frequencies of long
 * sequences. */
#include "runtime/sq_rotary.h"

#include <math.h>
#include <string.h>

#include "core/sq_internal.h"
#include "core/sq_threads.h"

enum { SINCOS_GRAIN = 256 }; /* pairs of angles in one chunk, about */

/* ---- lengths of sequences --------------------------------------------------------------- */

/* Tokens sorted by (sequence, position): bisection finds the last of a sequence. Both are below
 * 2^31. */
static int64_t
key_of(int64_t sequence, int64_t position)
{
    return sequence * ((int64_t)1 << 32) + position;
}

static int
compare_keys(const void *a, const void *b)
{
    const int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
    return (x > y) - (x < y);
}

/* keys [m], sorted. */
static void
sort_tokens(const struct sq_tokens *tokens, int64_t *keys)
{
    for (int64_t t = 0; t < tokens->m; t++) {
        keys[t] = key_of(tokens->sequence[t], tokens->position[t]);
    }
    qsort(keys, (size_t)tokens->m, sizeof *keys, compare_keys);
}

/* One more than the largest position of the sequence, which has a token among keys [m]. */
static int64_t
length_of(const int64_t *keys, int64_t m, int64_t sequence)
{
    int64_t first = 0, last = m - 1; /* the answer is among them */
    while (first < last) {
        const int64_t middle = last - (last - first) / 2;
        if (keys[middle] < key_of(sequence + 1, 0)) {
            first = middle;
        }
        else {
            last = middle - 1;
        }
    }
    return keys[first] - key_of(sequence, 0) + 1;
}

/* ---- the table -------------------------------------------------------------------------- */

struct table_job {
    const struct sq_rotary *rotary;
    const struct sq_tokens *tokens;
    const int64_t *keys; /* NULL: no sequence is longer than `original` */
    float *table;
};

static double
theta_of_length(const struct sq_rotary *r, int64_t length)
{
    const double s = r->dynamic, dim = (double)r->dim;
    const double growth = s * (double)length / (double)r->original - (s - 1.0);
    return r->theta * pow(growth, dim / (dim - 2.0));
}

static void
fill_table(void *context, int64_t begin, int64_t end, int thread)
{
    const struct table_job *j = context;
    const struct sq_rotary *r = j->rotary;
    const int64_t half = r->dim / 2;
    (void)thread;
    for (int64_t t = begin; t < end; t++) {
        const int64_t length =
            j->keys ? length_of(j->keys, j->tokens->m, j->tokens->sequence[t]) : 0;
        const int is_long = j->keys && length > r->original;
        const float *inv_freq = is_long && r->long_inv_freq ? r->long_inv_freq : r->inv_freq;
        const double theta = is_long && r->dynamic > 0 ? theta_of_length(r, length) : 0.0;
        float *row = j->table + t * r->dim;
        for (int64_t i = 0; i < half; i++) {
            const float frequency =
                theta > 0 ? (float)pow(theta, -2.0 * (double)i / (double)r->dim) : inv_freq[i];
            /* The product is rounded to float32 before cos and sin, as the models were trained. */
            const float angle = (float)j->tokens->position[t] * frequency;
            row[2 * i] = (float)cos((double)angle) * r->scale;
            row[2 * i + 1] = (float)sin((double)angle) * r->scale;
        }
    }
}

static int
depends_on_length(const struct sq_rotary *r)
{
    return r->long_inv_freq || r->dynamic > 0;
}

static size_t
rows_bytes(const struct sq_rotary *r, int64_t m)
{
    return sq_align_bytes((size_t)m * (size_t)r->dim * sizeof(float));
}

size_t
sq_rotary_table_bytes(const struct sq_rotary *r, int64_t m)
{
    return rows_bytes(r, m) + (depends_on_length(r) ? (size_t)m * sizeof(int64_t) : 0);
}

void
sq_rotary_table(const struct sq_rotary *r, const struct sq_tokens *tokens, float *table)
{
    struct table_job j = {.rotary = r, .tokens = tokens, .table = table};
    if (r->dim == 0) {
        return;
    }
    if (depends_on_length(r) && tokens->length > r->original) {
        int64_t *keys = (int64_t *)(void *)((char *)table + rows_bytes(r, tokens->m));
        sort_tokens(tokens, keys);
        j.keys = keys;
    }
    sq_parallel_for(tokens->m, sq_max_i64(1, SINCOS_GRAIN / (r->dim / 2)), fill_table, &j);
}

/* Whether vectors of frequencies are alike. */
static int
same(const float *a, const float *b, int64_t count)
{
    return a == b || (a && b && !memcmp(a, b, (size_t)count * sizeof *a));
}

int
sq_rotary_equal(const struct sq_rotary *a, const struct sq_rotary *b)
{
    return a->dim == b->dim && a->scale == b->scale && a->dynamic == b->dynamic &&
           a->theta == b->theta && a->original == b->original &&
           same(a->inv_freq, b->inv_freq, a->dim / 2) &&
           same(a->long_inv_freq, b->long_inv_freq, a->dim / 2);
}

/* ---- sealing and applying --------------------------------------------------------------- */

/* What long sequences need. */
static sq_status
seal_long(const struct sq_rotary *r, struct sq_fault *fault)
{
    if (!(r->dynamic >= 0 && r->dynamic < INFINITY)) {
        return sq_refuse(fault, SQ_ERR_RANGE, -1,
                         "attention.rotary: dynamic: expected at least 0, got %g",
                         (double)r->dynamic);
    }
    if (!depends_on_length(r)) {
        return SQ_OK;
    }
    if (r->long_inv_freq && r->dynamic > 0) {
        return sq_refuse(fault, SQ_ERR_RANGE, -1,
                         "attention.rotary: expected long_inv_freq or dynamic, got both");
    }
    if (r->dynamic > 0 && !(r->theta > 0 && r->theta < INFINITY)) {
        return sq_refuse(fault, SQ_ERR_RANGE, -1,
                         "attention.rotary: theta: expected more than 0, got %g", (double)r->theta);
    }
    if (r->dynamic > 0 && r->dim < 4) {
        return sq_refuse(fault, SQ_ERR_SHAPE, -1,
                         "attention.rotary: dynamic: expected at least 2 frequencies, got %lld",
                         (long long)(r->dim / 2));
    }
    return sq_expect_range(fault, "attention.rotary: original", r->original, 1, INT32_MAX);
}

sq_status
sq_rotary_seal(const struct sq_rotary *r, int64_t head_dim, struct sq_fault *fault)
{
    if (r->dim == 0) {
        return SQ_OK;
    }
    if (r->dim < 0 || r->dim % 2 || r->dim > head_dim) {
        return sq_refuse(fault, SQ_ERR_SHAPE, -1,
                         "attention.rotary: expected at most head_dim / 2 = %lld frequencies, got "
                         "%lld",
                         (long long)(head_dim / 2), (long long)(r->dim / 2));
    }
    if (!r->inv_freq) {
        return sq_refuse(fault, SQ_ERR_NULL, -1, "attention.rotary: expected frequencies");
    }
    if (!(r->scale >= 0 && r->scale < INFINITY)) {
        return sq_refuse(fault, SQ_ERR_RANGE, -1,
                         "attention.rotary: scale: expected at least 0, got %g", (double)r->scale);
    }
    SQ_TRY(sq_expect_range(fault, "attention.rotary: interleaved", r->interleaved, 0, 1));
    return seal_long(r, fault);
}

/* Two loops, so that the usual one vectorizes. */
static void
turn_halves(const float *table, int64_t half, float *x)
{
    for (int64_t i = 0; i < half; i++) {
        const float c = table[2 * i], s = table[2 * i + 1];
        const float first = x[i], second = x[i + half];
        x[i] = first * c - second * s;
        x[i + half] = second * c + first * s;
    }
}

static void
turn_neighbours(const float *table, int64_t half, float *x)
{
    for (int64_t i = 0; i < half; i++) {
        const float c = table[2 * i], s = table[2 * i + 1];
        const float first = x[2 * i], second = x[2 * i + 1];
        x[2 * i] = first * c - second * s;
        x[2 * i + 1] = second * c + first * s;
    }
}

void
sq_rotary_apply(const struct sq_rotary *r, const float *table, float *x, int64_t heads,
                int64_t head_dim)
{
    for (int64_t h = 0; h < heads; h++) {
        if (r->interleaved) {
            turn_neighbours(table, r->dim / 2, x + h * head_dim);
        }
        else {
            turn_halves(table, r->dim / 2, x + h * head_dim);
        }
    }
}
