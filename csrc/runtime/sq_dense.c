/* SPDX-License-Identifier: Apache-2.0 */
/* Linears whose weights stay in 32 or 16 bits, conversion to float32, and rows of such tables. */
#include <limits.h>
#include <stdatomic.h>
#include <string.h>

#include "core/sq_blas.h"
#include "core/sq_internal.h"
#include "kernels/sq_kernels.h"
#include "core/sq_threads.h"

/* A product is cut into blocks of outputs and tokens whose borders follow from m, n and k alone, so
 * that each element is summed by the same BLAS call at any number of threads. */
enum {
    TOKENS_PER_BLOCK = 256,
    OUTPUTS_PER_BLOCK_MAX = 256,
    OUTPUTS_PER_BLOCK_STEP = 16,
    BLOCKS_WANTED = 16,           /* enough to share a small linear between threads */
    BLOCK_ELEMENTS = 1 << 20,     /* of converted weights: 4 MiB of scratch per thread */
    FEW_CHUNK_ELEMENTS = 1 << 17, /* of weights, of a product with few tokens: 256 KiB */
    STEADY_BLOCK = 16,            /* tokens, and outputs, of a block of few outputs */
    STEADY_CHUNK_WORK = 1 << 17,  /* products of one chunk of such blocks, about */
    CONVERT_GRAIN = 1 << 15,      /* elements of one chunk of a conversion */
};

static int64_t
outputs_per_block(int64_t n, int64_t k)
{
    const int64_t step = OUTPUTS_PER_BLOCK_STEP;
    const int64_t shared = sq_round_up(sq_ceil_div(n, BLOCKS_WANTED), step);
    const int64_t fitting = BLOCK_ELEMENTS / k;
    const int64_t most = sq_min_i64(OUTPUTS_PER_BLOCK_MAX, fitting / step * step);
    return sq_max_i64(step, sq_min_i64(shared, most));
}

static size_t
element_bytes(sq_dtype dtype)
{
    return dtype == SQ_F32 ? sizeof(float) : sizeof(uint16_t);
}

static int
known_dtype(sq_dtype dtype)
{
    return dtype == SQ_F32 || dtype == SQ_F16 || dtype == SQ_BF16;
}

/* out [count] <- in [count]; 1 if all are finite (for float32: only looked at when asked). */
static int
convert(const struct sq_kernels *kernels, sq_dtype dtype, const void *in, int64_t count, int look,
        float *out)
{
    switch (dtype) {
        case SQ_F16:
            return kernels->f16_to_f32(in, count, out);
        case SQ_BF16:
            return kernels->bf16_to_f32(in, count, out);
        case SQ_F32:
            break;
    }
    memcpy(out, in, (size_t)count * sizeof *out);
    return look ? sq_all_finite(out, count) : 1;
}

/* ---- linear ----------------------------------------------------------------------------- */

struct dense_job {
    const struct sq_kernels *kernels;
    sq_dtype dtype;
    const char *w;
    const float *x;
    float *y;
    int64_t m, n, k, ld_y;
    int64_t block_n, blocks_n, blocks_m;
    float *scratch; /* [lanes][block_n][k] for 16-bit weights */
    _Atomic int64_t next;
};

static void
multiply_block(const struct dense_job *j, int64_t n0, int64_t count_n, const float *w, int64_t m0)
{
    const int64_t count_m = sq_min_i64(TOKENS_PER_BLOCK, j->m - m0);
    sq_blas_gemm_nt(count_m, count_n, j->k, j->x + m0 * j->k, j->k, w, j->k,
                    j->y + m0 * j->ld_y + n0, j->ld_y);
}

/* float32 weights: items are (output block, token block). */
static void
multiply_float32(void *context, int64_t begin, int64_t end, int thread)
{
    const struct dense_job *j = context;
    (void)thread;
    for (int64_t item = begin; item < end; item++) {
        const int64_t n0 = item / j->blocks_m * j->block_n;
        const float *w = (const float *)(const void *)j->w + n0 * j->k;
        multiply_block(j, n0, sq_min_i64(j->block_n, j->n - n0), w,
                       item % j->blocks_m * TOKENS_PER_BLOCK);
    }
}

/* 16-bit weights and few tokens: items are outputs. */
static void
multiply_few(void *context, int64_t begin, int64_t end, int thread)
{
    const struct dense_job *j = context;
    const uint16_t *w = (const uint16_t *)(const void *)j->w + begin * j->k;
    (void)thread;
    j->kernels->gemm_half(j->dtype == SQ_BF16, j->m, end - begin, j->k, j->x, j->k, w, j->y + begin,
                          j->ld_y);
}

/* 16-bit weights: a lane owns scratch and takes output blocks until none is left; a block is
 * converted once and then used for all tokens. Lanes, not threads, index the scratch, because the
 * number of threads may change between its allocation and the loop. */
static void
multiply_converted(void *context, int64_t begin, int64_t end, int thread)
{
    struct dense_job *j = context;
    (void)thread;
    for (int64_t lane = begin; lane < end; lane++) {
        float *w = j->scratch + lane * j->block_n * j->k;
        for (;;) {
            const int64_t block = atomic_fetch_add(&j->next, 1);
            if (block >= j->blocks_n || sq_stopped()) {
                break;
            }
            const int64_t n0 = block * j->block_n;
            const int64_t count = sq_min_i64(j->block_n, j->n - n0);
            convert(j->kernels, j->dtype, j->w + (size_t)(n0 * j->k) * element_bytes(j->dtype),
                    count * j->k, 0, w);
            for (int64_t m0 = 0; m0 < j->m && !sq_stopped(); m0 += TOKENS_PER_BLOCK) {
                multiply_block(j, n0, count, w, m0);
            }
        }
    }
}

sq_status
sq_linear_dense(sq_dtype dtype, const void *w, const float *x, int64_t m, int64_t n, int64_t k,
                float *y, int64_t ld_y)
{
    int64_t elements;
    if (!w || !x || !y) {
        return SQ_ERR_NULL;
    }
    if (!known_dtype(dtype)) {
        return SQ_ERR_DTYPE;
    }
    if (m < 0 || n < 0 || k < 1 || ld_y < n) {
        return SQ_ERR_SHAPE;
    }
    if (k > INT_MAX || ld_y > INT_MAX || !sq_product(n, k, &elements) ||
        !sq_product(m, sq_max_i64(k, ld_y), &elements)) {
        return SQ_ERR_RANGE; /* BLAS counts in int */
    }
    if (m == 0 || n == 0) {
        return SQ_OK;
    }
    struct dense_job j = {.kernels = sq_kernels_active(),
                          .dtype = dtype,
                          .w = w,
                          .x = x,
                          .y = y,
                          .m = m,
                          .n = n,
                          .k = k,
                          .ld_y = ld_y,
                          .block_n = outputs_per_block(n, k)};
    j.blocks_n = sq_ceil_div(n, j.block_n);
    j.blocks_m = sq_ceil_div(m, TOKENS_PER_BLOCK);
    if (dtype == SQ_F32) {
        sq_parallel_for(j.blocks_n * j.blocks_m, 1, multiply_float32, &j);
        return SQ_OK;
    }
    if (m <= SQ_DENSE_FEW) {
        sq_parallel_for(n, sq_max_i64(OUTPUTS_PER_BLOCK_STEP, FEW_CHUNK_ELEMENTS / k), multiply_few,
                        &j);
        return SQ_OK;
    }
    const int64_t lanes = sq_min_i64(sq_get_num_threads(), j.blocks_n);
    j.scratch = sq_alloc((size_t)(lanes * j.block_n * k) * sizeof(float));
    if (!j.scratch) {
        return SQ_ERR_NOMEM;
    }
    sq_parallel_for(lanes, 1, multiply_converted, &j);
    free(j.scratch);
    return SQ_OK;
}

/* A sum in LANES chains, which is one order for all tables and as many vectors as it takes. */
static float
dot(const float *x, const float *w, int64_t k)
{
    enum { LANES = 16 };
    float lane[LANES] = {0};
    int64_t i = 0;
    for (; i + LANES <= k; i += LANES) {
        for (int l = 0; l < LANES; l++) {
            lane[l] += x[i + l] * w[i + l];
        }
    }
    for (int l = 0; i < k; i++, l++) {
        lane[l] += x[i] * w[i];
    }
    for (int step = LANES / 2; step > 0; step /= 2) {
        for (int l = 0; l < step; l++) {
            lane[l] += lane[l + step];
        }
    }
    return lane[0];
}

/* float32 weights: items are (token block, output block), the outputs of a block side by side. */
static void
multiply_steady(void *context, int64_t begin, int64_t end, int thread)
{
    const struct dense_job *j = context;
    const float *w = (const float *)(const void *)j->w;
    (void)thread;
    for (int64_t item = begin; item < end; item++) {
        const int64_t m0 = item / j->blocks_n * STEADY_BLOCK, n0 = item % j->blocks_n * j->block_n;
        const int64_t m1 = sq_min_i64(m0 + STEADY_BLOCK, j->m);
        const int64_t n1 = sq_min_i64(n0 + j->block_n, j->n);
        for (int64_t o = n0; o < n1; o++) {
            for (int64_t t = m0; t < m1; t++) {
                j->y[t * j->ld_y + o] = dot(j->x + t * j->k, w + o * j->k, j->k);
            }
        }
    }
}

sq_status
sq_linear_steady(sq_dtype dtype, const void *w, const float *x, int64_t m, int64_t n, int64_t k,
                 float *y)
{
    if (dtype != SQ_F32) {
        for (int64_t t = 0; t < m; t += SQ_DENSE_FEW) {
            SQ_TRY(sq_linear_dense(dtype, w, x + t * k, sq_min_i64(SQ_DENSE_FEW, m - t), n, k,
                                   y + t * n, n));
        }
        return SQ_OK;
    }
    struct dense_job j = {
        .w = w, .x = x, .y = y, .m = m, .n = n, .k = k, .ld_y = n, .block_n = STEADY_BLOCK};
    const int64_t block_work = sq_min_i64(m, STEADY_BLOCK) * sq_min_i64(n, STEADY_BLOCK) * k;
    j.blocks_n = sq_ceil_div(n, j.block_n);
    sq_parallel_for(sq_ceil_div(m, STEADY_BLOCK) * j.blocks_n,
                    sq_max_i64(1, STEADY_CHUNK_WORK / sq_max_i64(1, block_work)), multiply_steady,
                    &j);
    return SQ_OK;
}

/* ---- conversion ------------------------------------------------------------------------- */

struct convert_job {
    const struct sq_kernels *kernels;
    sq_dtype dtype;
    const char *in;
    float *out;
    int look;
    _Atomic int finite;
    int64_t width; /* of a row, for the gather */
    const int64_t *index;
};

static void
convert_range(void *context, int64_t begin, int64_t end, int thread)
{
    struct convert_job *j = context;
    (void)thread;
    if (!convert(j->kernels, j->dtype, j->in + (size_t)begin * element_bytes(j->dtype), end - begin,
                 j->look, j->out + begin)) {
        atomic_store(&j->finite, 0);
    }
}

sq_status
sq_to_float32(sq_dtype dtype, const void *in, int64_t count, int reject, float *out)
{
    if (!in || !out) {
        return SQ_ERR_NULL;
    }
    if (!known_dtype(dtype)) {
        return SQ_ERR_DTYPE;
    }
    if (count < 0) {
        return SQ_ERR_SHAPE;
    }
    struct convert_job j = {.kernels = sq_kernels_active(),
                            .dtype = dtype,
                            .in = in,
                            .out = out,
                            .look = reject,
                            .finite = 1};
    sq_parallel_for(count, CONVERT_GRAIN, convert_range, &j);
    return reject && !j.finite ? SQ_ERR_NONFINITE : SQ_OK;
}

static void
gather_range(void *context, int64_t begin, int64_t end, int thread)
{
    struct convert_job *j = context;
    (void)thread;
    for (int64_t i = begin; i < end; i++) {
        const size_t offset = (size_t)(j->index[i] * j->width) * element_bytes(j->dtype);
        convert(j->kernels, j->dtype, j->in + offset, j->width, 0, j->out + i * j->width);
    }
}

sq_status
sq_gather_rows(sq_dtype dtype, const void *table, int64_t rows, int64_t width, const int64_t *index,
               int64_t m, float *out)
{
    int64_t elements;
    if (!table || !index || !out) {
        return SQ_ERR_NULL;
    }
    if (!known_dtype(dtype)) {
        return SQ_ERR_DTYPE;
    }
    if (rows < 0 || width < 0 || m < 0) {
        return SQ_ERR_SHAPE;
    }
    if (!sq_product(rows, width, &elements) || !sq_product(m, width, &elements)) {
        return SQ_ERR_RANGE;
    }
    for (int64_t i = 0; i < m; i++) {
        if (index[i] < 0 || index[i] >= rows) {
            return SQ_ERR_RANGE;
        }
    }
    struct convert_job j = {.kernels = sq_kernels_active(),
                            .dtype = dtype,
                            .in = table,
                            .out = out,
                            .width = width,
                            .index = index};
    sq_parallel_for(m, CONVERT_GRAIN / sq_max_i64(width, 1), gather_range, &j);
    return SQ_OK;
}
