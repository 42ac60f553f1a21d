/* SPDX-License-Identifier: Apache-2.0 */
/* GPTQ's error feedback in 8 bits.
 *
 * Nearly all of GPTQ's work is the product of the errors of rounded columns with the factor. It
 * decides where a weight is rounded to, and a hundredth of it less exact moves that by far less
 * than a step. So both sides are rounded to 8 bits, a scale for a block of columns, and the packed
 * kernels multiply them. What happens within a block stays in float32. */
#include "quantize/sq_gptq_feedback.h"

#include <math.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "core/sq_internal.h"
#include "core/sq_scratch.h"
#include "core/sq_threads.h"
#include "kernels/sq_kernels.h"

enum {
    BLOCK = SQ_GPTQ_BLOCK,
    RUN = SQ_GPTQ_RUN,
    RUN_BLOCKS = SQ_GPTQ_RUN_BLOCKS,
    LD_RUN = RUN + 16 /* else rows share cache sets */
};

/* The factor below its blocks on the diagonal, turned: an output is a column of it, k are the rows
 * below the column's block. Panel p has the columns that end before k - p * nr; where k is no
 * multiple, the first columns of the last one do not exist. A panel has the runs of the blocks
 * below it, the last one as short as they are. */
struct sq_gptq_feedback {
    const struct sq_kernels *kernels;
    int64_t k;
    uint8_t *panels; /* of panel 0, 1, ..: [runs][nr * length of the run] */
    float *scales;   /* the same: [runs][nr] */
};

static int64_t
panel_count(const struct sq_gptq_feedback *f)
{
    return sq_ceil_div(f->k, f->kernels->nr);
}

/* Blocks below panel p. */
static int64_t
blocks_below(const struct sq_gptq_feedback *f, int64_t p)
{
    return p * f->kernels->nr / BLOCK;
}

/* Blocks of all panels before p. */
static int64_t
first_block(const struct sq_gptq_feedback *f, int64_t p)
{
    const int64_t together = BLOCK / f->kernels->nr, b = p / together;
    return together * b * (b - 1) / 2 + p % together * b;
}

/* Runs of all panels before p: with b blocks below it a panel has ceil(b / RUN_BLOCKS). */
static int64_t
first_run(const struct sq_gptq_feedback *f, int64_t p)
{
    const int64_t together = BLOCK / f->kernels->nr, b = p / together;
    const int64_t whole = (b + RUN_BLOCKS - 1) / RUN_BLOCKS; /* runs of a panel of these */
    const int64_t missing = whole * RUN_BLOCKS - b;
    return together * (RUN_BLOCKS * whole * (whole + 1) / 2 - (missing + 1) * whole) +
           p % together * whole;
}

/* A run of a panel. */
struct run {
    int64_t length; /* columns */
    uint8_t *panel;
    float *scales;
};

static struct run
panel_run(const struct sq_gptq_feedback *f, int64_t p, int64_t r)
{
    const int64_t nr = f->kernels->nr, blocks = blocks_below(f, p) - r * RUN_BLOCKS;
    return (struct run){.length = sq_min_i64(RUN_BLOCKS, blocks) * BLOCK,
                        .panel = f->panels + (first_block(f, p) + r * RUN_BLOCKS) * nr * BLOCK,
                        .scales = f->scales + (first_run(f, p) + r) * nr};
}

struct make_job {
    struct sq_gptq_feedback *f;
    const float *factor;
    atomic_int status;
};

/* rows [nr][LD_RUN] <- run r of panel p, turned; zeros where there are no columns. */
static void
turn_run(const struct make_job *job, int64_t p, int64_t r, int64_t length, float *rows)
{
    const int64_t nr = job->f->kernels->nr, k = job->f->k, column = k - (p + 1) * nr;
    memset(rows, 0, (size_t)(nr * LD_RUN) * sizeof *rows);
    for (int64_t j = 0; j < length; j++) {
        const int64_t block = r * RUN_BLOCKS + j / BLOCK;
        const float *from = job->factor + (k - (block + 1) * BLOCK + j % BLOCK) * k + column;
        for (int64_t i = sq_max_i64(0, -column); i < nr; i++) {
            rows[i * LD_RUN + j] = from[i];
        }
    }
}

static void
make_panels(void *context, int64_t begin, int64_t end, int thread)
{
    struct make_job *job = context;
    const struct sq_gptq_feedback *f = job->f;
    const int64_t nr = f->kernels->nr;
    (void)thread;
    float *rows = sq_thread_scratch((size_t)(nr * LD_RUN) * (sizeof *rows + 1));
    if (!rows) {
        atomic_store(&job->status, SQ_ERR_NOMEM);
        return;
    }
    int8_t *codes = (int8_t *)(rows + nr * LD_RUN);
    for (int64_t p = begin; p < end; p++) {
        for (int64_t r = 0; r * RUN_BLOCKS < blocks_below(f, p) && !sq_stopped(); r++) {
            const struct run run = panel_run(f, p, r);
            turn_run(job, p, r, run.length, rows);
            for (int64_t i = 0; i < nr; i++) {
                const sq_status status =
                    sq_quantize_row(f->kernels, 8, 1.0f, rows + i * LD_RUN, run.length,
                                    codes + i * run.length, run.scales + i);
                if (status != SQ_OK) {
                    atomic_store(&job->status, status);
                    return;
                }
            }
            f->kernels->pack_panel_w8(codes, run.length, run.panel);
        }
    }
}

sq_status
sq_gptq_feedback_make(const float *factor, int64_t k, struct sq_gptq_feedback **out)
{
    if (!factor || !out) {
        return SQ_ERR_NULL;
    }
    if (k < 1 || k > SQ_GPTQ_K_MAX) {
        return SQ_ERR_RANGE;
    }
    for (int64_t j = 0; j < k; j++) { /* the rest is seen when it is rounded */
        const int64_t begin = (k - sq_min_i64(k, ((k - 1 - j) / BLOCK + 1) * BLOCK));
        if (!sq_all_finite(factor + j * k + begin, j + 1 - begin)) {
            return SQ_ERR_NONFINITE;
        }
    }
    struct sq_gptq_feedback *f = calloc(1, sizeof *f);
    if (!f) {
        return SQ_ERR_NOMEM;
    }
    f->kernels = sq_kernels_active();
    f->k = k;
    const int64_t panels = panel_count(f), nr = f->kernels->nr;
    f->panels = sq_alloc((size_t)sq_max_i64(1, first_block(f, panels) * nr * BLOCK));
    f->scales = sq_alloc((size_t)sq_max_i64(1, first_run(f, panels) * nr) * sizeof *f->scales);
    struct make_job job = {.f = f, .factor = factor, .status = SQ_ERR_NOMEM};
    if (f->panels && f->scales) {
        atomic_store(&job.status, SQ_OK);
        sq_parallel_for(panels, BLOCK / nr, make_panels, &job);
    }
    sq_status status = (sq_status)atomic_load(&job.status);
    status = status == SQ_OK ? sq_stop_status() : status;
    if (status != SQ_OK) {
        sq_gptq_feedback_free(f);
        return status;
    }
    *out = f;
    return SQ_OK;
}

void
sq_gptq_feedback_free(struct sq_gptq_feedback *f)
{
    if (f) {
        free(f->panels);
        free(f->scales);
        free(f);
    }
}

int64_t
sq_gptq_feedback_k(const struct sq_gptq_feedback *f)
{
    return f->k;
}

/* ---- errors ------------------------------------------------------------------------------ */

int
sq_gptq_make_errors(int64_t k, int64_t rows, struct sq_gptq_errors *errors)
{
    const int64_t count = sq_ceil_div(k, RUN) * rows;
    errors->rows = rows;
    errors->codes = sq_alloc((size_t)(count * RUN));
    errors->sums = sq_alloc((size_t)(count * SQ_GPTQ_RUN_SUMS) * sizeof *errors->sums);
    errors->scales = sq_alloc((size_t)count * sizeof *errors->scales);
    if (!errors->codes || !errors->sums || !errors->scales) {
        return 0;
    }
    memset(errors->codes, 0, (size_t)(count * RUN));
    return 1;
}

void
sq_gptq_free_errors(struct sq_gptq_errors *errors)
{
    free(errors->codes);
    free(errors->sums);
    free(errors->scales);
}

void
sq_gptq_code_errors(const struct sq_gptq_feedback *f, const float *values, int64_t b,
                    struct sq_gptq_errors *errors)
{
    const int64_t run = b / RUN_BLOCKS, blocks = b % RUN_BLOCKS + 1;
    for (int64_t r = 0; r < errors->rows; r++) {
        const int64_t place = run * errors->rows + r;
        int8_t *codes = errors->codes + place * RUN;
        float row[RUN];
        for (int64_t i = 0; i < blocks; i++) {
            const int64_t column = f->k - (run * RUN_BLOCKS + i + 1) * BLOCK;
            memcpy(row + i * BLOCK, values + r * f->k + column, BLOCK * sizeof *row);
        }
        if (sq_quantize_row(f->kernels, 8, 1.0f, row, blocks * BLOCK, codes,
                            errors->scales + place) != SQ_OK) {
            memset(codes, 0, RUN);
            errors->scales[place] = NAN;
        }
        sq_running_sums(codes, RUN, errors->sums + place * SQ_GPTQ_RUN_SUMS);
    }
}

void
sq_gptq_sum_errors(const struct sq_gptq_feedback *f, const struct sq_gptq_errors *errors,
                   int64_t blocks, int64_t begin, int64_t width, float *sums, int64_t ld)
{
    const int64_t nr = f->kernels->nr, rows = errors->rows, first = f->k - begin - width;
    if (blocks == 0) {
        for (int64_t r = 0; r < rows; r++) {
            memset(sums + r * ld, 0, (size_t)width * sizeof *sums);
        }
        return;
    }
    for (int64_t p = first / nr; p * nr < first + width; p++) {
        const int64_t column = f->k - (p + 1) * nr - begin, missing = sq_max_i64(0, -column);
        _Alignas(SQ_ALIGN_BYTES) float tail[SQ_GPTQ_ROWS * SQ_NR_MAX];
        for (int64_t r = 0; r * RUN_BLOCKS < blocks; r++) {
            const struct run run = panel_run(f, p, r);
            const struct sq_panel_args args = {.m = rows,
                                               .k = run.length,
                                               .g = run.length,
                                               .a = errors->codes + r * rows * RUN,
                                               .ld_a = RUN,
                                               .a_scales = errors->scales + r * rows,
                                               .a_sums = errors->sums + r * rows * SQ_GPTQ_RUN_SUMS,
                                               .ld_sums = SQ_GPTQ_RUN_SUMS,
                                               .panel = run.panel,
                                               .w_scales = run.scales,
                                               .y = missing ? tail : sums + column,
                                               .ld_y = missing ? nr : ld,
                                               .accumulate = r > 0};
            f->kernels->gemm_a8w8(&args);
        }
        for (int64_t r = 0; r < rows && missing; r++) {
            memcpy(sums + r * ld, tail + r * nr + missing, (size_t)(nr - missing) * sizeof *sums);
        }
    }
}
