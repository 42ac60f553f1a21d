/* SPDX-License-Identifier: Apache-2.0 */
/* An embedding or a head to rows of codes. */
#include "quantize/sq_quantize.h"

#include <float.h>
#include <stdatomic.h>
#include <string.h>

#include "core/sq_internal.h"
#include "core/sq_threads.h"
#include "kernels/sq_kernels.h"

enum { CHUNK_ELEMENTS = 1 << 16, HALF_BLOCK = SQ_ROW_BLOCK / 2, QUARTER_BLOCK = SQ_ROW_BLOCK / 4 };
_Static_assert(SQ_ROW_BLOCK % SQ_FIXED_ALIGN == 0, "the scratch of a block's search");

struct rows_job {
    const struct sq_kernels *kernels;
    int bits;
    sq_dtype dtype;
    const char *table;
    int64_t k;
    uint8_t *codes;
    uint16_t *scales;
    _Atomic int64_t bad_row;
    atomic_int no_memory;
};

/* x [k] <- row; 1 if all of it is finite. */
static int
widen(const struct rows_job *job, int64_t row, float *x)
{
    const size_t bytes = job->dtype == SQ_F32 ? sizeof(float) : sizeof(uint16_t);
    const void *from = job->table + (size_t)(row * job->k) * bytes;
    switch (job->dtype) {
        case SQ_F16:
            return job->kernels->f16_to_f32(from, job->k, x);
        case SQ_BF16:
            return job->kernels->bf16_to_f32(from, job->k, x);
        case SQ_F32:
            break;
    }
    memcpy(x, from, (size_t)job->k * sizeof *x);
    return sq_all_finite(x, job->k);
}

/* The bfloat16 scale that a scale becomes; what is too small to be divided by becomes 0. */
static uint16_t
stored_scale(float scale)
{
    return scale < FLT_MIN ? 0 : sq_bf16_of_float(scale);
}

/* x [k] to 8 bits: codes [k], a scale for each block. */
static void
round_bytes(const struct rows_job *job, const float *x, uint8_t *codes, uint16_t *scales)
{
    for (int64_t p = 0; p < job->k; p += SQ_ROW_BLOCK) {
        const int64_t count = sq_min_i64(SQ_ROW_BLOCK, job->k - p);
        uint16_t *scale = scales + p / SQ_ROW_BLOCK;
        float min, max;
        (void)job->kernels->extremes(x + p, count, &min, &max);
        *scale = stored_scale((-min > max ? -min : max) / 127.0f);
        if (!*scale) {
            memset(codes + p, 0, (size_t)count);
            continue;
        }
        job->kernels->quantize_codes(x + p, count, 1.0f / sq_float_of_bf16(*scale), -128.0f, 127.0f,
                                     0, (int8_t *)codes + p);
    }
}

/* One block x [SQ_ROW_BLOCK] to code + 2^(bits - 1) in codes [SQ_ROW_BLOCK]; its scale and squared
 * error. */
static double
round_block(const struct sq_kernels *kernels, int bits, const float *x, int8_t *codes,
            uint16_t *scale)
{
    const struct sq_quantizer search = {.bits = bits, .symmetric = 1, .clip = 1.0f, .search = 1};
    const int zero_code = 1 << (bits - 1);
    _Alignas(SQ_ALIGN_BYTES) int16_t scratch[SQ_ROW_BLOCK];
    float found = 0.0f;
    int32_t zero;
    (void)sq_quantize_group(kernels, &search, x, SQ_ROW_BLOCK, zero_code, scratch, codes, &found,
                            &zero);
    *scale = stored_scale(found);
    if (!*scale) {
        memset(codes, zero_code, SQ_ROW_BLOCK);
        return 0.0;
    }
    const struct sq_step step = {sq_float_of_bf16(*scale), (float)-zero_code,
                                 (float)(zero_code - 1)};
    double error;
    kernels->quantize_codes(x, SQ_ROW_BLOCK, 1.0f / step.scale, step.low, step.high, zero_code,
                            codes);
    kernels->quantize_errors(x, SQ_ROW_BLOCK, &step, 1, &error);
    return error;
}

/* A block's bytes of 4 or 6 bits from code + 2^(bits - 1) in wide [SQ_ROW_BLOCK]. */
static void
pack_block(int bits, const int8_t *wide, uint8_t *block)
{
    for (int i = 0; i < HALF_BLOCK; i++) {
        block[i] = (uint8_t)((wide[i] & 15) | (wide[i + HALF_BLOCK] & 15) << 4);
    }
    for (int i = 0; bits == 6 && i < QUARTER_BLOCK; i++) {
        int byte = 0;
        for (int j = 0; j < 4; j++) {
            byte |= wide[i + j * QUARTER_BLOCK] >> 4 << 2 * j;
        }
        block[HALF_BLOCK + i] = (uint8_t)byte;
    }
}

/* x [k rounded up to blocks], zeros behind k, to 4 or 6 bits. */
static void
round_blocks(const struct rows_job *job, const float *x, uint8_t *codes, uint16_t *scales)
{
    const int bits = job->bits;
    for (int64_t b = 0; b * SQ_ROW_BLOCK < job->k; b++) {
        int8_t wide[2][SQ_ROW_BLOCK];
        uint16_t scale[2];
        float negative[SQ_ROW_BLOCK];
        for (int i = 0; i < SQ_ROW_BLOCK; i++) {
            negative[i] = -x[b * SQ_ROW_BLOCK + i];
        }
        const double error =
            round_block(job->kernels, bits, x + b * SQ_ROW_BLOCK, wide[0], &scale[0]);
        const int turned = round_block(job->kernels, bits, negative, wide[1], &scale[1]) < error;
        scales[b] = (uint16_t)(scale[turned] | turned << 15); /* the sign */
        pack_block(bits, wide[turned], codes + sq_code_row_bytes(bits, b * SQ_ROW_BLOCK));
    }
}

/* Keeps the smallest. */
static void
note_bad_row(struct rows_job *job, int64_t row)
{
    int64_t known = atomic_load(&job->bad_row);
    while (row < known && !atomic_compare_exchange_weak(&job->bad_row, &known, row)) {
    }
}

static void
round_rows(void *context, int64_t begin, int64_t end, int thread)
{
    struct rows_job *job = context;
    (void)thread;
    const int64_t padded = sq_round_up(job->k, SQ_ROW_BLOCK);
    float *x = sq_alloc((size_t)padded * sizeof *x);
    if (!x) {
        atomic_store(&job->no_memory, 1);
        return;
    }
    memset(x + job->k, 0, (size_t)(padded - job->k) * sizeof *x);
    for (int64_t row = begin; row < end; row++) {
        if (!widen(job, row, x)) {
            note_bad_row(job, row);
            break;
        }
        uint8_t *codes = job->codes + row * sq_code_row_bytes(job->bits, job->k);
        uint16_t *scales = job->scales + row * sq_code_row_scales(job->k);
        (job->bits == 8 ? round_bytes : round_blocks)(job, x, codes, scales);
    }
    free(x);
}

sq_status
sq_quantize_rows(int bits, sq_dtype dtype, const void *table, int64_t rows, int64_t k,
                 uint8_t *codes, uint16_t *scales, int64_t *bad_row)
{
    int64_t count;
    if (!bad_row || (rows > 0 && (!table || !codes || !scales))) {
        return SQ_ERR_NULL;
    }
    if (dtype != SQ_F32 && dtype != SQ_F16 && dtype != SQ_BF16) {
        return SQ_ERR_DTYPE;
    }
    if (!sq_code_row_bits_valid(bits)) {
        return SQ_ERR_RANGE;
    }
    if (k < 1 || !sq_product(rows, k, &count) || count > INT64_MAX / 8) {
        return SQ_ERR_SHAPE;
    }
    struct rows_job job = {.kernels = sq_kernels_active(),
                           .bits = bits,
                           .dtype = dtype,
                           .table = table,
                           .k = k,
                           .codes = codes,
                           .scales = scales,
                           .bad_row = INT64_MAX};
    sq_parallel_for(rows, sq_max_i64(1, CHUNK_ELEMENTS / k), round_rows, &job);
    *bad_row = atomic_load(&job.bad_row);
    if (atomic_load(&job.no_memory)) {
        return SQ_ERR_NOMEM;
    }
    return *bad_row == INT64_MAX ? SQ_OK : SQ_ERR_NONFINITE;
}
