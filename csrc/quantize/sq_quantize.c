/* SPDX-License-Identifier: Apache-2.0 */
/* Scales and rounding: float32 rows or groups to codes of 4 to 8 bits and back. */
#include "quantize/sq_quantize.h"

#include <float.h>
#include <math.h>
#include <stdatomic.h>
#include <string.h>

#include "core/sq_internal.h"
#include "kernels/sq_kernels.h"
#include "core/sq_threads.h"

/* Elements of one chunk of the parallel loops. */
enum { CHUNK_ELEMENTS = 1 << 16, SEARCH_BATCH = 4 /* ratios that are tried together */ };

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

/* The nearest bfloat16, halves to even, of a finite number below Inf / 2. */
static float
to_bfloat16(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    bits += 0x7fff + (bits >> 16 & 1);
    bits &= 0xffff0000;
    memcpy(&x, &bits, sizeof x);
    return x;
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
    struct grid grid = q->symmetric ? symmetric_grid(min, max, q->bits, clip)
                                    : asymmetric_grid(min, max, q->bits, clip);
    if (q->bfloat16_scales) {
        grid.scale = to_bfloat16(grid.scale);
    }
    return grid;
}

/* The batches of the search in integers; what is past the last ratio repeats it and never wins. */
#define FIXED_INDEX(i) ((i) < SQ_CLIP_RATIOS ? (i) : SQ_CLIP_RATIOS - 1)
#define FIXED_STEP(i) SQ_FIXED_STEP(FIXED_INDEX(i))
#define FIXED_INVERSE(i) SQ_FIXED_INVERSE(FIXED_STEP(i))
#define FOUR(of, i)                                  \
    {                                                \
        of(i), of((i) + 1), of((i) + 2), of((i) + 3) \
    }
#define BATCH(b)                                                \
    {                                                           \
        FOUR(FIXED_STEP, 4 * (b)), FOUR(FIXED_INVERSE, 4 * (b)) \
    }
/* clang-format off */
static const struct sq_fixed_steps batches[] = {
    BATCH(0), BATCH(1), BATCH(2), BATCH(3), BATCH(4), BATCH(5), BATCH(6), BATCH(7), BATCH(8),
    BATCH(9), BATCH(10)};
/* clang-format on */
enum { BATCHES = sizeof batches / sizeof batches[0] };
_Static_assert(SQ_FIXED_BATCH == 4 && BATCHES == (SQ_CLIP_RATIOS + 3) / 4, "every ratio, once");
_Static_assert(SQ_FIXED_PEAK % 350 == 0, "every ratio's step is an integer");

/* Least magnitude whose reciprocal times the peak is far from overflow. */
static const float fixed_least = 1e-30f;

/* What may still be the least of exact errors when `least` is the least of integer ones: rounding
 * to 1 / SQ_FIXED_PEAK moves a ratio's error by less (4e-4 for 32 values, 1e-4 for 4096). */
static int64_t
nearly_least(int64_t least)
{
    return least + (least >> 9);
}

/* indices [count] <- the ratios that may have the least squared error, the largest ratio first.
 * Ratios whose clipped values alone cost more are not tried. */
static int
search_fixed(const struct sq_kernels *kernels, const float *x, int64_t k, float largest, int16_t *u,
             int *indices)
{
    int64_t errors[BATCHES * SQ_FIXED_BATCH], least = INT64_MAX;
    int tried = 0, count = 0;
    kernels->fixed_point(x, k, (float)SQ_FIXED_PEAK / largest, u);
    for (int b = 0; b < BATCHES; b++) {
        struct sq_fixed_errors e;
        kernels->fixed_errors(u, k, &batches[b], &e);
        for (int c = 0; c < SQ_FIXED_BATCH; c++) {
            least = sq_min_i64(least, e.error[c]);
            errors[tried++] = e.error[c];
        }
        if (e.clipped > nearly_least(least)) {
            break;
        }
    }
    for (int i = 0; i < tried && i < SQ_CLIP_RATIOS; i++) {
        if (errors[i] <= nearly_least(least)) {
            indices[count++] = i;
        }
    }
    return count;
}

/* Squared error of the smallest or the largest value, where the grid clips it. All smaller ratios
 * of a symmetric grid clip more. */
static double
clipped_error(const struct grid *grid, float min, float max)
{
    const double below = (double)grid->scale * grid->low - min;
    const double above = max - (double)grid->scale * grid->high;
    const double most = fmax(0.0, fmax(below, above));
    return most * most;
}

/* The grid of least squared error among the ratios, summed in float64; the largest ratio wins ties.
 * With four bits and no clip of their own, sums of integers leave one ratio or a few near ties. */
static struct grid
search_grid(const struct sq_kernels *kernels, const struct sq_quantizer *q, const float *x,
            int64_t k, float min, float max, int16_t *scratch)
{
    const float largest = fmaxf(-min, max);
    int indices[SQ_CLIP_RATIOS], candidates = SQ_CLIP_RATIOS;
    if (q->bits == 4 && q->symmetric && q->clip == 1.0f && largest > fixed_least) {
        candidates = search_fixed(kernels, x, k, largest, scratch, indices);
        if (candidates == 1) {
            return make_grid(q, min, max, SQ_CLIP_RATIO(indices[0]));
        }
    }
    else {
        for (int i = 0; i < candidates; i++) {
            indices[i] = i;
        }
    }
    struct grid best = make_grid(q, min, max, q->clip);
    double least = INFINITY;
    for (int first = 0; first < candidates; first += SEARCH_BATCH) {
        const int count = (int)sq_min_i64(SEARCH_BATCH, candidates - first);
        struct grid grids[SEARCH_BATCH];
        struct sq_step steps[SEARCH_BATCH];
        double errors[SEARCH_BATCH];
        int usable = 0;
        for (; usable < count; usable++) {
            const float clip = q->clip * SQ_CLIP_RATIO(indices[first + usable]);
            const struct grid grid = make_grid(q, min, max, clip);
            if (grid.scale == 0.0f) { /* and so are all that follow */
                break;
            }
            grids[usable] = grid;
            steps[usable] = (struct sq_step){grid.scale, (float)grid.low, (float)grid.high};
        }
        if (usable == 0 || (q->symmetric && 0.999 * clipped_error(&grids[0], min, max) > least)) {
            break;
        }
        kernels->quantize_errors(x, k, steps, usable, errors);
        for (int i = 0; i < usable; i++) {
            if (errors[i] < least) {
                least = errors[i];
                best = grids[i];
            }
        }
    }
    return best;
}

static void
write_codes(const struct sq_kernels *kernels, const struct grid *grid, const float *x, int64_t k,
            int offset, int8_t *codes)
{
    if (grid->scale == 0.0f) {
        memset(codes, offset, (size_t)k);
        return;
    }
    kernels->quantize_codes(x, k, 1.0f / grid->scale, (float)grid->low, (float)grid->high,
                            grid->zero + offset, codes);
}

sq_status
sq_quantizer_check(const struct sq_quantizer *q, int64_t k)
{
    if (!sq_weight_bits_valid(q->bits) || !(q->clip > 0.0f && q->clip <= 1.0f) ||
        (q->bfloat16_scales && !q->symmetric)) {
        return SQ_ERR_RANGE;
    }
    return k < 1 || q->group < 0 || (q->group && k % q->group) ? SQ_ERR_SHAPE : SQ_OK;
}

int64_t
sq_quantize_scratch(int64_t k)
{
    return sq_round_up(k, SQ_FIXED_ALIGN);
}

int
sq_quantize_group(const struct sq_kernels *kernels, const struct sq_quantizer *q, const float *x,
                  int64_t k, int offset, int16_t *scratch, int8_t *codes, float *scale,
                  int32_t *zero)
{
    float min, max;
    if (!kernels->extremes(x, k, &min, &max)) {
        return 0;
    }
    const struct grid grid = q->search ? search_grid(kernels, q, x, k, min, max, scratch)
                                       : make_grid(q, min, max, q->clip);
    write_codes(kernels, &grid, x, k, offset, codes);
    *scale = grid.scale;
    *zero = grid.zero;
    return 1;
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
    write_codes(kernels, &grid, x, k, 0, codes);
    *scale = grid.scale;
    return SQ_OK;
}

void
sq_running_sums(const int8_t *codes, int64_t length, int32_t *sums)
{
    int32_t total = 0;
    for (int64_t b = 0; b < length / SQ_K_ALIGN; b++) {
        sums[b] = total;
        int32_t sum = 0;
        for (int64_t j = 0; j < SQ_K_ALIGN; j++) {
            sum += codes[b * SQ_K_ALIGN + j];
        }
        total += sum;
    }
    sums[length / SQ_K_ALIGN] = total;
}

struct quantize_job {
    const struct sq_kernels *kernels;
    const struct sq_quantizer *q;
    const float *x;
    int64_t k, group;
    int8_t *codes;
    float *scales;
    int32_t *zeros;
    atomic_int status;
};

/* Items are groups: row i / (k / g), all of one length, so that x and codes are flat. */
static void
quantize_groups(void *context, int64_t begin, int64_t end, int thread)
{
    struct quantize_job *job = context;
    (void)thread;
    int16_t *scratch = sq_alloc((size_t)sq_quantize_scratch(job->group) * sizeof *scratch);
    sq_status status = scratch ? SQ_OK : SQ_ERR_NOMEM;
    for (int64_t i = begin; i < end && status == SQ_OK; i++) {
        const int64_t first = i * job->group;
        int32_t zero;
        if (!sq_quantize_group(job->kernels, job->q, job->x + first, job->group, 0, scratch,
                               job->codes + first, job->scales + i, &zero)) {
            status = SQ_ERR_NONFINITE;
        }
        else if (!job->q->symmetric) {
            job->zeros[i] = zero;
        }
    }
    if (status != SQ_OK) {
        atomic_store(&job->status, (int)status);
    }
    free(scratch);
}

sq_status
sq_quantize(const struct sq_quantizer *q, const float *x, int64_t m, int64_t k, int8_t *codes,
            float *scales, int32_t *zeros)
{
    if (!q || (!q->symmetric && !zeros)) {
        return SQ_ERR_NULL;
    }
    SQ_TRY(sq_quantizer_check(q, k));
    const int64_t group = q->group ? q->group : k;
    int64_t count;
    if (!sq_product(m, k, &count)) {
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
    return (sq_status)atomic_load(&job.status);
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
