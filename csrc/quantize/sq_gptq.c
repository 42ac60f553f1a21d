/* SPDX-License-Identifier: Apache-2.0 */
/* GPTQ: Gram matrix, its Cholesky factor, and column by column rounding with error feedback.
 *
 * GPTQ (arXiv 2210.17323) rounds column i of W, divides the error by U_ii and subtracts it times
 * U_i,j from every later column j, where U^T U = H^-1, U upper triangular. With R = U^-1, which is
 * upper triangular and H = R R^T, the same values come without any inverse: before column i is
 * rounded it has become
 *     w_i + (sum over earlier j of e_j R_ji) / R_ii,    e_j = w_j - its rounded value,
 * (QuIP, arXiv 2307.13304, theorem 6: GPTQ is LDL feedback). Where a whole group of later columns
 * must be known as GPTQ would have them by then, they are W + T R_GG^-1, T = the sums above.
 *
 * LAPACK factors into lower times upper, so everything is kept in reverse order: row i of L is the
 * i-th last column to be rounded, L L^T = P H P^T, and columns are rounded from k - 1 down. */
#include "core/sq_internal.h"

#include <math.h>
#include <stdatomic.h>

#include "core/sq_blas.h"
#include "core/sq_threads.h"

enum {
    TILE = 256,  /* of the Gram matrix and of the factorisation */
    BLOCK = 128, /* columns between two products with all that was rounded before */
    ROWS = 256,  /* rows of weights that go through all columns together */
    LANES = 32,  /* of these, rows whose columns are rounded side by side: their sums fit 16 KiB */
    DELAY = 4    /* columns whose errors reach the block's other columns together */
};

/* ---- Gram matrix ------------------------------------------------------------------------ */

struct gram_job {
    const float *x;
    int64_t m, k;
    float *gram;
};

/* Tile t of the lower triangle, row by row: (0, 0), (1, 0), (1, 1), (2, 0) ... */
static void
tile_place(int64_t t, int64_t *row, int64_t *column)
{
    int64_t i = (int64_t)((sqrt(8.0 * (double)t + 1.0) - 1.0) / 2.0);
    i -= i * (i + 1) / 2 > t;
    i += (i + 1) * (i + 2) / 2 <= t;
    *row = i;
    *column = t - i * (i + 1) / 2;
}

static int64_t
triangle(int64_t n)
{
    return n * (n + 1) / 2;
}

/* The tile at (i, j) into its mirror image, or into its own upper half: squares of 16, so that both
 * sides stay in cache. */
static void
mirror_tile(const struct gram_job *job, int64_t i, int64_t j)
{
    enum { SQUARE = 16 };
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

static void
gram_tiles(void *context, int64_t begin, int64_t end, int thread)
{
    const struct gram_job *job = context;
    const int64_t k = job->k;
    (void)thread;
    for (int64_t t = begin; t < end; t++) {
        int64_t i, j;
        tile_place(t, &i, &j);
        i *= TILE;
        j *= TILE;
        const int64_t ni = sq_min_i64(TILE, k - i), nj = sq_min_i64(TILE, k - j);
        sq_blas_gemm(1, 0, ni, nj, job->m, 1.0f, job->x + i, k, job->x + j, k, 1.0f,
                     job->gram + i * k + j, k);
        mirror_tile(job, i, j);
    }
}

sq_status
sq_gram_update(const float *x, int64_t m, int64_t k, float *gram)
{
    int64_t count;
    if (!gram || (m > 0 && !x)) {
        return SQ_ERR_NULL;
    }
    if (m < 0 || k < 1 || k > SQ_GPTQ_K_MAX || m > INT32_MAX || !sq_product(m, k, &count)) {
        return SQ_ERR_RANGE;
    }
    if (!sq_all_finite(x, count)) {
        return SQ_ERR_NONFINITE;
    }
    struct gram_job job = {x, m, k, gram};
    if (m) {
        sq_parallel_for(triangle(sq_ceil_div(k, TILE)), 1, gram_tiles, &job);
    }
    return SQ_OK;
}

/* ---- order ------------------------------------------------------------------------------ */

struct ranked {
    float diagonal;
    int32_t index;
};

/* Rising diagonal, since the last row is rounded first; of equals the smaller index goes first,
 * which is to stand last. */
static int
compare_ranked(const void *a, const void *b)
{
    const struct ranked *p = a, *q = b;
    if (p->diagonal != q->diagonal) {
        return p->diagonal < q->diagonal ? -1 : 1;
    }
    return p->index > q->index ? -1 : 1;
}

static sq_status
order_by_diagonal(const float *gram, int64_t k, int32_t *permutation)
{
    struct ranked *ranked = sq_alloc((size_t)k * sizeof *ranked);
    if (!ranked) {
        return SQ_ERR_NOMEM;
    }
    for (int64_t i = 0; i < k; i++) {
        ranked[i] = (struct ranked){gram[i * k + i], (int32_t)i};
    }
    qsort(ranked, (size_t)k, sizeof *ranked, compare_ranked);
    for (int64_t i = 0; i < k; i++) {
        permutation[i] = ranked[i].index;
    }
    free(ranked);
    return SQ_OK;
}

struct permute_job {
    float *gram, *scratch; /* scratch [threads][k] */
    int64_t k;
    const int32_t *permutation;
};

static void
permute_columns(void *context, int64_t begin, int64_t end, int thread)
{
    const struct permute_job *job = context;
    const int64_t k = job->k;
    float *scratch = job->scratch + thread * k;
    for (int64_t r = begin; r < end; r++) {
        float *row = job->gram + r * k;
        memcpy(scratch, row, (size_t)k * sizeof *row);
        for (int64_t c = 0; c < k; c++) {
            row[c] = scratch[job->permutation[c]];
        }
    }
}

/* gram <- P gram P^T in place: columns row by row, then rows along the permutation's cycles. */
static sq_status
permute(float *gram, int64_t k, const int32_t *permutation)
{
    float *scratch = sq_alloc((size_t)(SQ_THREADS_MAX * k) * sizeof *scratch);
    uint8_t *moved = calloc((size_t)k, 1);
    if (!scratch || !moved) {
        free(scratch);
        free(moved);
        return SQ_ERR_NOMEM;
    }
    struct permute_job job = {gram, scratch, k, permutation};
    sq_parallel_for(k, 16, permute_columns, &job);
    const size_t bytes = (size_t)k * sizeof *gram;
    for (int64_t start = 0; start < k; start++) {
        if (moved[start]) {
            continue;
        }
        memcpy(scratch, gram + start * k, bytes);
        int64_t r = start;
        for (; permutation[r] != start; r = permutation[r]) {
            memcpy(gram + r * k, gram + permutation[r] * k, bytes);
            moved[r] = 1;
        }
        memcpy(gram + r * k, scratch, bytes);
        moved[r] = 1;
    }
    free(scratch);
    free(moved);
    return SQ_OK;
}

/* ---- factor ----------------------------------------------------------------------------- */

struct factor_job {
    float *a;
    int64_t k, pivot; /* first row of the tile that was just factored */
};

/* Rows of the panel below the pivot tile: A_i,p <- A_i,p L_pp^-T. */
static void
solve_panel(void *context, int64_t begin, int64_t end, int thread)
{
    const struct factor_job *job = context;
    const int64_t k = job->k, p = job->pivot;
    (void)thread;
    for (int64_t t = begin; t < end; t++) {
        const int64_t i = p + (t + 1) * TILE;
        sq_blas_trsm(1, sq_min_i64(TILE, k - i), TILE, job->a + p * k + p, k, job->a + i * k + p,
                     k);
    }
}

/* Tiles of the trailing lower triangle: A_i,j -= A_i,p A_j,p^T. */
static void
update_trailing(void *context, int64_t begin, int64_t end, int thread)
{
    const struct factor_job *job = context;
    const int64_t k = job->k, p = job->pivot;
    (void)thread;
    for (int64_t t = begin; t < end; t++) {
        int64_t i, j;
        tile_place(t, &i, &j);
        i = p + (i + 1) * TILE;
        j = p + (j + 1) * TILE;
        const int64_t ni = sq_min_i64(TILE, k - i);
        const float *left = job->a + i * k + p, *right = job->a + j * k + p;
        if (i == j) {
            sq_blas_syrk_sub(ni, TILE, left, k, job->a + i * k + i, k);
        }
        else {
            sq_blas_gemm(0, 1, ni, TILE, TILE, -1.0f, left, k, right, k, 1.0f, job->a + i * k + j,
                         k);
        }
    }
}

/* Lower triangle of a [k][k] <- its Cholesky factor, tile by tile, the trailing tiles updated after
 * each. The upper triangle stays. 0, or 1 when a is not positive definite. */
static int
cholesky(float *a, int64_t k)
{
    struct factor_job job = {a, k, 0};
    for (; job.pivot < k; job.pivot += TILE) {
        const int64_t size = sq_min_i64(TILE, k - job.pivot);
        if (sq_blas_potrf(size, a + job.pivot * (k + 1), k)) {
            return 1;
        }
        const int64_t below = sq_ceil_div(k - job.pivot - size, TILE);
        sq_parallel_for(below, 1, solve_panel, &job);
        sq_parallel_for(triangle(below), 1, update_trailing, &job);
    }
    return 0;
}

/* The same in float64, from the upper triangle that cholesky() left alone and the diagonal. */
static sq_status
cholesky_double(float *a, int64_t k, const float *diagonal)
{
    double *wide = sq_alloc((size_t)(k * k) * sizeof *wide);
    if (!wide) {
        return SQ_ERR_NOMEM;
    }
    for (int64_t i = 0; i < k; i++) {
        for (int64_t j = 0; j < i; j++) {
            wide[i * k + j] = a[j * k + i];
        }
        wide[i * k + i] = diagonal[i];
    }
    const int failed = sq_blas_potrf_double(k, wide, k);
    for (int64_t i = 0; i < k && !failed; i++) {
        for (int64_t j = 0; j <= i; j++) {
            a[i * k + j] = (float)wide[i * k + j];
        }
    }
    free(wide);
    return failed ? SQ_ERR_RANGE : SQ_OK;
}

/* Adds damping * mean to the diagonal and copies it out; where all of an input is zero, and nothing
 * is added, 1 stands in for it. */
static sq_status
damp(float *a, int64_t k, float damping, float *diagonal)
{
    double sum = 0.0;
    for (int64_t i = 0; i < k; i++) {
        sum += a[i * (k + 1)];
    }
    const double added = damping * (sum / (double)k);
    for (int64_t i = 0; i < k; i++) {
        float *value = a + i * (k + 1);
        *value = (float)(*value + added);
        *value = *value == 0.0f ? 1.0f : *value;
        diagonal[i] = *value;
    }
    return sq_all_finite(diagonal, k) ? SQ_OK : SQ_ERR_NONFINITE;
}

/* 1 if the diagonal is finite and above the smallest normal number, so that it can be divided by.
 */
static int
usable_factor(const float *factor, int64_t k)
{
    for (int64_t i = 0; i < k; i++) {
        if (!isnormal(factor[i * (k + 1)]) || factor[i * (k + 1)] < 0.0f) {
            return 0;
        }
    }
    return 1;
}

static sq_status
factor_in_place(float *a, int64_t k, float damping)
{
    float *diagonal = sq_alloc((size_t)k * sizeof *diagonal);
    if (!diagonal) {
        return SQ_ERR_NOMEM;
    }
    sq_status status = damp(a, k, damping, diagonal);
    if (status == SQ_OK && cholesky(a, k)) {
        status = cholesky_double(a, k, diagonal);
    }
    free(diagonal);
    if (status == SQ_OK && !usable_factor(a, k)) {
        status = SQ_ERR_RANGE;
    }
    for (int64_t i = 0; i < k && status == SQ_OK; i++) {
        memset(a + i * k + i + 1, 0, (size_t)(k - i - 1) * sizeof *a);
    }
    return status;
}

sq_status
sq_gptq_factor(float *gram, int64_t k, float damping, int by_diagonal, int32_t *permutation)
{
    if (!gram || !permutation) {
        return SQ_ERR_NULL;
    }
    if (k < 1 || k > SQ_GPTQ_K_MAX || !(damping >= 0.0f) || !isfinite(damping)) {
        return SQ_ERR_RANGE;
    }
    if (!sq_all_finite(gram, k * k)) {
        return SQ_ERR_NONFINITE;
    }
    if (by_diagonal) {
        SQ_TRY(order_by_diagonal(gram, k, permutation));
        SQ_TRY(permute(gram, k, permutation));
    }
    else { /* P reverses: so does the flat array */
        for (int64_t i = 0, j = k * k - 1; i < j; i++, j--) {
            const float swap = gram[i];
            gram[i] = gram[j];
            gram[j] = swap;
        }
        for (int64_t i = 0; i < k; i++) {
            permutation[i] = (int32_t)(k - 1 - i);
        }
    }
    return factor_in_place(gram, k, damping);
}

/* ---- rounding --------------------------------------------------------------------------- */

struct round_job {
    struct sq_quantizer q; /* group is a length, never 0 */
    const float *factor, *inv_diagonal;
    const int32_t *permutation;
    const float *weights;
    int64_t n, k;
    int static_scales; /* all scales are known before the first column */
    int8_t *codes;
    float *scales;
    atomic_int status;
};

/* LANES rows side by side: a column's rounding, and what its errors do, are vectors over rows. */
struct lanes {
    float sums[BLOCK][LANES];   /* T of the block's columns */
    float errors[DELAY][LANES]; /* of columns whose later columns wait for them */
};

/* What ROWS rows of weights need. Columns are in the factor's order. */
struct round_state {
    const struct round_job *job;
    int64_t first, rows;
    float *values;         /* [rows][k]: weights, and errors e where a column is rounded */
    float *sums;           /* [rows][BLOCK]: T of the block's columns */
    float *updated;        /* [rows][group]: a group's weights as they have become */
    int8_t *scratch_codes; /* [rows][max(group, k if static)] */
    float *group_scales;   /* [rows] */
    struct lanes *lanes;
};

/* Scales of the state's rows, as sq_quantize finds them for x [rows][length]. */
static sq_status
find_scales(const struct round_state *s, const float *x, int64_t length, float *scales)
{
    return sq_quantize(&s->job->q, x, s->rows, length, s->scratch_codes, scales, NULL);
}

/* T of columns begin .. end - 1 from the errors of all columns behind end. */
static void
sum_errors(const struct round_state *s, int64_t begin, int64_t end, float *sums, int64_t ld)
{
    const int64_t k = s->job->k, width = end - begin;
    if (end == k) {
        for (int64_t r = 0; r < s->rows; r++) {
            memset(sums + r * ld, 0, (size_t)width * sizeof *sums);
        }
        return;
    }
    sq_blas_gemm(0, 0, s->rows, width, k - end, 1.0f, s->values + end, k,
                 s->job->factor + end * k + begin, k, 0.0f, sums, ld);
}

/* Scales of the group of columns begin .. end - 1, none of which is rounded: of W + T L_GG^-1, in
 * stored order (dynamic groups exist in the inputs' own order only, which is reversed here). */
static sq_status
scale_group(const struct round_state *s, int64_t begin, int64_t end, int64_t block)
{
    const struct round_job *job = s->job;
    const int64_t g = end - begin, k = job->k;
    if (block <= begin) {
        for (int64_t r = 0; r < s->rows; r++) {
            memcpy(s->updated + r * g, s->sums + r * BLOCK + begin - block,
                   (size_t)g * sizeof *s->sums);
        }
    }
    else { /* the group is longer than a block */
        sum_errors(s, begin, end, s->updated, g);
    }
    sq_blas_trsm(0, s->rows, g, job->factor + begin * (k + 1), k, s->updated, g);
    for (int64_t r = 0; r < s->rows; r++) {
        float *row = s->updated + r * g;
        const float *values = s->values + r * k + begin;
        for (int64_t i = 0; i < g; i++) {
            row[i] += values[i];
        }
        for (int64_t i = 0; i < g / 2; i++) {
            const float swap = row[i];
            row[i] = row[g - 1 - i];
            row[g - 1 - i] = swap;
        }
    }
    SQ_TRY(find_scales(s, s->updated, g, s->group_scales));
    const int64_t group = (k - end) / g, groups = k / g;
    for (int64_t r = 0; r < s->rows; r++) {
        job->scales[(s->first + r) * groups + group] = s->group_scales[r];
    }
    return SQ_OK;
}

/* Rounds column j of LANES rows from r0 on (count of them exist) and leaves its errors in error. A
 * NaN, possible where sums overflow, becomes the lowest code. */
static void
round_column(const struct round_state *s, int64_t r0, int64_t count, int64_t j,
             const float *restrict sums, float *restrict error)
{
    const struct round_job *job = s->job;
    const int64_t k = job->k, groups = k / job->q.group, input = job->permutation[j];
    const float high = (float)((1 << (job->q.bits - 1)) - 1), low = -high - 1.0f;
    const float rounder = 0x1.8p23f; /* added and taken away, it rounds half to even */
    const float inv_diagonal = job->inv_diagonal[j];
    const float *scales = job->scales + (s->first + r0) * groups + input / job->q.group;
    float scale[LANES] = {0}, value[LANES] = {0}, codes[LANES];
    for (int64_t r = 0; r < count; r++) {
        scale[r] = scales[r * groups];
        value[r] = s->values[(r0 + r) * k + j];
    }
    for (int64_t r = 0; r < LANES; r++) {
        const float inv_scale = scale[r] > 0.0f ? 1.0f / scale[r] : 0.0f;
        float code = (value[r] + sums[r] * inv_diagonal) * inv_scale;
        code = code > low ? code : low;
        code = code < high ? code : high;
        code = (code + rounder) - rounder;
        codes[r] = scale[r] > 0.0f ? code : 0.0f;
        error[r] = value[r] - scale[r] * codes[r];
    }
    for (int64_t r = 0; r < count; r++) {
        s->values[(r0 + r) * k + j] = error[r];
        job->codes[(s->first + r0 + r) * k + input] = (int8_t)codes[r];
    }
}

/* sums [LANES] += errors times l of columns first .. last, the last one first. */
static void
feed_back(int64_t count, const float (*restrict errors)[LANES], const float *l, int64_t ld,
          float *restrict sums)
{
    if (count == DELAY) {
        for (int64_t r = 0; r < LANES; r++) {
            float sum = sums[r];
            for (int64_t d = 0; d < DELAY; d++) {
                sum += errors[d][r] * l[-d * ld];
            }
            sums[r] = sum;
        }
        return;
    }
    for (int64_t d = 0; d < count; d++) {
        for (int64_t r = 0; r < LANES; r++) {
            sums[r] += errors[d][r] * l[-d * ld];
        }
    }
}

/* Rounds columns end - 1 down to begin of count rows from r0 on and feeds the errors back into
 * their sums, which reach down to column block: at once into the DELAY columns that come next, into
 * the others together. Every sum gets its terms in the order of the columns all the same. */
static void
round_lanes(const struct round_state *s, int64_t r0, int64_t count, int64_t begin, int64_t end,
            int64_t block, struct lanes *lanes)
{
    const int64_t k = s->job->k;
    const float *factor = s->job->factor;
    float *sums = s->sums + r0 * BLOCK;
    memset(lanes, 0, sizeof *lanes);
    for (int64_t r = 0; r < count; r++) {
        for (int64_t i = 0; i < end - block; i++) {
            lanes->sums[i][r] = sums[r * BLOCK + i];
        }
    }
    for (int64_t stop = end, first; stop > begin; stop = first) {
        first = sq_max_i64(begin, stop - DELAY);
        for (int64_t j = stop - 1; j >= first; j--) {
            round_column(s, r0, count, j, lanes->sums[j - block], lanes->errors[stop - 1 - j]);
            for (int64_t i = first; i < j; i++) {
                feed_back(1, (const float(*)[LANES])lanes->errors[stop - 1 - j], factor + j * k + i,
                          k, lanes->sums[i - block]);
            }
        }
        for (int64_t i = block; i < first; i++) {
            feed_back(stop - first, (const float(*)[LANES])lanes->errors,
                      factor + (stop - 1) * k + i, k, lanes->sums[i - block]);
        }
    }
    for (int64_t r = 0; r < count; r++) {
        for (int64_t i = 0; i < begin - block; i++) {
            sums[r * BLOCK + i] = lanes->sums[i][r];
        }
    }
}

/* First column of the block that ends at end: blocks hold whole groups or lie within one. */
static int64_t
block_begin(const struct round_job *job, int64_t end)
{
    const int64_t group = job->q.group;
    if (job->static_scales) {
        return sq_max_i64(0, end - BLOCK);
    }
    if (group > BLOCK) {
        return sq_max_i64((end - 1) / group * group, end - BLOCK);
    }
    return sq_max_i64(0, end - BLOCK / group * group);
}

static sq_status
round_columns(const struct round_state *s)
{
    const struct round_job *job = s->job;
    for (int64_t end = job->k, block; end > 0; end = block) {
        block = block_begin(job, end);
        sum_errors(s, block, end, s->sums, BLOCK);
        for (int64_t stop = end, begin; stop > block; stop = begin) {
            begin = block;
            if (!job->static_scales) {
                const int64_t group_begin = (stop - 1) / job->q.group * job->q.group;
                begin = sq_max_i64(block, group_begin);
                if (stop % job->q.group == 0) {
                    SQ_TRY(scale_group(s, group_begin, stop, block));
                }
            }
            for (int64_t r = 0; r < s->rows; r += LANES) {
                round_lanes(s, r, sq_min_i64(LANES, s->rows - r), begin, stop, block, s->lanes);
            }
        }
    }
    return SQ_OK;
}

static sq_status
round_rows(struct round_state *s)
{
    const struct round_job *job = s->job;
    const int64_t k = job->k;
    const float *weights = job->weights + s->first * k;
    if (job->static_scales) {
        SQ_TRY(find_scales(s, weights, k, job->scales + s->first * (k / job->q.group)));
    }
    for (int64_t r = 0; r < s->rows; r++) {
        for (int64_t i = 0; i < k; i++) {
            s->values[r * k + i] = weights[r * k + job->permutation[i]];
        }
    }
    return round_columns(s);
}

static void
round_chunk(void *context, int64_t begin, int64_t end, int thread)
{
    struct round_job *job = context;
    (void)thread;
    const int64_t rows = end - begin, length = job->static_scales ? job->k : job->q.group;
    struct round_state s = {.job = job, .first = begin, .rows = rows};
    s.values = sq_alloc((size_t)(rows * job->k) * sizeof(float));
    s.sums = sq_alloc((size_t)(rows * BLOCK) * sizeof(float));
    s.updated = sq_alloc((size_t)(rows * job->q.group) * sizeof(float));
    s.scratch_codes = sq_alloc((size_t)(rows * length));
    s.group_scales = sq_alloc((size_t)rows * sizeof(float));
    s.lanes = sq_alloc(sizeof *s.lanes);
    sq_status status = SQ_ERR_NOMEM;
    if (s.values && s.sums && s.updated && s.scratch_codes && s.group_scales && s.lanes) {
        status = round_rows(&s);
    }
    if (status != SQ_OK) {
        atomic_store(&job->status, status);
    }
    free(s.values);
    free(s.sums);
    free(s.updated);
    free(s.scratch_codes);
    free(s.group_scales);
    free(s.lanes);
}

/* 1 if permutation holds each of 0 .. k - 1 once, 0 if not, -1 without memory; *reversed tells the
 * inputs' own order. */
static int
check_permutation(const int32_t *permutation, int64_t k, int *reversed)
{
    uint8_t *seen = calloc((size_t)k, 1);
    if (!seen) {
        return -1;
    }
    int valid = 1;
    *reversed = 1;
    for (int64_t i = 0; i < k && valid; i++) {
        const int32_t p = permutation[i];
        valid = p >= 0 && p < k && !seen[p];
        if (valid) {
            seen[p] = 1;
        }
        *reversed &= p == k - 1 - i;
    }
    free(seen);
    return valid;
}

sq_status
sq_gptq_round(const struct sq_quantizer *q, const float *factor, const int32_t *permutation,
              const float *weights, int64_t n, int64_t k, int8_t *codes, float *scales)
{
    if (!q || !factor || !permutation || (n > 0 && (!weights || !codes || !scales))) {
        return SQ_ERR_NULL;
    }
    int64_t count;
    const int64_t group = q->group ? q->group : k;
    if (k < 1 || k > SQ_GPTQ_K_MAX || group < 1 || k % group || !sq_product(n, k, &count)) {
        return SQ_ERR_SHAPE;
    }
    int own_order;
    const int valid = check_permutation(permutation, k, &own_order);
    if (valid < 0) {
        return SQ_ERR_NOMEM;
    }
    if (!valid || (q->bits != 4 && q->bits != 8) || !q->symmetric || !usable_factor(factor, k)) {
        return SQ_ERR_RANGE;
    }
    if (!sq_all_finite(weights, count) || !sq_all_finite(factor, k * k)) {
        return SQ_ERR_NONFINITE;
    }
    float *inv_diagonal = sq_alloc((size_t)k * sizeof *inv_diagonal);
    if (!inv_diagonal) {
        return SQ_ERR_NOMEM;
    }
    for (int64_t i = 0; i < k; i++) {
        inv_diagonal[i] = 1.0f / factor[i * (k + 1)];
    }
    struct round_job job = {.q = *q,
                            .factor = factor,
                            .inv_diagonal = inv_diagonal,
                            .permutation = permutation,
                            .weights = weights,
                            .n = n,
                            .k = k,
                            .static_scales = group == k || !own_order,
                            .codes = codes,
                            .scales = scales};
    job.q.group = group;
    sq_parallel_for(n, ROWS, round_chunk, &job);
    free(inv_diagonal);
    return (sq_status)atomic_load(&job.status);
}
