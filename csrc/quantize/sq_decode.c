/* SPDX-License-Identifier: Apache-2.0 */
/* Weights that others stored in 8 or 4 bits of floating point, as bfloat16. */
#include "quantize/sq_quantize.h"

#include <string.h>

#include "core/sq_internal.h"
#include "core/sq_threads.h"

enum {
    ROW_ELEMENTS = 1 << 15, /* of a chunk of rows */
    TILE_ROWS = 64          /* rows whose 32 columns stay in the first-level cache: 4 KiB */
};

static float
float_of(uint32_t bits)
{
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* bfloat16 nearest to x, halves to even; NaN stays NaN. */
static uint16_t
narrow(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return (uint16_t)((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

/* ---- e4m3: sign, 4 bits of exponent with bias 7, 3 of mantissa; NaN is all ones ------------ */

/* The exponent and the mantissa as those of a float32 are 2^120 times too small, whether they are
 * normal or not: the biases are 7 and 127. */
static float
e4m3(uint8_t code)
{
    const uint32_t rest = code & 0x7f;
    const float x = float_of(rest << 20) * 0x1p120f;
    return rest == 0x7f ? float_of(0x7fc00000) : code & 0x80 ? -x : x;
}

struct fp8_job {
    float values[256]; /* of each code */
    const uint8_t *codes;
    const float *scales;
    int64_t n, k, block_rows, block_columns, grid_rows, grid_columns;
    uint16_t *out;
};

static void
fp8_rows(void *context, int64_t begin, int64_t end, int thread)
{
    const struct fp8_job *job = context;
    (void)thread;
    for (int64_t row = begin; row < end; row++) {
        const int64_t grid_row = row / job->n * job->grid_rows + row % job->n / job->block_rows;
        const float *scales = job->scales + grid_row * job->grid_columns;
        const uint8_t *restrict codes = job->codes + row * job->k;
        uint16_t *restrict out = job->out + row * job->k;
        for (int64_t first = 0; first < job->k; first += job->block_columns) {
            const int64_t last = sq_min_i64(first + job->block_columns, job->k);
            const float scale = scales[first / job->block_columns];
            for (int64_t j = first; j < last; j++) {
                out[j] = narrow(job->values[codes[j]] * scale);
            }
        }
    }
}

sq_status
sq_decode_fp8(const uint8_t *codes, const float *scales, int64_t count, int64_t n, int64_t k,
              int64_t block_rows, int64_t block_columns, uint16_t *out)
{
    if (!codes || !scales || !out) {
        return SQ_ERR_NULL;
    }
    int64_t rows, elements;
    if (k < 0 || block_rows < 1 || block_columns < 1 || !sq_product(count, n, &rows) ||
        !sq_product(rows, k, &elements)) {
        return SQ_ERR_SHAPE;
    }
    struct fp8_job job = {.codes = codes,
                          .scales = scales,
                          .n = n,
                          .k = k,
                          .block_rows = block_rows,
                          .block_columns = block_columns,
                          .grid_rows = sq_ceil_div(n, block_rows),
                          .grid_columns = sq_ceil_div(k, block_columns),
                          .out = out};
    for (int code = 0; code < 256; code++) {
        job.values[code] = e4m3((uint8_t)code);
    }
    sq_parallel_for(elements ? rows : 0, sq_max_i64(1, ROW_ELEMENTS / sq_max_i64(k, 1)), fp8_rows,
                    &job);
    return SQ_OK;
}

/* ---- mxfp4: 32 codes of e2m1 along k share a power of two -------------------------------- */

static const float E2M1[16] = {0.0f,  0.5f,  1.0f,  1.5f,  2.0f,  3.0f,  4.0f,  6.0f,
                               -0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f};

/* 2^(code - 127); the code 255 is NaN. */
static float
e8m0(uint8_t code)
{
    return code == 255 ? float_of(0x7fc00000) : code ? float_of((uint32_t)code << 23) : 0x1p-127f;
}

struct mxfp4_job {
    uint16_t values[256][16]; /* of each scale's codes */
    const uint8_t *blocks, *scales;
    int64_t rows, groups;
    uint16_t *out;
};

/* Rows first .. last - 1 of one group, in its 32 columns; both begin at the matrix. They are turned
 * in a buffer, so that whole cache lines are written. */
static void
mxfp4_tile(const struct mxfp4_job *job, int64_t matrix, int64_t group, int64_t first, int64_t last)
{
    uint16_t turned[32][TILE_ROWS];
    for (int64_t row = first; row < last; row++) {
        const int64_t at = (matrix * job->rows + row) * job->groups + group;
        const uint16_t *values = job->values[job->scales[at]];
        for (int j = 0; j < 16; j++) {
            const uint8_t pair = job->blocks[at * 16 + j];
            turned[2 * j][row - first] = values[pair & 15];
            turned[2 * j + 1][row - first] = values[pair >> 4];
        }
    }
    uint16_t *out = job->out + (matrix * job->groups + group) * 32 * job->rows + first;
    for (int j = 0; j < 32; j++) {
        memcpy(out + j * job->rows, turned[j], (size_t)(last - first) * sizeof *out);
    }
}

static void
mxfp4_groups(void *context, int64_t begin, int64_t end, int thread)
{
    const struct mxfp4_job *job = context;
    (void)thread;
    for (int64_t item = begin; item < end; item++) {
        for (int64_t first = 0; first < job->rows; first += TILE_ROWS) {
            mxfp4_tile(job, item / job->groups, item % job->groups, first,
                       sq_min_i64(first + TILE_ROWS, job->rows));
        }
    }
}

sq_status
sq_decode_mxfp4(const uint8_t *blocks, const uint8_t *scales, int64_t count, int64_t rows,
                int64_t groups, uint16_t *out)
{
    if (!blocks || !scales || !out) {
        return SQ_ERR_NULL;
    }
    int64_t items, bytes;
    if (!sq_product(count, groups, &items) || !sq_product(items, rows, &bytes) ||
        !sq_product(bytes, 16, &bytes)) {
        return SQ_ERR_SHAPE;
    }
    struct mxfp4_job job = {
        .blocks = blocks, .scales = scales, .rows = rows, .groups = groups, .out = out};
    for (int code = 0; code < 256 * 16; code++) {
        job.values[code / 16][code % 16] = narrow(E2M1[code % 16] * e8m0((uint8_t)(code / 16)));
    }
    /* 4 groups of a row: a cache line */
    sq_parallel_for(bytes ? items : 0, 4, mxfp4_groups, &job);
    return SQ_OK;
}
