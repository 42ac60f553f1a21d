/* SPDX-License-Identifier: Apache-2.0 */
/* Scales and rounding: float32 rows or groups to 4- and 8-bit codes and back. */
#include "sq_internal.h"

#include <float.h>
#include <math.h>
#include <stdatomic.h>
#include <string.h>

#include "sq_kernels.h"
#include "sq_threads.h"

/* Elements of one chunk of the parallel loops. */
enum { CHUNK_ELEMENTS = 1 << 16 };

/* A grid: x = scale * (code - zero), code - zero in [low, high]. scale 0: all codes are zero. */
struct grid {
    float scale;
    int zero, low, high;
};

/* inv_scale must be finite: a scale below the smallest normal number is taken as 0. (1 / FLT_MIN is
 * 2^126, and Inf products, possible with a tiny clip, are clamped before they are converted.) */
static float
usable_scale(float scale)
{
    return scale < FLT_MIN ? 0.0f : scale;
}

static struct grid
symmetric_grid(float min, float max, int bits, float clip)
{
    const int half = 1 << (bits - 1);
    const float largest = fmaxf(-min, max);
    return (struct grid){
        .scale = usable_scale(clip * largest / (float)(half - 1)), .low = -half, .high = half - 1};
}

/* In float64, where hi - lo cannot overflow. lo <= 0 <= hi keeps zero in [0, levels]. */
static struct grid
asymmetric_grid(float min, float max, int bits, float clip)
{
    const int levels = (1 << bits) - 1;
    const double lo = fminf(min, 0.0f), hi = fmaxf(max, 0.0f);
    struct grid grid = {.scale = usable_scale((float)(clip * (hi - lo) / levels))};
    if (grid.scale > 0.0f) {
        const double zero = rint(-clip * lo / grid.scale);
        grid.zero = (int)fmin(fmax(zero, 0.0), levels);
    }
    grid.low = -grid.zero;
    grid.high = levels - grid.zero;
    return grid;
}

static struct grid
make_grid(const struct sq_quantizer *q, float min, float max, float clip)
{
    return q->symmetric ? symmetric_grid(min, max, q->bits, clip)
                        : asymmetric_grid(min, max, q->bits, clip);
}

/* The grid of least squared error among the ratios; the largest ratio wins ties. */
static struct grid
search_grid(const struct sq_kernels *kernels, const struct sq_quantizer *q, const float *x,
            int64_t k, float min, float max)
{
    struct grid grids[SQ_CLIP_RATIOS];
    struct sq_step steps[SQ_CLIP_RATIOS];
    double errors[SQ_CLIP_RATIOS];
    int count = 0;
    while (count < SQ_CLIP_RATIOS) {
        const struct grid grid = make_grid(q, min, max, q->clip * SQ_CLIP_RATIO(count));
        if (grid.scale == 0.0f) { /* and so are all that follow */
            break;
        }
        grids[count] = grid;
        steps[count++] = (struct sq_step){grid.scale, (float)grid.low, (float)grid.high};
    }
    if (count == 0) {
        return make_grid(q, min, max, q->clip);
    }
    kernels->quantize_errors(x, k, steps, count, errors);
    int best = 0;
    for (int i = 1; i < count; i++) {
        best = errors[i] < errors[best] ? i : best;
    }
    return grids[best];
}

static void
write_codes(const struct sq_kernels *kernels, const struct grid *grid, const float *x, int64_t k,
            int8_t *codes)
{
    if (grid->scale == 0.0f) {
        memset(codes, 0, (size_t)k);
        return;
    }
    kernels->quantize_codes(x, k, 1.0f / grid->scale, (float)grid->low, (float)grid->high,
                            grid->zero, codes);
}

sq_status
sq_quantize_row(const struct sq_kernels *kernels, int bits, float clip, const float *x, int64_t k,
                int8_t *codes, float *scale)
{
    if (!kernels || !x || !codes || !scale) {
        return SQ_ERR_NULL;
    }
    if (k < 1) {
        return SQ_ERR_SHAPE;
    }
    if ((bits != 4 && bits != 8) || !(clip > 0.0f && clip <= 1.0f)) {
        return SQ_ERR_RANGE;
    }
    float min, max;
    if (!kernels->extremes(x, k, &min, &max)) {
        return SQ_ERR_NONFINITE;
    }
    const struct grid grid = symmetric_grid(min, max, bits, clip);
    write_codes(kernels, &grid, x, k, codes);
    *scale = grid.scale;
    return SQ_OK;
}

struct quantize_job {
    const struct sq_kernels *kernels;
    const struct sq_quantizer *q;
    const float *x;
    int64_t k, group;
    int8_t *codes;
    float *scales;
    int32_t *zeros;
    atomic_int nonfinite;
};

/* Items are groups: row i / (k / g), all of one length, so that x and codes are flat. */
static void
quantize_groups(void *context, int64_t begin, int64_t end, int thread)
{
    struct quantize_job *job = context;
    (void)thread;
    for (int64_t i = begin; i < end; i++) {
        const float *x = job->x + i * job->group;
        float min, max;
        if (!job->kernels->extremes(x, job->group, &min, &max)) {
            atomic_store(&job->nonfinite, 1);
            return;
        }
        const struct grid grid = job->q->search
                                     ? search_grid(job->kernels, job->q, x, job->group, min, max)
                                     : make_grid(job->q, min, max, job->q->clip);
        write_codes(job->kernels, &grid, x, job->group, job->codes + i * job->group);
        job->scales[i] = grid.scale;
        if (!job->q->symmetric) {
            job->zeros[i] = grid.zero;
        }
    }
}

sq_status
sq_quantize(const struct sq_quantizer *q, const float *x, int64_t m, int64_t k, int8_t *codes,
            float *scales, int32_t *zeros)
{
    if (!q || (!q->symmetric && !zeros)) {
        return SQ_ERR_NULL;
    }
    if ((q->bits != 4 && q->bits != 8) || !(q->clip > 0.0f && q->clip <= 1.0f)) {
        return SQ_ERR_RANGE;
    }
    const int64_t group = q->group ? q->group : k;
    int64_t count;
    if (k < 1 || group < 1 || k % group || !sq_product(m, k, &count)) {
        return SQ_ERR_SHAPE;
    }
    if (count && (!x || !codes || !scales)) {
        return SQ_ERR_NULL;
    }
    struct quantize_job job = {.kernels = sq_kernels_active(),
                               .q = q,
                               .x = x,
                               .k = k,
                               .group = group,
                               .codes = codes,
                               .scales = scales,
                               .zeros = zeros};
    sq_parallel_for(count / group, sq_max_i64(1, CHUNK_ELEMENTS / group), quantize_groups, &job);
    return atomic_load(&job.nonfinite) ? SQ_ERR_NONFINITE : SQ_OK;
}

struct dequantize_job {
    const int8_t *codes;
    const float *scales;
    const int32_t *zeros;
    int64_t group;
    float *x;
};

static void
dequantize_groups(void *context, int64_t begin, int64_t end, int thread)
{
    const struct dequantize_job *job = context;
    (void)thread;
    for (int64_t i = begin; i < end; i++) {
        const int8_t *codes = job->codes + i * job->group;
        float *x = job->x + i * job->group;
        for (int64_t j = 0; j < job->group; j++) {
            const int32_t step = job->zeros ? (uint8_t)codes[j] - job->zeros[i] : codes[j];
            x[j] = job->scales[i] * (float)step;
        }
    }
}

sq_status
sq_dequantize(const int8_t *codes, const float *scales, const int32_t *zeros, int64_t m, int64_t k,
              int64_t groups, float *x)
{
    int64_t count;
    if (k < 1 || groups < 1 || k % groups || !sq_product(m, k, &count)) {
        return SQ_ERR_SHAPE;
    }
    if (count && (!codes || !scales || !x)) {
        return SQ_ERR_NULL;
    }
    for (int64_t i = 0; zeros && i < m * groups; i++) { /* no overflow below */
        if (zeros[i] < 0 || zeros[i] > 255) {
            return SQ_ERR_RANGE;
        }
    }
    struct dequantize_job job = {
        .codes = codes, .scales = scales, .zeros = zeros, .group = k / groups, .x = x};
    sq_parallel_for(m * groups, sq_max_i64(1, CHUNK_ELEMENTS / job.group), dequantize_groups, &job);
    return SQ_OK;
}
