/* SPDX-License-Identifier: Apache-2.0 */
/* Tables that stay as rows of codes: logits of a head, rows of an embedding. */
#include "runtime/sq_linear.h"

#include "core/sq_internal.h"
#include "core/sq_threads.h"
#include "kernels/sq_kernels.h"

enum {
    CHUNK_OUTPUTS_STEP = 16,
    CHUNK_BYTES = 1 << 17, /* of codes, of one chunk */
    GATHER_GRAIN = 1 << 15 /* elements of one chunk */
};

struct rows_job {
    const struct sq_kernels *kernels;
    const struct sq_code_rows *w;
    const float *x;
    int64_t m, ld_y;
    float *y;
    const int64_t *index;
};

static int
sound(const struct sq_code_rows *w)
{
    return sq_code_row_bits_valid(w->bits) && w->k >= 1;
}

/* Items are outputs. The codes of a chunk stay in the cache while all tokens meet them; more than
 * SQ_DENSE_FEW of these would not. */
static void
multiply_rows(void *context, int64_t begin, int64_t end, int thread)
{
    const struct rows_job *j = context;
    const int bits = j->w->bits;
    const int64_t k = j->w->k;
    const struct sq_code_rows part = {.bits = bits,
                                      .k = k,
                                      .codes = j->w->codes + begin * sq_code_row_bytes(bits, k),
                                      .scales = j->w->scales + begin * sq_code_row_scales(k)};
    (void)thread;
    for (int64_t t = 0; t < j->m && !sq_stopped(); t += SQ_DENSE_FEW) {
        j->kernels->gemm_rows(&part, sq_min_i64(SQ_DENSE_FEW, j->m - t), end - begin, j->x + t * k,
                              k, j->y + t * j->ld_y + begin, j->ld_y);
    }
}

sq_status
sq_linear_rows(const struct sq_code_rows *w, int64_t n, const float *x, int64_t m, float *y,
               int64_t ld_y)
{
    int64_t elements;
    if (!w || !w->codes || !w->scales || !x || !y) {
        return SQ_ERR_NULL;
    }
    if (!sound(w) || m < 0 || n < 0 || ld_y < n) {
        return SQ_ERR_SHAPE;
    }
    if (!sq_product(n, w->k, &elements) || !sq_product(m, sq_max_i64(w->k, ld_y), &elements)) {
        return SQ_ERR_RANGE;
    }
    struct rows_job j = {
        .kernels = sq_kernels_active(), .w = w, .x = x, .m = m, .ld_y = ld_y, .y = y};
    const int64_t fitting = CHUNK_BYTES / sq_code_row_bytes(w->bits, w->k);
    sq_parallel_for(m ? n : 0, sq_max_i64(CHUNK_OUTPUTS_STEP, fitting), multiply_rows, &j);
    return SQ_OK;
}

static void
gather(void *context, int64_t begin, int64_t end, int thread)
{
    const struct rows_job *j = context;
    const struct sq_code_rows *w = j->w;
    (void)thread;
    for (int64_t i = begin; i < end; i++) {
        const int64_t row = j->index[i];
        const uint8_t *codes = w->codes + row * sq_code_row_bytes(w->bits, w->k);
        for (int64_t p = 0; p < w->k; p++) {
            j->y[i * w->k + p] =
                sq_scale_of_row(w, row, p) * (float)sq_code_of_row(w->bits, codes, p);
        }
    }
}

sq_status
sq_gather_code_rows(const struct sq_code_rows *w, int64_t rows, const int64_t *index, int64_t m,
                    float *out)
{
    int64_t elements;
    if (!w || !w->codes || !w->scales || !index || !out) {
        return SQ_ERR_NULL;
    }
    if (!sound(w) || rows < 0 || m < 0) {
        return SQ_ERR_SHAPE;
    }
    if (!sq_product(rows, w->k, &elements) || !sq_product(m, w->k, &elements)) {
        return SQ_ERR_RANGE;
    }
    for (int64_t i = 0; i < m; i++) {
        if (index[i] < 0 || index[i] >= rows) {
            return SQ_ERR_RANGE;
        }
    }
    struct rows_job j = {.w = w, .y = out, .index = index};
    sq_parallel_for(m, sq_max_i64(1, GATHER_GRAIN / w->k), gather, &j);
    return SQ_OK;
}
