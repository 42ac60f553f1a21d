/* SPDX-License-Identifier: Apache-2.0 */
/* GPTQ's rounding, column by column with error feedback; sq_gptq.c says how. */
#include "core/sq_internal.h"

#include <math.h>
#include <stdatomic.h>

#include "core/sq_threads.h"
#include "kernels/sq_kernels.h"
#include "quantize/sq_gptq_feedback.h"
#include "solve/sq_cholesky.h"

enum { BLOCK = SQ_GPTQ_BLOCK, LANES = SQ_GPTQ_LANES };

/* ---- rounding --------------------------------------------------------------------------- */

struct round_job {
    const struct sq_kernels *kernels;
    struct sq_quantizer q; /* group is a length, never 0 */
    const float *factor, *inv_diagonal;
    const struct sq_gptq_feedback *feedback; /* NULL: in float32 */
    const int32_t *permutation;
    const float *weights;
    int64_t n, k;
    int static_scales; /* all scales are known before the first column */
    int8_t *codes;
    float *scales;
    atomic_int status;
};

/* What SQ_GPTQ_ROWS rows of weights need. Columns are in the factor's order. */
struct round_state {
    const struct round_job *job;
    int64_t first, rows;
    float *values;         /* [rows][k]: weights, and errors e where a column is rounded */
    float *sums;           /* [rows][BLOCK]: T of the block's columns */
    float *updated;        /* [rows][group]: a group's weights as they have become */
    float *solved;         /* what sq_solve_rows() asks for */
    int8_t *scratch_codes; /* [rows][max(group, k if static)] */
    float *group_scales;   /* [rows] */
    struct sq_gptq_lanes *lanes;
    struct sq_gptq_errors errors; /* with feedback */
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
    if (s->job->feedback) {
        sq_gptq_sum_errors(s->job->feedback, &s->errors, (k - end) / BLOCK, begin, width, sums, ld);
        return;
    }
    if (end == k) {
        for (int64_t r = 0; r < s->rows; r++) {
            memset(sums + r * ld, 0, (size_t)width * sizeof *sums);
        }
        return;
    }
    s->job->kernels->gemm_f32(s->rows, width, k - end, s->values + end, k,
                              s->job->factor + end * k + begin, k, sums, ld);
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
    sq_solve_rows(job->factor + begin * (k + 1), k, g, s->updated, g, s->rows, s->solved);
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

/* The scales of columns begin .. end - 1 of count rows from r0 on, 0 where there are no rows. */
static void
load_scales(const struct round_state *s, int64_t r0, int64_t count, int64_t block, int64_t begin,
            int64_t end, struct sq_gptq_lanes *lanes)
{
    const struct round_job *job = s->job;
    const int64_t groups = job->k / job->q.group;
    int64_t last = -1;
    for (int64_t i = begin - block; i < end - block; i++) {
        const int64_t group = job->permutation[block + i] / job->q.group;
        const float *scales = job->scales + (s->first + r0) * groups + group;
        float *to = lanes->scales[i];
        if (group == last) {
            memcpy(to, lanes->scales[i - 1], sizeof lanes->scales[i]);
            continue;
        }
        last = group;
        for (int64_t r = 0; r < LANES; r++) {
            to[r] = r < count ? scales[r * groups] : 0.0f;
        }
    }
}

/* Columns block .. end - 1 of count rows from r0 on, turned: rows become lanes. */
static void
load_lanes(const struct round_state *s, int64_t r0, int64_t count, int64_t block, int64_t end,
           struct sq_gptq_lanes *lanes)
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
            int64_t end, const struct sq_gptq_lanes *lanes)
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
 * their sums, which reach down to column block. */
static void
round_lanes(const struct round_state *s, int64_t r0, int64_t count, int64_t begin, int64_t end,
            int64_t block, struct sq_gptq_lanes *lanes)
{
    const struct round_job *job = s->job;
    const struct sq_gptq_columns columns = {.bits = job->q.bits,
                                            .begin = begin - block,
                                            .end = end - block,
                                            .factor = job->factor + block * (job->k + 1),
                                            .ld = job->k,
                                            .inv_diagonal = job->inv_diagonal + block};
    load_lanes(s, r0, count, block, end, lanes);
    load_scales(s, r0, count, block, begin, end, lanes);
    job->kernels->gptq_columns(&columns, lanes);
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
round_columns(struct round_state *s)
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
        if (job->feedback && block > 0) {
            sq_gptq_code_errors(job->feedback, s->values, (job->k - end) / BLOCK, &s->errors);
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
    const int64_t solved = job->static_scales ? 0 : job->q.group;
    s.solved = sq_alloc((size_t)SQ_SOLVE_SCRATCH(solved, rows) * sizeof(float));
    s.updated = sq_alloc((size_t)(rows * job->q.group) * sizeof(float));
    s.scratch_codes = sq_alloc((size_t)(rows * length));
    s.group_scales = sq_alloc((size_t)rows * sizeof(float));
    s.lanes = sq_alloc(sizeof *s.lanes);
    const int errors = !job->feedback || sq_gptq_make_errors(job->k, rows, &s.errors);
    sq_status status = SQ_ERR_NOMEM;
    const int whole = s.values && s.sums && s.updated && s.solved && s.scratch_codes;
    if (errors && whole && s.group_scales && s.lanes) {
        status = round_rows(&s);
    }
    if (status != SQ_OK) {
        atomic_store(&job->status, status);
    }
    free(s.values);
    free(s.sums);
    free(s.updated);
    free(s.solved);
    free(s.scratch_codes);
    free(s.group_scales);
    free(s.lanes);
    sq_gptq_free_errors(&s.errors);
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

/* Whether all blocks are whole but for the last one. */
static int
has_whole_blocks(const struct round_job *job)
{
    const int64_t group = job->q.group;
    return job->static_scales || group % BLOCK == 0 || BLOCK % group == 0;
}

sq_status
sq_gptq_round(const struct sq_quantizer *q, const float *factor, const int32_t *permutation,
              const struct sq_gptq_feedback *feedback, const float *weights, int64_t n, int64_t k,
              int8_t *codes, float *scales)
{
    if (!q || !factor || !permutation || (n > 0 && (!weights || !codes || !scales))) {
        return SQ_ERR_NULL;
    }
    int64_t count;
    const int64_t group = q->group ? q->group : k;
    if (k < 1 || k > SQ_GPTQ_K_MAX || group < 1 || k % group || !sq_product(n, k, &count) ||
        (feedback && sq_gptq_feedback_k(feedback) != k)) {
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
    if (!sq_all_finite(weights, count) || (!feedback && !sq_all_finite(factor, k * k))) {
        return SQ_ERR_NONFINITE;
    }
    float *inv_diagonal = sq_alloc((size_t)k * sizeof *inv_diagonal);
    if (!inv_diagonal) {
        return SQ_ERR_NOMEM;
    }
    for (int64_t i = 0; i < k; i++) {
        inv_diagonal[i] = 1.0f / factor[i * (k + 1)];
    }
    struct round_job job = {.kernels = sq_kernels_active(),
                            .q = *q,
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
    job.feedback = has_whole_blocks(&job) ? feedback : NULL;
    sq_parallel_for(n, SQ_GPTQ_ROWS, round_chunk, &job);
    free(inv_diagonal);
    return (sq_status)atomic_load(&job.status);
}
