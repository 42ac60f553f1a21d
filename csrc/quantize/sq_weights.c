/* SPDX-License-Identifier: Apache-2.0 */
/* A stored weight to packed words: widened, scaled, rotated, rounded and packed in cache. */
#include "quantize/sq_quantize.h"

#include <stdatomic.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "core/sq_internal.h"
#include "kernels/sq_kernels.h"
#include "core/sq_threads.h"

enum {
    /* Elements of a block of rows: with the rotation's own copy 256 KiB, which leaves a
     * second-level cache room for factors, words and the rows that come next. At least one row. */
    BLOCK_ELEMENTS = 1 << 15,
    WORKERS = 64
};

/* out is set for transformed rows, words and scales for packed ones. */
struct weight_job {
    const struct sq_kernels *kernels;
    const struct sq_quantizer *q;
    const struct sq_weight_transform *transform;
    sq_dtype dtype;
    const char *weight;
    int64_t n, k, block; /* block: rows at a time */
    int32_t *words;
    float *scales, *out;
    size_t rows_bytes, rotate_bytes, fixed_bytes, codes_bytes;
    _Atomic int64_t next, bad_row;
    atomic_int status;
};

/* One worker's scratch. */
struct weight_scratch {
    float *x; /* [block][k] */
    void *rotate;
    int16_t *fixed; /* sq_quantize_scratch(g) */
    uint8_t *codes; /* [k], 2^(bits - 1) added */
};

static size_t
element_bytes(sq_dtype dtype)
{
    return dtype == SQ_F32 ? sizeof(float) : sizeof(uint16_t);
}

/* One row into x; 1 if all of it is finite. */
static int
widen(const struct weight_job *job, const void *row, float *x)
{
    if (job->dtype == SQ_F32) {
        memcpy(x, row, (size_t)job->k * sizeof *x);
        return sq_all_finite(x, job->k);
    }
    return (job->dtype == SQ_F16 ? job->kernels->f16_to_f32 : job->kernels->bf16_to_f32)(row,
                                                                                         job->k, x);
}

static void
scale_row(const struct sq_weight_transform *t, int64_t row, int64_t k, float *restrict x)
{
    const float *restrict columns = t->columns;
    for (int64_t j = 0; columns && j < k; j++) {
        x[j] *= columns[j];
    }
    for (int64_t j = 0; t->rows && j < k; j++) {
        x[j] *= t->rows[row];
    }
}

/* Rows first .. first + rows - 1 as they are to be rounded, in x. The number of the first row of
 * NaN or Inf goes to *bad. */
static sq_status
load_rows(const struct weight_job *job, int64_t first, int64_t rows, float *x, void *workspace,
          int64_t *bad)
{
    const struct sq_weight_transform *t = job->transform;
    const size_t row_bytes = (size_t)job->k * element_bytes(job->dtype);
    for (int64_t r = 0; r < rows; r++) {
        if (!widen(job, job->weight + (size_t)(first + r) * row_bytes, x + r * job->k)) {
            *bad = first + r;
            return SQ_ERR_NONFINITE;
        }
        scale_row(t, first + r, job->k, x + r * job->k);
    }
    return t->rotation ? sq_rotate_serially(t->rotation, x, rows, workspace) : SQ_OK;
}

/* One row's groups to words and scales; 0 if it holds NaN or Inf. */
static int
pack_row(const struct weight_job *job, int64_t row, const float *x, const struct weight_scratch *s)
{
    const int64_t k = job->k, group = job->q->group ? job->q->group : k, groups = k / group;
    const int bits = job->q->bits;
    for (int64_t g = 0; g < groups; g++) {
        int32_t zero;
        if (!sq_quantize_group(job->kernels, job->q, x + g * group, group, 1 << (bits - 1),
                               s->fixed, (int8_t *)s->codes + g * group,
                               job->scales + row * groups + g, &zero)) {
            return 0;
        }
    }
    sq_pack_row(bits, s->codes, k, job->words + row * sq_packed_words(bits, k));
    return 1;
}

static sq_status
do_block(const struct weight_job *job, int64_t first, const struct weight_scratch *s, int64_t *bad)
{
    const int64_t k = job->k, rows = sq_min_i64(job->block, job->n - first);
    float *x = job->out ? job->out + first * k : s->x;
    SQ_TRY(load_rows(job, first, rows, x, s->rotate, bad));
    for (int64_t r = 0; r < rows; r++) {
        const int fine =
            job->out ? sq_all_finite(x + r * k, k) : pack_row(job, first + r, x + r * k, s);
        if (!fine) {
            *bad = first + r;
            return SQ_ERR_NONFINITE;
        }
    }
    return SQ_OK;
}

/* Keeps the smallest. */
static void
note_bad_row(struct weight_job *job, int64_t row)
{
    int64_t known = atomic_load(&job->bad_row);
    while (row < known && !atomic_compare_exchange_weak(&job->bad_row, &known, row)) {
    }
}

/* Workers are items, so that their scratch does not depend on who runs them. They draw blocks from
 * the first to the last, so that when one fails all earlier blocks are done or in work. */
static void
weight_worker(void *context, int64_t begin, int64_t end, int thread)
{
    struct weight_job *job = context;
    (void)thread;
    char *scratch =
        sq_alloc(job->rows_bytes + job->rotate_bytes + job->fixed_bytes + job->codes_bytes);
    if (!scratch) {
        atomic_store(&job->status, SQ_ERR_NOMEM);
        return;
    }
    const struct weight_scratch s = {
        .x = (float *)scratch,
        .rotate = scratch + job->rows_bytes,
        .fixed = (int16_t *)(scratch + job->rows_bytes + job->rotate_bytes),
        .codes = (uint8_t *)scratch + job->rows_bytes + job->rotate_bytes + job->fixed_bytes};
    const int64_t blocks = sq_ceil_div(job->n, job->block);
    sq_status status = SQ_OK;
    for (int64_t worker = begin; worker < end && status == SQ_OK; worker++) {
        for (int64_t b; status == SQ_OK && (b = atomic_fetch_add(&job->next, 1)) < blocks;) {
            int64_t bad = INT64_MAX;
            status = do_block(job, b * job->block, &s, &bad);
            note_bad_row(job, bad);
            status = status == SQ_OK ? sq_stop_status() : status;
        }
    }
    if (status != SQ_OK) {
        atomic_store(&job->next, blocks);
        atomic_store(&job->status, (int)status);
    }
    free(scratch);
}

/* Sizes of the job, then the loop. */
static sq_status
run(struct weight_job *job, int64_t *bad_row)
{
    const struct sq_weight_transform *t = job->transform;
    const int64_t k = job->k, n = job->n;
    if (t->rotation && t->rotation->k != k) {
        return SQ_ERR_SHAPE;
    }
    /* no longer than a worker's share, so that few rows still occupy all */
    const int64_t workers = sq_min_i64(sq_min_i64(sq_get_num_threads(), WORKERS), n);
    const int64_t share = workers ? sq_ceil_div(n, workers) : 1;
    job->block = sq_max_i64(1, sq_min_i64(BLOCK_ELEMENTS / k, share));
    job->rows_bytes = job->out ? 0 : sq_align_bytes((size_t)(job->block * k) * sizeof(float));
    job->rotate_bytes = sq_rotation_serial_bytes(t->rotation, job->block);
    if (job->rotate_bytes >= SIZE_MAX / 2) {
        return SQ_ERR_RANGE;
    }
    job->rotate_bytes = sq_align_bytes(job->rotate_bytes);
    const int64_t group = job->q && job->q->group ? job->q->group : k;
    job->fixed_bytes = sq_align_bytes((size_t)sq_quantize_scratch(group) * sizeof(int16_t));
    job->codes_bytes = sq_align_bytes((size_t)k);
    job->kernels = sq_kernels_active();
    atomic_store(&job->bad_row, INT64_MAX);
    sq_parallel_for(workers, 1, weight_worker, job);
    *bad_row = atomic_load(&job->bad_row);
    return (sq_status)atomic_load(&job->status);
}

/* SQ_OK if the arguments that both functions share can be used. */
static sq_status
check(const struct sq_weight_transform *t, sq_dtype dtype, const void *weight, int64_t n, int64_t k,
      const void *out, const int64_t *bad_row)
{
    int64_t count;
    if (!t || !bad_row || (n > 0 && (!weight || !out))) {
        return SQ_ERR_NULL;
    }
    if (dtype != SQ_F32 && dtype != SQ_F16 && dtype != SQ_BF16) {
        return SQ_ERR_DTYPE;
    }
    if (t->rotation) {
        SQ_TRY(sq_rotation_check(t->rotation));
    }
    return k < 1 || !sq_product(n, k, &count) || count > INT64_MAX / 8 ? SQ_ERR_SHAPE : SQ_OK;
}

sq_status
sq_quantize_weight(const struct sq_quantizer *q, const struct sq_weight_transform *transform,
                   sq_dtype dtype, const void *weight, int64_t n, int64_t k, int32_t *words,
                   float *scales, int64_t *bad_row)
{
    if (!q || (n > 0 && !scales)) {
        return SQ_ERR_NULL;
    }
    SQ_TRY(check(transform, dtype, weight, n, k, words, bad_row));
    if (!q->symmetric) {
        return SQ_ERR_RANGE;
    }
    SQ_TRY(sq_quantizer_check(q, k));
    struct weight_job job = {.q = q,
                             .transform = transform,
                             .dtype = dtype,
                             .weight = weight,
                             .n = n,
                             .k = k,
                             .words = words,
                             .scales = scales};
    return run(&job, bad_row);
}

sq_status
sq_transform_weight(const struct sq_weight_transform *transform, sq_dtype dtype, const void *weight,
                    int64_t n, int64_t k, float *out, int64_t *bad_row)
{
    SQ_TRY(check(transform, dtype, weight, n, k, out, bad_row));
    struct weight_job job = {
        .transform = transform, .dtype = dtype, .weight = weight, .n = n, .k = k, .out = out};
    return run(&job, bad_row);
}

void
sq_will_need(const void *address, size_t bytes)
{
    const uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
    const uintptr_t begin = (uintptr_t)address & ~(page - 1);
    if (bytes) { /* advice only: what cannot be read ahead is read in time */
        (void)madvise((void *)begin, (uintptr_t)address + bytes - begin, MADV_WILLNEED);
    }
}
