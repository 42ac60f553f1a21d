/* SPDX-License-Identifier: Apache-2.0 */
/* The Gram matrix of a linear's inputs, in float32 or from inputs of 8 bits.
 *
 * In 8 bits a product of two columns is one row of integers times another, which the packed
 * kernels multiply four times as fast as BLAS does float32. A column of tokens shares a scale, so
 * tokens of about one size are taken together: a massive token would leave the others no codes.
 * Rounding adds an error of its own to each input, 1e-5 of the column's largest square, to the
 * diagonal, which the damping of GPTQ exceeds by far. */
#include "core/sq_internal.h"

#include <math.h>
#include <stdatomic.h>
#include <string.h>

#include "core/sq_blas.h"
#include "core/sq_scratch.h"
#include "core/sq_threads.h"
#include "kernels/sq_kernels.h"
#include "quantize/sq_quantize.h"
#include "core/sq_tiles.h"

enum { TILE = 128, SQUARE = 16 };

struct gram_job {
    const float *x;
    int64_t m, k;
    float *gram;
};

/* The tile at (i, j) into its mirror image, or into its own upper half: squares, so that both sides
 * stay in cache. */
static void
mirror_tile(const struct gram_job *job, int64_t i, int64_t j)
{
    const int64_t k = job->k, end_i = sq_min_i64(i + TILE, k), end_j = sq_min_i64(j + TILE, k);
    for (int64_t r0 = i; r0 < end_i; r0 += SQUARE) {
        for (int64_t c0 = j; c0 < sq_min_i64(end_j, r0 + SQUARE); c0 += SQUARE) {
            for (int64_t c = c0; c < sq_min_i64(c0 + SQUARE, end_j); c++) {
                for (int64_t r = sq_max_i64(r0, c + 1); r < sq_min_i64(r0 + SQUARE, end_i); r++) {
                    job->gram[c * k + r] = job->gram[r * k + c];
                }
            }
        }
    }
}

/* ---- float32 ---------------------------------------------------------------------------- */

static void
gram_tiles(void *context, int64_t begin, int64_t end, int thread)
{
    const struct gram_job *job = context;
    const int64_t k = job->k;
    (void)thread;
    for (int64_t t = begin; t < end; t++) {
        int64_t i, j;
        sq_tile_place(t, &i, &j);
        i *= TILE;
        j *= TILE;
        const int64_t ni = sq_min_i64(TILE, k - i), nj = sq_min_i64(TILE, k - j);
        sq_blas_gemm(1, 0, ni, nj, job->m, 1.0f, job->x + i, k, job->x + j, k, 1.0f,
                     job->gram + i * k + j, k);
    }
}

/* ---- 8 bits ----------------------------------------------------------------------------- */

/* Tokens of one size: the exponent of their root mean square, by threes. Tokens of zeros are of no
 * size. */
enum { SIZE_BITS = 3, EXPONENT_MAX = 1100, TOKENS_MAX = 2048 };
enum { SIZES = EXPONENT_MAX / SIZE_BITS + 1 };

struct codes_job {
    struct gram_job gram;
    const struct sq_kernels *kernels;
    const int32_t *tokens; /* [count] rows of x */
    int64_t count, length; /* length: count, padded to SQ_K_ALIGN */
    int64_t ld;            /* of codes: length, and a line more where rows would share cache sets */
    int8_t *codes;         /* [k, padded to nr][ld], a row is an input's codes of all tokens */
    int32_t *sums;         /* [k, padded][length / SQ_K_ALIGN + 1] */
    float *scales;         /* [k, padded] */
    uint8_t *panels;       /* [panels][nr * length] */
    atomic_int no_memory;
};

/* Inputs of panel p: their columns of x as rows, zeros where there is none. rows [nr][ld]. */
static void
turn_columns(const struct codes_job *job, int64_t p, float *rows, int64_t ld)
{
    const int64_t nr = job->kernels->nr, k = job->gram.k;
    const int64_t columns = sq_min_i64(nr, k - p * nr);
    memset(rows, 0, (size_t)(nr * ld) * sizeof *rows);
    for (int64_t t0 = 0; t0 < job->count; t0 += SQUARE) {
        const int64_t t1 = sq_min_i64(job->count, t0 + SQUARE);
        for (int64_t t = t0; t < t1; t++) {
            const float *x = job->gram.x + job->tokens[t] * k + p * nr;
            for (int64_t j = 0; j < columns; j++) {
                rows[j * ld + t] = x[j];
            }
        }
    }
}

/* Codes, scales, sums and panel of the inputs of each panel. */
static void
code_panels(void *context, int64_t begin, int64_t end, int thread)
{
    struct codes_job *job = context;
    const int64_t nr = job->kernels->nr, length = job->length, sums = length / SQ_K_ALIGN + 1;
    (void)thread;
    const int64_t ld = length + SQUARE; /* else rows share cache sets */
    float *rows = sq_thread_scratch((size_t)(nr * ld) * (sizeof *rows + 1));
    if (!rows) {
        atomic_store(&job->no_memory, 1);
        return;
    }
    int8_t *codes = (int8_t *)(rows + nr * ld);
    for (int64_t p = begin; p < end; p++) {
        turn_columns(job, p, rows, ld);
        for (int64_t j = 0; j < nr; j++) {
            const int64_t input = p * nr + j;
            int8_t *own = codes + j * length;
            (void)sq_quantize_row(job->kernels, 8, 1.0f, rows + j * ld, length, own,
                                  job->scales + input);
            memcpy(job->codes + input * job->ld, own, (size_t)length);
            sq_running_sums(own, length, job->sums + input * sums);
        }
        job->kernels->pack_panel_w8(codes, length, job->panels + p * nr * length);
    }
}

/* Rows of tile (i, j) of the triangle, panel by panel, added to the matrix. */
static void
code_tiles(void *context, int64_t begin, int64_t end, int thread)
{
    const struct codes_job *job = context;
    const int64_t k = job->gram.k, nr = job->kernels->nr, sums = job->length / SQ_K_ALIGN + 1;
    (void)thread;
    for (int64_t t = begin; t < end && !sq_stopped(); t++) {
        int64_t i, j;
        sq_tile_place(t, &i, &j);
        i *= TILE;
        j *= TILE;
        const int64_t rows = sq_min_i64(TILE, k - i);
        _Alignas(SQ_ALIGN_BYTES) float tail[TILE * SQ_NR_MAX];
        for (int64_t c = j; c < sq_min_i64(j + TILE, k); c += nr) {
            const int whole = c + nr <= k;
            struct sq_panel_args args = {.m = rows,
                                         .k = job->length,
                                         .g = job->length,
                                         .a = job->codes + i * job->ld,
                                         .ld_a = job->ld,
                                         .a_scales = job->scales + i,
                                         .a_sums = job->sums + i * sums,
                                         .ld_sums = sums,
                                         .panel = job->panels + c * job->length,
                                         .w_scales = job->scales + c,
                                         .y = whole ? job->gram.gram + i * k + c : tail,
                                         .ld_y = whole ? k : nr,
                                         .accumulate = whole};
            job->kernels->gemm_a8w8(&args);
            for (int64_t r = 0; r < rows && !whole; r++) {
                for (int64_t e = 0; e < k - c; e++) {
                    job->gram.gram[(i + r) * k + c + e] += tail[r * nr + e];
                }
            }
        }
    }
}

/* Adds the tokens of one size. */
static sq_status
add_tokens(struct codes_job *job)
{
    const int64_t nr = job->kernels->nr, panels = sq_ceil_div(job->gram.k, nr);
    job->length = sq_round_up(job->count, SQ_ALIGN_BYTES);
    job->ld = job->length + (job->length / SQ_ALIGN_BYTES % 8 ? 0 : SQ_ALIGN_BYTES);
    sq_parallel_for(panels, 1, code_panels, job);
    if (atomic_load(&job->no_memory)) {
        return SQ_ERR_NOMEM;
    }
    sq_parallel_for(sq_tiles(sq_ceil_div(job->gram.k, TILE)), 1, code_tiles, job);
    return SQ_OK;
}

struct sizes_job {
    const float *x;
    int64_t k;
    int32_t *sizes; /* [m], -1 for a token of zeros */
};

static void
token_sizes(void *context, int64_t begin, int64_t end, int thread)
{
    const struct sizes_job *job = context;
    const int64_t k = job->k;
    (void)thread;
    for (int64_t t = begin; t < end; t++) {
        double square = 0.0;
        for (int64_t i = 0; i < k; i++) {
            square += (double)job->x[t * k + i] * (double)job->x[t * k + i];
        }
        const int exponent = square > 0.0 ? ilogb(square / (double)k) + EXPONENT_MAX : -1;
        job->sizes[t] = exponent < 0 ? -1 : exponent / (2 * SIZE_BITS);
    }
}

static sq_status
gram_in_codes(struct codes_job *job)
{
    const int64_t m = job->gram.m, padded = sq_round_up(job->gram.k, job->kernels->nr);
    const int64_t ld = sq_round_up(sq_min_i64(m, TOKENS_MAX), SQ_ALIGN_BYTES) + SQ_ALIGN_BYTES;
    int32_t *sizes = sq_alloc((size_t)m * sizeof *sizes);
    int32_t *tokens = sq_alloc(TOKENS_MAX * sizeof *tokens);
    job->codes = sq_alloc((size_t)(padded * ld));
    job->sums = sq_alloc((size_t)(padded * (ld / SQ_K_ALIGN + 1)) * sizeof *job->sums);
    job->scales = sq_alloc((size_t)padded * sizeof *job->scales);
    job->panels = sq_alloc((size_t)(padded * ld));
    job->tokens = tokens;
    const int whole = sizes && tokens && job->codes && job->sums && job->scales && job->panels;
    sq_status status = whole ? SQ_OK : SQ_ERR_NOMEM;
    if (whole) {
        struct sizes_job sized = {job->gram.x, job->gram.k, sizes};
        sq_parallel_for(m, sq_max_i64(1, (1 << 14) / job->gram.k), token_sizes, &sized);
    }
    for (int32_t size = 0; size < SIZES && status == SQ_OK; size++) {
        job->count = 0;
        for (int64_t t = 0; t < m && status == SQ_OK; t++) {
            if (sizes[t] == size) {
                tokens[job->count++] = (int32_t)t;
            }
            if (job->count == TOKENS_MAX || (t == m - 1 && job->count)) {
                status = add_tokens(job);
                job->count = 0;
            }
        }
    }
    free(sizes);
    free(tokens);
    free(job->codes);
    free(job->sums);
    free(job->scales);
    free(job->panels);
    return status;
}

/* ---- both ------------------------------------------------------------------------------- */

static void
mirror_tiles(void *context, int64_t begin, int64_t end, int thread)
{
    (void)thread;
    for (int64_t t = begin; t < end; t++) {
        int64_t i, j;
        sq_tile_place(t, &i, &j);
        mirror_tile(context, i * TILE, j * TILE);
    }
}

/* Adds the tokens of job->x to the lower triangle. */
static sq_status
add_block(int bits, const struct gram_job *job)
{
    if (bits == 32) {
        sq_parallel_for(sq_tiles(sq_ceil_div(job->k, TILE)), 1, gram_tiles, (void *)job);
        return SQ_OK;
    }
    struct codes_job codes = {.gram = *job, .kernels = sq_kernels_active()};
    return gram_in_codes(&codes);
}

static sq_status
add_blocks(int bits, const struct sq_weight_transform *transform, const struct gram_job *job)
{
    const int64_t k = job->k, rows = sq_min_i64(job->m, TOKENS_MAX);
    float *turned = transform ? sq_alloc((size_t)(rows * k) * sizeof *turned) : NULL;
    sq_status status = transform && !turned ? SQ_ERR_NOMEM : SQ_OK;
    for (int64_t first = 0; first < job->m && status == SQ_OK; first += rows) {
        struct gram_job block = *job;
        block.x += first * k;
        block.m = sq_min_i64(rows, job->m - first);
        if (transform) {
            int64_t bad_row;
            status = sq_transform_weight(transform, SQ_F32, block.x, block.m, k, turned, &bad_row);
            block.x = turned;
        }
        status = status == SQ_OK ? add_block(bits, &block) : status;
        status = status == SQ_OK ? sq_stop_status() : status;
    }
    free(turned);
    return status;
}

sq_status
sq_gram_update(int bits, const struct sq_weight_transform *transform, const float *x, int64_t m,
               int64_t k, float *gram)
{
    int64_t count;
    if (!gram || (m > 0 && !x)) {
        return SQ_ERR_NULL;
    }
    if (m < 0 || k < 1 || k > SQ_GPTQ_K_MAX || m > INT32_MAX || !sq_product(m, k, &count) ||
        (bits != 8 && bits != 32)) {
        return SQ_ERR_RANGE;
    }
    if (!sq_all_finite(x, count)) {
        return SQ_ERR_NONFINITE;
    }
    struct gram_job job = {x, m, k, gram};
    SQ_TRY(add_blocks(bits, transform, &job));
    if (m) {
        sq_parallel_for(sq_tiles(sq_ceil_div(k, TILE)), 1, mirror_tiles, &job);
    }
    return SQ_OK;
}
