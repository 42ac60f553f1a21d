/* SPDX-License-Identifier: Apache-2.0 */
/* Streaming extremes, moments and axis Gram matrices of one site's inputs.
 *
 * Every sum is one sequential chain over tokens (and, for a Gram entry, over the other axis within
 * a token), in float64, from the state's value. Work is split over channels and over rows of the
 * Gram matrices, never over tokens: results do not depend on the number of threads, nor on how a
 * sequence of tokens is cut into updates. */
#include <math.h>
#include <stdatomic.h>
#include <string.h>

#include "core/sq_internal.h"
#include "kernels/sq_kernels.h"
#include "core/sq_threads.h"

/* Gram matrices are made in tiles of 4 x 4 (8 vector registers of two doubles). */
#define SQ_GRAM_TILE 4
/* Elements of one block of tokens: two packed copies of it in float64 stay in a 1 MiB L2 cache. */
#define SQ_GRAM_BLOCK 49152
#define SQ_CHANNEL_GRAIN 256

static sq_status
check_sizes(const struct sq_statistics *s, int64_t *k)
{
    int64_t square, bytes;
    if (!s || !s->min || !s->max || !s->sum || !s->sum2 || !s->sum4 || !s->gram1 || !s->gram2) {
        return SQ_ERR_NULL;
    }
    if (s->k1 < 1 || s->k2 < 1 || s->count < 0) {
        return SQ_ERR_RANGE;
    }
    const int64_t larger = sq_max_i64(s->k1, s->k2);
    if (!sq_product(s->k1, s->k2, k) || !sq_product(larger, larger, &square) ||
        !sq_product(square, sizeof(double), &bytes) || !sq_product(*k, sizeof(double), &bytes)) {
        return SQ_ERR_RANGE;
    }
    return SQ_OK;
}

sq_status
sq_statistics_reset(struct sq_statistics *s)
{
    int64_t k;
    if (s) {
        s->count = 0;
    }
    SQ_TRY(check_sizes(s, &k));
    double *const channels[] = {s->min, s->max, s->sum, s->sum2, s->sum4};
    for (size_t i = 0; i < sizeof channels / sizeof channels[0]; i++) {
        memset(channels[i], 0, (size_t)k * sizeof(double));
    }
    memset(s->gram1, 0, (size_t)(s->k1 * s->k1) * sizeof(double));
    memset(s->gram2, 0, (size_t)(s->k2 * s->k2) * sizeof(double));
    return SQ_OK;
}

struct update_job {
    const struct sq_statistics *s;
    const float *x; /* [tokens][k] */
    int64_t tokens, k;
    double *panels1, *panels2; /* packed block: panels of SQ_GRAM_TILE columns, [rows][tile] each */
};

/* Extremes and power sums of channels begin .. end - 1. The fourth power of the largest float,
 * 2^512, leaves room for 2^512 of them. */
static void
update_channels(void *context, int64_t begin, int64_t end, int thread)
{
    const struct update_job *job = context;
    const struct sq_statistics *s = job->s;
    (void)thread;
    double *SQ_RESTRICT min = s->min, *SQ_RESTRICT max = s->max, *SQ_RESTRICT sum = s->sum,
                        *SQ_RESTRICT sum2 = s->sum2, *SQ_RESTRICT sum4 = s->sum4;
    if (s->count == 0) {
        for (int64_t c = begin; c < end; c++) {
            min[c] = max[c] = (double)job->x[c];
        }
    }
    for (int64_t t = 0; t < job->tokens; t++) {
        const float *SQ_RESTRICT row = job->x + t * job->k;
        for (int64_t c = begin; c < end; c++) {
            const double v = (double)row[c], v2 = v * v;
            min[c] = v < min[c] ? v : min[c];
            max[c] = v > max[c] ? v : max[c];
            sum[c] += v;
            sum2[c] += v2;
            sum4[c] += v2 * v2;
        }
    }
}

/* Packs panel `panel` of the matrix whose row (t, r) has the elements x[t][r * row_step + c *
 * column_step], c < columns; missing columns are zero. */
static void
pack_panel(const struct update_job *job, int64_t panel, int64_t columns, int64_t column_step,
           int64_t rows_per_token, int64_t row_step, double *out)
{
    const int64_t first = panel * SQ_GRAM_TILE;
    const int64_t valid = sq_min_i64(SQ_GRAM_TILE, columns - first);
    out += panel * job->tokens * rows_per_token * SQ_GRAM_TILE;
    for (int64_t t = 0; t < job->tokens; t++) {
        const float *token = job->x + t * job->k + first * column_step;
        for (int64_t r = 0; r < rows_per_token; r++, out += SQ_GRAM_TILE) {
            for (int64_t c = 0; c < SQ_GRAM_TILE; c++) {
                out[c] = c < valid ? (double)token[r * row_step + c * column_step] : 0.0;
            }
        }
    }
}

/* Panels of X^T (for X X^T) first, then those of X (for X^T X). */
static void
pack_panels(void *context, int64_t begin, int64_t end, int thread)
{
    const struct update_job *job = context;
    const int64_t k1 = job->s->k1, k2 = job->s->k2, first2 = sq_ceil_div(k1, SQ_GRAM_TILE);
    (void)thread;
    for (int64_t p = begin; p < end; p++) {
        if (p < first2) {
            pack_panel(job, p, k1, k2, k2, 1, job->panels1);
        }
        else {
            pack_panel(job, p - first2, k2, 1, k1, k2, job->panels2);
        }
    }
}

/* g [tile][tile] += sum over rows of a[row] b[row]^T, one chain per element. */
static void
gram_tile(const double *SQ_RESTRICT a, const double *SQ_RESTRICT b, int64_t rows,
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

/* Rows of one panel of gram [n][n], from the diagonal on. */
static void
gram_row(const double *panels, int64_t rows, int64_t n, int64_t panel, double *gram)
{
    const int64_t panel_size = rows * SQ_GRAM_TILE, i0 = panel * SQ_GRAM_TILE;
    for (int64_t j0 = i0; j0 < n; j0 += SQ_GRAM_TILE) {
        const int64_t ni = sq_min_i64(SQ_GRAM_TILE, n - i0), nj = sq_min_i64(SQ_GRAM_TILE, n - j0);
        double tile[SQ_GRAM_TILE][SQ_GRAM_TILE] = {{0}};
        for (int64_t i = 0; i < ni; i++) {
            memcpy(tile[i], gram + (i0 + i) * n + j0, (size_t)nj * sizeof(double));
        }
        gram_tile(panels + panel * panel_size, panels + j0 / SQ_GRAM_TILE * panel_size, rows, tile);
        for (int64_t i = 0; i < ni; i++) {
            memcpy(gram + (i0 + i) * n + j0, tile[i], (size_t)nj * sizeof(double));
        }
    }
}

static void
update_grams(void *context, int64_t begin, int64_t end, int thread)
{
    const struct update_job *job = context;
    const struct sq_statistics *s = job->s;
    const int64_t first2 = sq_ceil_div(s->k1, SQ_GRAM_TILE);
    (void)thread;
    for (int64_t p = begin; p < end; p++) {
        if (p < first2) {
            gram_row(job->panels1, job->tokens * s->k2, s->k1, p, s->gram1);
        }
        else {
            gram_row(job->panels2, job->tokens * s->k1, s->k2, p - first2, s->gram2);
        }
    }
}

static void
mirror(double *gram, int64_t n)
{
    for (int64_t i = 0; i < n; i++) {
        for (int64_t j = 0; j < i; j++) {
            gram[i * n + j] = gram[j * n + i];
        }
    }
}

sq_status
sq_statistics_update(struct sq_statistics *s, const float *x, int64_t m)
{
    int64_t k, count;
    SQ_TRY(check_sizes(s, &k));
    if (!x) {
        return SQ_ERR_NULL;
    }
    if (m < 0 || !sq_product(m, k, &count) || m > INT64_MAX - s->count) {
        return SQ_ERR_RANGE;
    }
    if (m == 0) {
        return SQ_OK;
    }
    if (!sq_all_finite(x, count)) {
        return SQ_ERR_NONFINITE;
    }
    const int64_t n1 = sq_ceil_div(s->k1, SQ_GRAM_TILE), n2 = sq_ceil_div(s->k2, SQ_GRAM_TILE);
    const int64_t block = sq_min_i64(m, sq_max_i64(1, SQ_GRAM_BLOCK / k));
    const int64_t size1 = n1 * SQ_GRAM_TILE * block * s->k2;
    const int64_t size2 = n2 * SQ_GRAM_TILE * block * s->k1;
    double *panels = sq_alloc((size_t)(size1 + size2) * sizeof *panels);
    if (!panels) {
        return SQ_ERR_NOMEM;
    }
    struct update_job job = {s, x, m, k, panels, panels + size1};
    sq_parallel_for(k, SQ_CHANNEL_GRAIN, update_channels, &job);
    for (int64_t t = 0; t < m; t += block) {
        job.x = x + t * k;
        job.tokens = sq_min_i64(block, m - t);
        sq_parallel_for(n1 + n2, 4, pack_panels, &job);
        sq_parallel_for(n1 + n2, 1, update_grams, &job);
    }
    mirror(s->gram1, s->k1);
    mirror(s->gram2, s->k2);
    s->count += m;
    free(panels);
    return SQ_OK;
}

static void
add(double *dst, const double *src, int64_t count)
{
    for (int64_t i = 0; i < count; i++) {
        dst[i] += src[i];
    }
}

sq_status
sq_statistics_merge(struct sq_statistics *dst, const struct sq_statistics *src)
{
    int64_t k, k_src;
    SQ_TRY(check_sizes(dst, &k));
    SQ_TRY(check_sizes(src, &k_src));
    if (dst->k1 != src->k1 || dst->k2 != src->k2) {
        return SQ_ERR_SHAPE;
    }
    if (src->count > INT64_MAX - dst->count) {
        return SQ_ERR_RANGE;
    }
    if (src->count == 0) {
        return SQ_OK;
    }
    for (int64_t c = 0; c < k; c++) {
        const int empty = dst->count == 0;
        dst->min[c] = empty || src->min[c] < dst->min[c] ? src->min[c] : dst->min[c];
        dst->max[c] = empty || src->max[c] > dst->max[c] ? src->max[c] : dst->max[c];
    }
    add(dst->sum, src->sum, k);
    add(dst->sum2, src->sum2, k);
    add(dst->sum4, src->sum4, k);
    add(dst->gram1, src->gram1, dst->k1 * dst->k1);
    add(dst->gram2, src->gram2, dst->k2 * dst->k2);
    dst->count += src->count;
    return SQ_OK;
}

/* ---- columns of weights ----------------------------------------------------------------- */

enum { COLUMN_CHUNK = 64 }; /* columns of one task: whole cache lines of 16-bit weights */

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
