/* SPDX-License-Identifier: Apache-2.0 */
/* Rotary embedding (arXiv 2104.09864), with the halves of the turned channels as pairs. */
#include "runtime/sq_rotary.h"

#include <math.h>
#include <string.h>

#include "core/sq_internal.h"
#include "core/sq_threads.h"

enum { SINCOS_GRAIN = 256 }; /* pairs of angles in one chunk, about */

struct table_job {
    const struct sq_rotary *rotary;
    const int64_t *position;
    float *table;
};

static void
fill_table(void *context, int64_t begin, int64_t end, int thread)
{
    const struct table_job *j = context;
    const int64_t half = j->rotary->dim / 2;
    (void)thread;
    for (int64_t t = begin; t < end; t++) {
        float *row = j->table + t * half * 2;
        for (int64_t i = 0; i < half; i++) {
            /* The product is rounded to float32 before cos and sin, as the models were trained. */
            const float angle = (float)j->position[t] * j->rotary->inv_freq[i];
            row[2 * i] = (float)cos((double)angle) * j->rotary->scale;
            row[2 * i + 1] = (float)sin((double)angle) * j->rotary->scale;
        }
    }
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
    return SQ_OK;
}

int
sq_rotary_equal(const struct sq_rotary *a, const struct sq_rotary *b)
{
    return a->dim == b->dim && a->scale == b->scale &&
           (a->inv_freq == b->inv_freq ||
            !memcmp(a->inv_freq, b->inv_freq, (size_t)(a->dim / 2) * sizeof *a->inv_freq));
}

void
sq_rotary_table(const struct sq_rotary *r, const int64_t *position, int64_t m, float *table)
{
    if (r->dim) {
        struct table_job j = {.rotary = r, .position = position, .table = table};
        sq_parallel_for(m, sq_max_i64(1, SINCOS_GRAIN / (r->dim / 2)), fill_table, &j);
    }
}

void
sq_rotary_apply(const struct sq_rotary *r, const float *table, float *x, int64_t heads,
                int64_t head_dim)
{
    const int64_t half = r->dim / 2;
    for (int64_t h = 0; h < heads; h++, x += head_dim) {
        for (int64_t i = 0; i < half; i++) {
            const float c = table[2 * i], s = table[2 * i + 1];
            const float first = x[i], second = x[i + half];
            x[i] = first * c - second * s;
            x[i + half] = second * c + first * s;
        }
    }
}
