/* SPDX-License-Identifier: Apache-2.0 */
/* Streaming extremes and sums of squares of one site's inputs, the Gram matrix of an axis of them,
 * and the columns of weights.
 *
 * Every sum is one sequential chain over tokens (and, for a Gram entry, over the other axis within
 * a token), in float64. Work is split over channels and over rows of the Gram matrix, never over
 * tokens: results do not depend on the number of threads, nor on how a sequence of tokens is cut
 * into updates. */
#include <math.h>
#include <stdatomic.h>
#include <string.h>

#include "core/sq_internal.h"
#include "kernels/sq_kernels.h"
#include "core/sq_threads.h"

/* A Gram matrix is made in tiles of 4 x 4 (8 vector registers of two doubles). */
#define SQ_GRAM_TILE 4
/* Elements of one block of tokens: its packed copy in float64 stays in a 1 MiB L2 cache. */
#define SQ_GRAM_BLOCK 49152
#define SQ_CHANNEL_GRAIN 256

static sq_status
check_sizes(const struct sq_statistics *s)
{
    int64_t bytes;
    if (!s || !s->min || !s->max || !s->sum2) {
        return SQ_ERR_NULL;
    }
    if (s->k < 1 || s->count < 0 || !sq_product(s->k, sizeof(double), &bytes)) {
        return SQ_ERR_RANGE;
    }
    return SQ_OK;
}

sq_status
sq_statistics_reset(struct sq_statistics *s)
{
    if (s) {
        s->count = 0;
    }
    SQ_TRY(check_sizes(s));
    double *const channels[] = {s->min, s->max, s->sum2};
    for (size_t i = 0; i < sizeof channels / sizeof channels[0]; i++) {
        memset(channels[i], 0, (size_t)s->k * sizeof(double));
    }
    return SQ_OK;
}

struct update_job {
    const struct sq_statistics *s;
    const float *x; /* [m][k] */
    int64_t m;
};

/* Extremes and sums of squares of channels begin .. end - 1. The square of the largest float,
 * 2^256, leaves room for 2^768 of them. */
static void
update_channels(void *context, int64_t begin, int64_t end, int thread)
{
    const struct update_job *job = context;
    const struct sq_statistics *s = job->s;
    (void)thread;
    double *restrict min = s->min, *restrict max = s->max, *restrict sum2 = s->sum2;
    if (s->count == 0) {
        for (int64_t c = begin; c < end; c++) {
            min[c] = max[c] = (double)job->x[c];
        }
    }
    for (int64_t t = 0; t < job->m; t++) {
        const float *restrict row = job->x + t * s->k;
        for (int64_t c = begin; c < end; c++) {
            const double v = (double)row[c];
            min[c] = v < min[c] ? v : min[c];
            max[c] = v > max[c] ? v : max[c];
            sum2[c] += v * v;
        }
    }
}

sq_status
sq_statistics_update(struct sq_statistics *s, const float *x, int64_t m)
{
    int64_t count;
    SQ_TRY(check_sizes(s));
    if (!x) {
        return SQ_ERR_NULL;
    }
    if (m < 0 || !sq_product(m, s->k, &count) || m > INT64_MAX - s->count) {
        return SQ_ERR_RANGE;
    }
    if (m == 0) {
        return SQ_OK;
    }
    if (!sq_all_finite(x, count)) {
        return SQ_ERR_NONFINITE;
    }
    struct update_job job = {s, x, m};
    sq_parallel_for(s->k, SQ_CHANNEL_GRAIN, update_channels, &job);
    s->count += m;
    return SQ_OK;
}

sq_status
sq_statistics_merge(struct sq_statistics *dst, const struct sq_statistics *src)
{
    SQ_TRY(check_sizes(dst));
    SQ_TRY(check_sizes(src));
    if (dst->k != src->k) {
        return SQ_ERR_SHAPE;
    }
    if (src->count > INT64_MAX - dst->count) {
        return SQ_ERR_RANGE;
    }
    if (src->count == 0) {
        return SQ_OK;
    }
    for (int64_t c = 0; c < dst->k; c++) {
        const int empty = dst->count == 0;
        dst->min[c] = empty || src->min[c] < dst->min[c] ? src->min[c] : dst->min[c];
        dst->max[c] = empty || src->max[c] > dst->max[c] ? src->max[c] : dst->max[c];
        dst->sum2[c] += src->sum2[c];
    }
    dst->count += src->count;
    return SQ_OK;
}

/* ---- the Gram matrix of an axis --------------------------------------------------------- */

struct gram_job {
    const float *x; /* [tokens][k1 * k2] */
    int64_t tokens, k1, k2;
    double *panels; /* packed block: panels of SQ_GRAM_TILE columns of X^T, [rows][tile] each */
    double *gram;   /* [k1][k1] */
};

/* Panel p holds indices p * SQ_GRAM_TILE and following of the axis: one row for each token and
 * index of the other axis. Indices past the last are zero. */
static void
pack_panels(void *context, int64_t begin, int64_t end, int thread)
{
    const struct gram_job *job = context;
    (void)thread;
    for (int64_t p = begin; p < end; p++) {
        const int64_t first = p * SQ_GRAM_TILE;
        const int64_t valid = sq_min_i64(SQ_GRAM_TILE, job->k1 - first);
        double *out = job->panels + p * job->tokens * job->k2 * SQ_GRAM_TILE;
        for (int64_t t = 0; t < job->tokens; t++) {
            const float *token = job->x + (t * job->k1 + first) * job->k2;
            for (int64_t r = 0; r < job->k2; r++, out += SQ_GRAM_TILE) {
                for (int64_t c = 0; c < SQ_GRAM_TILE; c++) {
                    out[c] = c < valid ? (double)token[c * job->k2 + r] : 0.0;
                }
            }
        }
    }
}

/* g [tile][tile] += sum over rows of a[row] b[row]^T, one chain per element. */
static void
gram_tile(const double *restrict a, const double *restrict b, int64_t rows,
          double g[SQ_GRAM_TILE][SQ_GRAM_TILE])
{
    double sum[SQ_GRAM_TILE][SQ_GRAM_TILE];
    memcpy(sum, g, sizeof sum);
    for (int64_t r = 0; r < rows; r++, a += SQ_GRAM_TILE, b += SQ_GRAM_TILE) {
        for (int i = 0; i < SQ_GRAM_TILE; i++) {
            for (int j = 0; j < SQ_GRAM_TILE; j++) {
                sum[i][j] += a[i] * b[j];
            }
        }
    }
    memcpy(g, sum, sizeof sum);
}

/* Rows of the panels begin .. end - 1 of the Gram matrix, from the diagonal on. */
static void
update_gram(void *context, int64_t begin, int64_t end, int thread)
{
    const struct gram_job *job = context;
    const int64_t n = job->k1, rows = job->tokens * job->k2, panel_size = rows * SQ_GRAM_TILE;
    (void)thread;
    for (int64_t i0 = begin * SQ_GRAM_TILE; i0 < sq_min_i64(end * SQ_GRAM_TILE, n);
         i0 += SQ_GRAM_TILE) {
        const double *panel = job->panels + i0 / SQ_GRAM_TILE * panel_size;
        for (int64_t j0 = i0; j0 < n; j0 += SQ_GRAM_TILE) {
            const int64_t ni = sq_min_i64(SQ_GRAM_TILE, n - i0);
            const int64_t nj = sq_min_i64(SQ_GRAM_TILE, n - j0);
            double tile[SQ_GRAM_TILE][SQ_GRAM_TILE] = {{0}};
            for (int64_t i = 0; i < ni; i++) {
                memcpy(tile[i], job->gram + (i0 + i) * n + j0, (size_t)nj * sizeof(double));
            }
            gram_tile(panel, job->panels + j0 / SQ_GRAM_TILE * panel_size, rows, tile);
            for (int64_t i = 0; i < ni; i++) {
                memcpy(job->gram + (i0 + i) * n + j0, tile[i], (size_t)nj * sizeof(double));
            }
        }
    }
}

sq_status
sq_axis_gram(const float *x, int64_t m, int64_t k1, int64_t k2, double *gram)
{
    int64_t k, count, square, bytes;
    if (!x || !gram) {
        return SQ_ERR_NULL;
    }
    if (m < 0 || k1 < 1 || k2 < 1 || !sq_product(k1, k2, &k) || !sq_product(m, k, &count) ||
        !sq_product(k1, k1, &square) || !sq_product(square, sizeof(double), &bytes) ||
        k > INT64_MAX / (4 * SQ_GRAM_TILE * (int64_t)sizeof(double))) {
        return SQ_ERR_RANGE;
    }
    if (!sq_all_finite(x, count)) {
        return SQ_ERR_NONFINITE;
    }
    memset(gram, 0, (size_t)bytes);
    const int64_t panels = sq_ceil_div(k1, SQ_GRAM_TILE);
    const int64_t block = sq_max_i64(1, sq_min_i64(m, SQ_GRAM_BLOCK / k));
    struct gram_job job = {.k1 = k1, .k2 = k2, .gram = gram};
    job.panels = sq_alloc((size_t)(panels * SQ_GRAM_TILE * block * k2) * sizeof *job.panels);
    if (!job.panels) {
        return SQ_ERR_NOMEM;
    }
    for (int64_t t = 0; t < m && !sq_stopped(); t += block) {
        job.x = x + t * k;
        job.tokens = sq_min_i64(block, m - t);
        sq_parallel_for(panels, 4, pack_panels, &job);
        sq_parallel_for(panels, 1, update_gram, &job);
    }
    for (int64_t i = 0; i < k1 && !sq_stopped(); i++) {
        for (int64_t j = 0; j < i; j++) {
            gram[i * k1 + j] = gram[j * k1 + i];
        }
    }
    free(job.panels);
    return SQ_OK;
}

/* ---- columns of weights ----------------------------------------------------------------- */

enum { COLUMN_CHUNK = 1024 }; /* columns of one task: their sums stay in the first-level cache */

struct columns_job {
    const struct sq_kernels *kernels;
    sq_dtype dtype;
    const void *w;
    int64_t n, k;
    double *max_abs, *sum2;
    atomic_int nonfinite;
};

/* count elements of w from `at` on in float32; NULL if one is NaN or Inf. */
static const float *
widened(const struct columns_job *job, int64_t at, int64_t count, float *buffer)
{
    if (job->dtype == SQ_F32) {
        const float *x = (const float *)job->w + at;
        return sq_all_finite(x, count) ? x : NULL;
    }
    const uint16_t *x = (const uint16_t *)job->w + at;
    const int finite = job->dtype == SQ_F16 ? job->kernels->f16_to_f32(x, count, buffer)
                                            : job->kernels->bf16_to_f32(x, count, buffer);
    return finite ? buffer : NULL;
}

static void
column_chunks(void *context, int64_t begin, int64_t end, int thread)
{
    struct columns_job *job = context;
    (void)thread;
    for (int64_t chunk = begin; chunk < end; chunk++) {
        const int64_t first = chunk * COLUMN_CHUNK;
        const int64_t count = sq_min_i64(COLUMN_CHUNK, job->k - first);
        double *max_abs = job->max_abs + first, *sum2 = job->sum2 + first;
        float buffer[COLUMN_CHUNK];
        memset(max_abs, 0, (size_t)count * sizeof(double));
        memset(sum2, 0, (size_t)count * sizeof(double));
        for (int64_t row = 0; row < job->n; row++) {
            const float *x = widened(job, row * job->k + first, count, buffer);
            if (!x) {
                atomic_store(&job->nonfinite, 1);
                return;
            }
            for (int64_t c = 0; c < count; c++) {
                const double v = fabs((double)x[c]);
                max_abs[c] = v > max_abs[c] ? v : max_abs[c];
                sum2[c] += v * v;
            }
        }
    }
}

sq_status
sq_column_moments(sq_dtype dtype, const void *w, int64_t n, int64_t k, double *max_abs,
                  double *sum2)
{
    int64_t count;
    if (!w || !max_abs || !sum2) {
        return SQ_ERR_NULL;
    }
    if (n < 0 || k < 1) {
        return SQ_ERR_SHAPE;
    }
    if (!sq_product(n, k, &count) || (dtype != SQ_F32 && dtype != SQ_F16 && dtype != SQ_BF16)) {
        return SQ_ERR_RANGE;
    }
    struct columns_job job = {.kernels = sq_kernels_active(),
                              .dtype = dtype,
                              .w = w,
                              .n = n,
                              .k = k,
                              .max_abs = max_abs,
                              .sum2 = sum2};
    sq_parallel_for(sq_ceil_div(k, COLUMN_CHUNK), 1, column_chunks, &job);
    return atomic_load(&job.nonfinite) ? SQ_ERR_NONFINITE : SQ_OK;
}

struct peaks_job {
    const float *w, *scale;
    int64_t n, k, block;
    double *peaks;
};

static void
peak_blocks(void *context, int64_t begin, int64_t end, int thread)
{
    struct peaks_job *job = context;
    (void)thread;
    for (int64_t b = begin; b < end; b++) {
        const int64_t first = b * job->block;
        const float *scale = job->scale + first;
        double *peaks = job->peaks + first;
        memset(peaks, 0, (size_t)job->block * sizeof *peaks);
        for (int64_t row = 0; row < job->n; row++) {
            const float *x = job->w + row * job->k + first;
            int64_t at = 0;
            double peak = fabs((double)x[0] * scale[0]);
            for (int64_t c = 1; c < job->block; c++) {
                const double v = fabs((double)x[c] * scale[c]);
                at = v > peak ? c : at;
                peak = v > peak ? v : peak;
            }
            peaks[at] += peak * peak;
        }
    }
}

sq_status
sq_block_peaks(const float *w, int64_t n, int64_t k, const float *scale, int64_t block,
               double *peaks)
{
    int64_t count;
    if (!w || !scale || !peaks) {
        return SQ_ERR_NULL;
    }
    if (n < 0 || k < 1 || block < 1 || k % block) {
        return SQ_ERR_SHAPE;
    }
    if (!sq_product(n, k, &count)) {
        return SQ_ERR_RANGE;
    }
    if (!sq_all_finite(w, count) || !sq_all_finite(scale, k)) {
        return SQ_ERR_NONFINITE;
    }
    struct peaks_job job = {.w = w, .scale = scale, .n = n, .k = k, .block = block, .peaks = peaks};
    sq_parallel_for(k / block, 1, peak_blocks, &job);
    return SQ_OK;
}
