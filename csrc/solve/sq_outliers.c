/* SPDX-License-Identifier: Apache-2.0 */
/* How hard a site's inputs are to quantize: peaks, moments and code entropy of every token, energy
 * and exceedances of every channel.
 *
 * Tokens are shared out first, then channels; each sum is one chain over its row (or column) in
 * float64, so that results do not depend on the number of threads. */
#include <math.h>

#include "core/sq_internal.h"
#include "core/sq_threads.h"

#define SQ_CHANNEL_GRAIN 256
#define SQ_CODES 256 /* an int8 has so many values */

struct outliers_job {
    const float *x; /* [m][k] */
    int64_t m, k;
    const int8_t *codes; /* [m][k] */
    const float *scales; /* [m] */
    double normal;
    double (*tokens)[SQ_OUTLIER_FIELDS];
    double *channel_sum2;
    int64_t *channel_above;
};

/* Shannon entropy in bits of k codes, from their counts: log2 k - sum n log2 n / k. */
static double
code_entropy(const int8_t *codes, int64_t k)
{
    int64_t counts[SQ_CODES] = {0};
    double sum = 0.0;
    for (int64_t c = 0; c < k; c++) {
        counts[(uint8_t)codes[c]]++;
    }
    for (int i = 0; i < SQ_CODES; i++) {
        if (counts[i] > 0) {
            sum += (double)counts[i] * log2((double)counts[i]);
        }
    }
    return log2((double)k) - sum / (double)k;
}

static void
measure_tokens(void *context, int64_t begin, int64_t end, int thread)
{
    const struct outliers_job *job = context;
    (void)thread;
    for (int64_t t = begin; t < end; t++) {
        const float *restrict row = job->x + t * job->k;
        const int8_t *restrict codes = job->codes + t * job->k;
        const double scale = (double)job->scales[t];
        double peak = 0.0, sum = 0.0, sum2 = 0.0, sum4 = 0.0, error = 0.0;
        for (int64_t c = 0; c < job->k; c++) {
            const double v = (double)row[c], size = fabs(v), v2 = v * v;
            const double rest = v - scale * (double)codes[c];
            peak = size > peak ? size : peak;
            sum += size;
            sum2 += v2;
            sum4 += v2 * v2;
            error += rest * rest;
        }
        double *out = job->tokens[t];
        out[SQ_OUTLIER_PEAK] = peak;
        out[SQ_OUTLIER_SUM] = sum;
        out[SQ_OUTLIER_SUM2] = sum2;
        out[SQ_OUTLIER_SUM4] = sum4;
        out[SQ_OUTLIER_ERROR] = error;
        out[SQ_OUTLIER_ENTROPY] = code_entropy(codes, job->k);
    }
}

/* |v| > normal * rms is v^2 k > normal^2 sum2: no root, no division, and no token of zeros counts.
 */
static void
measure_channels(void *context, int64_t begin, int64_t end, int thread)
{
    const struct outliers_job *job = context;
    const double k = (double)job->k, square = job->normal * job->normal;
    (void)thread;
    for (int64_t c = begin; c < end; c++) {
        job->channel_sum2[c] = 0.0;
        job->channel_above[c] = 0;
    }
    for (int64_t t = 0; t < job->m; t++) {
        const float *restrict row = job->x + t * job->k;
        const double limit = square * job->tokens[t][SQ_OUTLIER_SUM2];
        for (int64_t c = begin; c < end; c++) {
            const double v2 = (double)row[c] * (double)row[c];
            job->channel_sum2[c] += v2;
            job->channel_above[c] += v2 * k > limit;
        }
    }
}

sq_status
sq_outliers(const float *x, int64_t m, int64_t k, const int8_t *codes, const float *scales,
            double normal, double (*tokens)[SQ_OUTLIER_FIELDS], double *channel_sum2,
            int64_t *channel_above)
{
    int64_t count, bytes;
    if (!x || !codes || !scales || !tokens || !channel_sum2 || !channel_above) {
        return SQ_ERR_NULL;
    }
    if (m < 0 || k < 1 || !(normal > 0.0) || !isfinite(normal) || !sq_product(m, k, &count) ||
        !sq_product(count, sizeof(double), &bytes)) {
        return SQ_ERR_RANGE;
    }
    if (!sq_all_finite(x, count) || !sq_all_finite(scales, m)) {
        return SQ_ERR_NONFINITE;
    }
    struct outliers_job job = {x, m, k, codes, scales, normal, tokens, channel_sum2, channel_above};
    sq_parallel_for(m, 1, measure_tokens, &job);
    sq_parallel_for(k, SQ_CHANNEL_GRAIN, measure_channels, &job);
    return SQ_OK;
}
