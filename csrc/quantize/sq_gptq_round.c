/* SPDX-License-Identifier: Apache-2.0 */
/* GPTQ's rounding, column by column with error feedback; sq_gptq.c says how. */
#include "core/sq_internal.h"

#include <math.h>
#include <stdatomic.h>

#include "core/sq_blas.h"
#include "core/sq_threads.h"

enum {
    BLOCK = 128, /* columns between two products with all that was rounded before */
    ROWS = 256,  /* rows of weights that go through all columns together */
    LANES = 32,  /* of these, rows whose columns are rounded side by side: their sums fit 16 KiB */
    DELAY = 4    /* columns whose errors reach the block's other columns together */
};

/* ---- rounding --------------------------------------------------------------------------- */

struct round_job {
    struct sq_quantizer q; /* group is a length, never 0 */
    const float *factor, *inv_diagonal;
    const int32_t *permutation;
    const float *weights;
    int64_t n, k;
    int static_scales; /* all scales are known before the first column */
    int8_t *codes;
    float *scales;
    atomic_int status;
};

/* LANES rows side by side: a column's rounding, and what its errors do, are vectors over rows. */
struct lanes {
    float sums[BLOCK][LANES];   /* T of the block's columns */
    float values[BLOCK][LANES]; /* weights, and errors e where a column is rounded */
    int8_t codes[BLOCK][LANES];
};

/* What ROWS rows of weights need. Columns are in the factor's order. */
struct round_state {
    const struct round_job *job;
    int64_t first, rows;
    float *values;         /* [rows][k]: weights, and errors e where a column is rounded */
    float *sums;           /* [rows][BLOCK]: T of the block's columns */
    float *updated;        /* [rows][group]: a group's weights as they have become */
    int8_t *scratch_codes; /* [rows][max(group, k if static)] */
    float *group_scales;   /* [rows] */
    struct lanes *lanes;
};

/* Scales of the state's rows, as sq_quantize finds them for x [rows][length]. */
static sq_status
find_scales(const struct round_state *s, const float *x, int64_t length, float *scales)
{
    return sq_quantize(&s->job->q, x, s->rows, length, s->scratch_codes, scales, NULL);
}

/* T of columns begin .. end - 1 from the errors of all columns behind end. */
static void
sum_errors(const struct round_state *s, int64_t begin, int64_t end, float *sums, int64_t ld)
{
    const int64_t k = s->job->k, width = end - begin;
    if (end == k) {
        for (int64_t r = 0; r < s->rows; r++) {
            memset(sums + r * ld, 0, (size_t)width * sizeof *sums);
        }
        return;
    }
    sq_blas_gemm(0, 0, s->rows, width, k - end, 1.0f, s->values + end, k,
                 s->job->factor + end * k + begin, k, 0.0f, sums, ld);
}

/* Scales of the group of columns begin .. end - 1, none of which is rounded: of W + T L_GG^-1, in
 * stored order (dynamic groups exist in the inputs' own order only, which is reversed here). */
static sq_status
scale_group(const struct round_state *s, int64_t begin, int64_t end, int64_t block)
{
    const struct round_job *job = s->job;
    const int64_t g = end - begin, k = job->k;
    if (block <= begin) {
        for (int64_t r = 0; r < s->rows; r++) {
            memcpy(s->updated + r * g, s->sums + r * BLOCK + begin - block,
                   (size_t)g * sizeof *s->sums);
        }
    }
    else { /* the group is longer than a block */
        sum_errors(s, begin, end, s->updated, g);
    }
    sq_blas_trsm(0, s->rows, g, job->factor + begin * (k + 1), k, s->updated, g);
    for (int64_t r = 0; r < s->rows; r++) {
        float *row = s->updated + r * g;
        const float *values = s->values + r * k + begin;
        for (int64_t i = 0; i < g; i++) {
            row[i] += values[i];
        }
        for (int64_t i = 0; i < g / 2; i++) {
            const float swap = row[i];
            row[i] = row[g - 1 - i];
            row[g - 1 - i] = swap;
        }
    }
    SQ_TRY(find_scales(s, s->updated, g, s->group_scales));
    const int64_t group = (k - end) / g, groups = k / g;
    for (int64_t r = 0; r < s->rows; r++) {
        job->scales[(s->first + r) * groups + group] = s->group_scales[r];
    }
    return SQ_OK;
}

/* Rounds column j, number i of its block, of LANES rows from r0 on (count of them exist) and leaves
 * its errors in place of the weights. A NaN, possible where sums overflow, becomes the lowest code.
 */
static void
round_column(const struct round_state *s, int64_t r0, int64_t count, int64_t j, int64_t i,
             struct lanes *lanes)
{
    const struct round_job *job = s->job;
    const int64_t groups = job->k / job->q.group, input = job->permutation[j];
    const float high = (float)((1 << (job->q.bits - 1)) - 1), low = -high - 1.0f;
    const float rounder = 0x1.8p23f; /* added and taken away, it rounds half to even */
    const float inv_diagonal = job->inv_diagonal[j];
    const float *scales = job->scales + (s->first + r0) * groups + input / job->q.group;
    float scale[LANES] = {0}, *restrict value = lanes->values[i];
    const float *restrict sums = lanes->sums[i];
    for (int64_t r = 0; r < count; r++) {
        scale[r] = scales[r * groups];
    }
    for (int64_t r = 0; r < LANES; r++) {
        const float inv_scale = scale[r] > 0.0f ? 1.0f / scale[r] : 0.0f;
        float code = (value[r] + sums[r] * inv_diagonal) * inv_scale;
        code = code > low ? code : low;
        code = code < high ? code : high;
        code = (code + rounder) - rounder;
        code = scale[r] > 0.0f ? code : 0.0f;
        lanes->codes[i][r] = (int8_t)code;
        value[r] -= scale[r] * code;
    }
}

/* sums [LANES] += errors times l of columns first .. last, the last one first. errors [count]
 * [LANES] go down from the last column, and so does l in steps of ld. */
static void
feed_back(int64_t count, const float *restrict errors, const float *l, int64_t ld,
          float *restrict sums)
{
    if (count == DELAY) {
        for (int64_t r = 0; r < LANES; r++) {
            float sum = sums[r];
            for (int64_t d = 0; d < DELAY; d++) {
                sum += errors[r - d * LANES] * l[-d * ld];
            }
            sums[r] = sum;
        }
        return;
    }
    for (int64_t d = 0; d < count; d++) {
        for (int64_t r = 0; r < LANES; r++) {
            sums[r] += errors[r - d * LANES] * l[-d * ld];
        }
    }
}

/* Columns block .. end - 1 of count rows from r0 on, turned: rows become lanes. */
static void
load_lanes(const struct round_state *s, int64_t r0, int64_t count, int64_t block, int64_t end,
           struct lanes *lanes)
{
    memset(lanes, 0, sizeof *lanes);
    for (int64_t r = 0; r < count; r++) {
        const float *sums = s->sums + (r0 + r) * BLOCK;
        const float *values = s->values + (r0 + r) * s->job->k + block;
        for (int64_t i = 0; i < end - block; i++) {
            lanes->sums[i][r] = sums[i];
            lanes->values[i][r] = values[i];
        }
    }
}

/* What round_lanes changed: sums of columns block .. begin - 1, values and codes of the others. */
static void
store_lanes(const struct round_state *s, int64_t r0, int64_t count, int64_t block, int64_t begin,
            int64_t end, const struct lanes *lanes)
{
    const int64_t k = s->job->k;
    const int32_t *permutation = s->job->permutation;
    for (int64_t r = 0; r < count; r++) {
        float *sums = s->sums + (r0 + r) * BLOCK, *values = s->values + (r0 + r) * k + block;
        int8_t *codes = s->job->codes + (s->first + r0 + r) * k;
        for (int64_t i = 0; i < begin - block; i++) {
            sums[i] = lanes->sums[i][r];
        }
        for (int64_t i = begin - block; i < end - block; i++) {
            values[i] = lanes->values[i][r];
            codes[permutation[block + i]] = lanes->codes[i][r];
        }
    }
}

/* Rounds columns end - 1 down to begin of count rows from r0 on and feeds the errors back into
 * their sums, which reach down to column block: at once into the DELAY columns that come next, into
 * the others together. Every sum gets its terms in the order of the columns all the same. */
static void
round_lanes(const struct round_state *s, int64_t r0, int64_t count, int64_t begin, int64_t end,
            int64_t block, struct lanes *lanes)
{
    const int64_t k = s->job->k;
    const float *factor = s->job->factor;
    load_lanes(s, r0, count, block, end, lanes);
    for (int64_t stop = end, first; stop > begin; stop = first) {
        first = sq_max_i64(begin, stop - DELAY);
        for (int64_t j = stop - 1; j >= first; j--) {
            round_column(s, r0, count, j, j - block, lanes);
            for (int64_t i = first; i < j; i++) {
                feed_back(1, lanes->values[j - block], factor + j * k + i, k,
                          lanes->sums[i - block]);
            }
        }
        for (int64_t i = block; i < first; i++) {
            feed_back(stop - first, lanes->values[stop - 1 - block], factor + (stop - 1) * k + i, k,
                      lanes->sums[i - block]);
        }
    }
    store_lanes(s, r0, count, block, begin, end, lanes);
}

/* First column of the block that ends at end: blocks hold whole groups or lie within one. */
static int64_t
block_begin(const struct round_job *job, int64_t end)
{
    const int64_t group = job->q.group;
    if (job->static_scales) {
        return sq_max_i64(0, end - BLOCK);
    }
    if (group > BLOCK) {
        return sq_max_i64((end - 1) / group * group, end - BLOCK);
    }
    return sq_max_i64(0, end - BLOCK / group * group);
}

static sq_status
round_columns(const struct round_state *s)
{
    const struct round_job *job = s->job;
    for (int64_t end = job->k, block; end > 0; end = block) {
        SQ_TRY(sq_stop_status());
        block = block_begin(job, end);
        sum_errors(s, block, end, s->sums, BLOCK);
        for (int64_t stop = end, begin; stop > block; stop = begin) {
            begin = block;
            if (!job->static_scales) {
                const int64_t group_begin = (stop - 1) / job->q.group * job->q.group;
                begin = sq_max_i64(block, group_begin);
                if (stop % job->q.group == 0) {
                    SQ_TRY(scale_group(s, group_begin, stop, block));
                }
            }
            for (int64_t r = 0; r < s->rows; r += LANES) {
                round_lanes(s, r, sq_min_i64(LANES, s->rows - r), begin, stop, block, s->lanes);
            }
        }
    }
    return SQ_OK;
}

static sq_status
round_rows(struct round_state *s)
{
    const struct round_job *job = s->job;
    const int64_t k = job->k;
    const float *weights = job->weights + s->first * k;
    if (job->static_scales) {
        SQ_TRY(find_scales(s, weights, k, job->scales + s->first * (k / job->q.group)));
    }
    for (int64_t r = 0; r < s->rows; r++) {
        for (int64_t i = 0; i < k; i++) {
            s->values[r * k + i] = weights[r * k + job->permutation[i]];
        }
    }
    return round_columns(s);
}

static void
round_chunk(void *context, int64_t begin, int64_t end, int thread)
{
    struct round_job *job = context;
    (void)thread;
    const int64_t rows = end - begin, length = job->static_scales ? job->k : job->q.group;
    struct round_state s = {.job = job, .first = begin, .rows = rows};
    s.values = sq_alloc((size_t)(rows * job->k) * sizeof(float));
    s.sums = sq_alloc((size_t)(rows * BLOCK) * sizeof(float));
    s.updated = sq_alloc((size_t)(rows * job->q.group) * sizeof(float));
    s.scratch_codes = sq_alloc((size_t)(rows * length));
    s.group_scales = sq_alloc((size_t)rows * sizeof(float));
    s.lanes = sq_alloc(sizeof *s.lanes);
    sq_status status = SQ_ERR_NOMEM;
    if (s.values && s.sums && s.updated && s.scratch_codes && s.group_scales && s.lanes) {
        status = round_rows(&s);
    }
    if (status != SQ_OK) {
        atomic_store(&job->status, status);
    }
    free(s.values);
    free(s.sums);
    free(s.updated);
    free(s.scratch_codes);
    free(s.group_scales);
    free(s.lanes);
}

/* 1 if permutation holds each of 0 .. k - 1 once, 0 if not, -1 without memory; *reversed tells the
 * inputs' own order. */
static int
check_permutation(const int32_t *permutation, int64_t k, int *reversed)
{
    uint8_t *seen = calloc((size_t)k, 1);
    if (!seen) {
        return -1;
    }
    int valid = 1;
    *reversed = 1;
    for (int64_t i = 0; i < k && valid; i++) {
        const int32_t p = permutation[i];
        valid = p >= 0 && p < k && !seen[p];
        if (valid) {
            seen[p] = 1;
        }
        *reversed &= p == k - 1 - i;
    }
    free(seen);
    return valid;
}

sq_status
sq_gptq_round(const struct sq_quantizer *q, const float *factor, const int32_t *permutation,
              const float *weights, int64_t n, int64_t k, int8_t *codes, float *scales)
{
    if (!q || !factor || !permutation || (n > 0 && (!weights || !codes || !scales))) {
        return SQ_ERR_NULL;
    }
    int64_t count;
    const int64_t group = q->group ? q->group : k;
    if (k < 1 || k > SQ_GPTQ_K_MAX || group < 1 || k % group || !sq_product(n, k, &count)) {
        return SQ_ERR_SHAPE;
    }
    int own_order;
    const int valid = check_permutation(permutation, k, &own_order);
    if (valid < 0) {
        return SQ_ERR_NOMEM;
    }
    if (!valid || !sq_weight_bits_valid(q->bits) || !q->symmetric ||
        !sq_gptq_factor_usable(factor, k)) {
        return SQ_ERR_RANGE;
    }
    if (!sq_all_finite(weights, count) || !sq_all_finite(factor, k * k)) {
        return SQ_ERR_NONFINITE;
    }
    float *inv_diagonal = sq_alloc((size_t)k * sizeof *inv_diagonal);
    if (!inv_diagonal) {
        return SQ_ERR_NOMEM;
    }
    for (int64_t i = 0; i < k; i++) {
        inv_diagonal[i] = 1.0f / factor[i * (k + 1)];
    }
    struct round_job job = {.q = *q,
                            .factor = factor,
                            .inv_diagonal = inv_diagonal,
                            .permutation = permutation,
                            .weights = weights,
                            .n = n,
                            .k = k,
                            .static_scales = group == k || !own_order,
                            .codes = codes,
                            .scales = scales};
    job.q.group = group;
    sq_parallel_for(n, ROWS, round_chunk, &job);
    free(inv_diagonal);
    return (sq_status)atomic_load(&job.status);
}
