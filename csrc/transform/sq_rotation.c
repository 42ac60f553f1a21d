/* SPDX-License-Identifier: Apache-2.0 */
/* Rotations applied to rows: chains, Kronecker products of two factors, alone or behind blocks, and
 * blocks around a permutation. */
#include <math.h>
#include <stdatomic.h>
#include <string.h>

#include "core/sq_internal.h"
#include "kernels/sq_kernels.h"
#include "core/sq_threads.h"

/* Rotations whose cosines and sines are computed at a time, and elements of one chunk of rows. */
#define SQ_CHAIN_TILE 256
#define SQ_CHAIN_GRAIN 32768
/* Elements of one block of rows. Kronecker: input, half-way and result, 128 KiB of float32 each,
 * stay in the second-level cache; blocks: the two copies. */
#define SQ_ROTATE_BLOCK 32768
#define SQ_ROTATE_BLOCKS_BLOCK 65536
#define SQ_ROTATE_BLOCK_ROWS 64
/* Multiply-adds of one strip of a token, when there are fewer tokens than threads. */
#define SQ_STRIP_WORK 65536
/* Workers that one application has scratch for. */
#define SQ_ROTATE_WORKERS 64
/* A worker's scratch is at most k + 3 k doubles and, as blocks of several rows hold at most
 * SQ_ROTATE_BLOCKS_BLOCK elements, twice max(k, SQ_ROTATE_BLOCKS_BLOCK) floats, each rounded up to
 * SQ_ALIGN_BYTES: at most 40 k bytes, 512 KiB and four alignments, so all stays below 2^63. */
_Static_assert((40 * SQ_ROTATION_K_MAX + (1 << 19) + 4 * SQ_ALIGN_BYTES) <=
                   INT64_MAX / SQ_ROTATE_WORKERS,
               "the workspace of sq_rotate fits int64_t");

/* ---- chains ----------------------------------------------------------------------------- */

static int
pairs_in_range(const int32_t *pairs, int64_t steps, int64_t n)
{
    for (int64_t t = 0; t < steps; t++) {
        const int32_t i = pairs[2 * t], j = pairs[2 * t + 1];
        if (i < 0 || j < 0 || i >= n || j >= n || i == j) {
            return 0;
        }
    }
    return 1;
}

struct chain_job {
    const int32_t *pairs;
    const double *angles;
    int64_t steps, n;
    double *x;
};

/* Cosines and sines are made a tile at a time, on the stack, and serve all rows of the chunk. */
static void
chain_rows(void *context, int64_t begin, int64_t end, int thread)
{
    const struct chain_job *job = context;
    double c[SQ_CHAIN_TILE], s[SQ_CHAIN_TILE];
    (void)thread;
    for (int64_t first = 0; first < job->steps && !sq_stopped(); first += SQ_CHAIN_TILE) {
        const int64_t count = sq_min_i64(SQ_CHAIN_TILE, job->steps - first);
        const int32_t *pairs = job->pairs + 2 * first;
        for (int64_t t = 0; t < count; t++) {
            c[t] = cos(job->angles[first + t]);
            s[t] = sin(job->angles[first + t]);
        }
        for (int64_t row = begin; row < end; row++) {
            double *v = job->x + row * job->n;
            for (int64_t t = 0; t < count; t++) {
                double *a = v + pairs[2 * t], *b = v + pairs[2 * t + 1];
                const double va = *a, vb = *b;
                *a = c[t] * va - s[t] * vb;
                *b = s[t] * va + c[t] * vb;
            }
        }
    }
}

sq_status
sq_chain_apply(const int32_t *pairs, const double *angles, int64_t g, double *x, int64_t rows,
               int64_t n)
{
    int64_t count;
    if (!pairs || !angles || !x) {
        return SQ_ERR_NULL;
    }
    if (g < 0 || rows < 0 || n < 0 || n > INT32_MAX || !sq_product(rows, n, &count) ||
        !pairs_in_range(pairs, g, n)) {
        return SQ_ERR_RANGE;
    }
    if (!sq_all_finite_f64(angles, g)) {
        return SQ_ERR_NONFINITE;
    }
    struct chain_job job = {pairs, angles, g, n, x};
    /* at least 64 rows share a tile's cosines */
    const int64_t grain = sq_max_i64(64, SQ_CHAIN_GRAIN / sq_max_i64(1, n));
    sq_parallel_for(count ? rows : 0, grain, chain_rows, &job);
    return SQ_OK;
}

/* ---- what a rotation is made of --------------------------------------------------------- */

/* A factor that leaves its axis as it is: an empty chain, or the matrix of order 1. */
static int
is_trivial(const struct sq_factor *f)
{
    return f->matrix ? f->order == 1 && f->matrix[0] == 1.0f : !f->hadamard && !f->steps;
}

/* A Sylvester Hadamard: the table's fast transform. */
static int
is_sylvester(const struct sq_factor *f)
{
    return !f->matrix && f->hadamard && !f->steps && !(f->order & (f->order - 1));
}

/* A factor that is computed in float64. */
static int
is_wide(const struct sq_factor *f)
{
    return !f->matrix && !is_sylvester(f);
}

void
sq_transpose(const float *restrict a, int64_t n, float *restrict out)
{
    enum { TILE = 16 };
    for (int64_t i0 = 0; i0 < n; i0 += TILE) {
        for (int64_t j0 = 0; j0 < n; j0 += TILE) {
            for (int64_t i = i0; i < sq_min_i64(i0 + TILE, n); i++) {
                for (int64_t j = j0; j < sq_min_i64(j0 + TILE, n); j++) {
                    out[j * n + i] = a[i * n + j];
                }
            }
        }
    }
}

static int
factor_fits(const struct sq_factor *f)
{
    SQ_ASSERT(f->matrix || pairs_in_range(f->pairs, f->steps, f->order));
    return f->order >= 1 && f->order <= INT32_MAX &&
           (f->matrix || (f->steps >= 0 && (!f->steps || (f->pairs && f->cos_sin))));
}

static sq_status
check_factors(const struct sq_rotation *r)
{
    int64_t k;
    if (!factor_fits(&r->left) || !factor_fits(&r->right) ||
        !sq_product(r->left.order, r->right.order, &k) || k != r->k) {
        return SQ_ERR_SHAPE;
    }
    return r->right.matrix && !r->right.matrix_t ? SQ_ERR_NULL : SQ_OK;
}

static sq_status
check_blocks(const struct sq_rotation *r)
{
    const struct sq_block_rotation *b = &r->blocks;
    if (!b->first || (r->kind == SQ_BLOCKS && (!b->permutation || !b->second))) {
        return SQ_ERR_NULL;
    }
    return b->b < 1 || b->b > SQ_DUQUANT_B_MAX || r->k % b->b ? SQ_ERR_SHAPE : SQ_OK;
}

sq_status
sq_rotation_check(const struct sq_rotation *r)
{
    if (!r) {
        return SQ_ERR_NULL;
    }
    if (r->kind != SQ_KRONECKER && r->kind != SQ_BLOCKS && r->kind != SQ_ALIGNED) {
        return SQ_ERR_RANGE;
    }
    if (r->kind != SQ_BLOCKS) {
        SQ_TRY(check_factors(r));
    }
    if (r->kind != SQ_KRONECKER) {
        SQ_TRY(check_blocks(r));
    }
    return r->k < 1 || r->k > SQ_ROTATION_K_MAX ? SQ_ERR_RANGE : SQ_OK;
}

/* ---- a block of rows -------------------------------------------------------------------- */

/* Where the parts of one worker's scratch lie. */
struct scratch_layout {
    int64_t block; /* rows per block */
    size_t wide_bytes, transform_bytes, block_bytes, total_bytes;
};

/* For at most `rows` rows per block. */
static struct scratch_layout
scratch_layout(const struct sq_rotation *r, int64_t rows)
{
    const int is_blocks = r->kind == SQ_BLOCKS;
    const int64_t elements = is_blocks ? SQ_ROTATE_BLOCKS_BLOCK : SQ_ROTATE_BLOCK;
    const int64_t most = sq_min_i64(SQ_ROTATE_BLOCK_ROWS, elements / r->k);
    const int chains = !is_blocks && (is_wide(&r->left) || is_wide(&r->right));
    const int64_t larger = chains ? sq_max_i64(r->left.order, r->right.order) : 0;
    struct scratch_layout s = {.block = sq_max_i64(1, sq_min_i64(most, rows))};
    s.wide_bytes = chains ? sq_align_bytes((size_t)r->k * sizeof(double)) : 0;
    s.transform_bytes = sq_align_bytes((size_t)(3 * larger) * sizeof(double));
    s.block_bytes = sq_align_bytes((size_t)(s.block * r->k) * sizeof(float));
    s.total_bytes = s.wide_bytes + s.transform_bytes + 2 * s.block_bytes;
    return s;
}

/* Everything a block of rows needs; y may be x. */
struct rotate_job {
    const struct sq_kernels *kernels;
    const struct sq_rotation *rotation;
    struct scratch_layout layout;
    const float *x;
    float *y; /* NULL: the rows go to fn */
    sq_rows_fn fn;
    void *context;
    int64_t m;
    char *scratch; /* one layout.total_bytes per worker */
    _Atomic int64_t next;
};

/* wide [count][order] <- chain(H v) for each row, in float64: a chain may be thousands of steps. */
static void
transform_wide(const struct sq_factor *f, double *wide, int64_t count, double *workspace)
{
    if (f->hadamard) { /* sizes are checked: it cannot fail */
        sq_hadamard_transform(wide, count, f->order, workspace);
    }
    for (int64_t r = 0; r < count && !sq_stopped(); r++) {
        double *v = wide + r * f->order;
        for (int64_t t = 0; t < f->steps; t++) {
            double *a = v + f->pairs[2 * t], *b = v + f->pairs[2 * t + 1];
            const double c = (double)f->cos_sin[2 * t], s = (double)f->cos_sin[2 * t + 1];
            const double va = *a, vb = *b;
            *a = c * va - s * vb;
            *b = s * va + c * vb;
        }
    }
}

/* out [k1][k2] = L x; out is not x. */
static void
apply_left(const struct rotate_job *job, const float *x, float *out, double *wide,
           double *workspace)
{
    const struct sq_factor *left = &job->rotation->left;
    const int64_t k1 = left->order, k2 = job->rotation->right.order;
    if (is_trivial(left)) {
        memcpy(out, x, (size_t)(k1 * k2) * sizeof *out);
        return;
    }
    if (left->matrix) {
        job->kernels->gemm_f32(k1, k2, k1, left->matrix, k1, x, k2, out, k2);
        return;
    }
    if (is_sylvester(left)) {
        memcpy(out, x, (size_t)(k1 * k2) * sizeof *out);
        job->kernels->sylvester(out, k1 * k2, k2, k1 * k2, (float)(1.0 / sqrt((double)k1)));
        return;
    }
    for (int64_t i = 0; i < k1; i++) {
        for (int64_t j = 0; j < k2; j++) {
            wide[j * k1 + i] = (double)x[i * k2 + j];
        }
    }
    transform_wide(left, wide, k2, workspace);
    for (int64_t i = 0; i < k1; i++) {
        for (int64_t j = 0; j < k2; j++) {
            out[i * k2 + j] = (float)wide[j * k1 + i];
        }
    }
}

/* out [rows][k1][k2] = x R^T for a Sylvester R; out may be x. */
static void
sylvester_right(const struct rotate_job *job, const float *x, int64_t rows, float *out)
{
    const int64_t k = job->rotation->k, k2 = job->rotation->right.order;
    const float scale = (float)(1.0 / sqrt((double)k2));
    for (int64_t r = 0; r < rows; r++, x += k, out += k) {
        if (out != x) {
            memcpy(out, x, (size_t)k * sizeof *out);
        }
        job->kernels->sylvester(out, k, 1, k2, scale);
    }
}

/* out [rows][k1][k2] = x R^T for a block of rows at once; out is not x. */
static void
apply_right(const struct rotate_job *job, const float *x, int64_t rows, float *out, double *wide,
            double *workspace)
{
    const struct sq_factor *right = &job->rotation->right;
    const int64_t k = job->rotation->k, k2 = right->order, k1 = k / k2;
    if (is_trivial(right)) {
        memcpy(out, x, (size_t)(rows * k) * sizeof *out);
        return;
    }
    if (right->matrix) {
        job->kernels->gemm_f32(rows * k1, k2, k2, x, k2, right->matrix_t, k2, out, k2);
        return;
    }
    if (is_sylvester(right)) {
        sylvester_right(job, x, rows, out);
        return;
    }
    for (int64_t r = 0; r < rows; r++, x += k, out += k) {
        for (int64_t i = 0; i < k; i++) {
            wide[i] = (double)x[i];
        }
        transform_wide(right, wide, k1, workspace);
        for (int64_t i = 0; i < k; i++) {
            out[i] = (float)wide[i];
        }
    }
}

/* out [rows][k] = x blockdiag(blocks); an element is one chain over b, whatever rows is. */
static void
multiply_blocks(const struct rotate_job *job, const float *blocks, const float *x, int64_t rows,
                float *out)
{
    const int64_t k = job->rotation->k, b = job->rotation->blocks.b;
    for (int64_t j = 0; j < k / b; j++) {
        job->kernels->gemm_f32(rows, b, b, x + j * b, k, blocks + j * b * b, b, out + j * b, k);
    }
}

/* out [rows][k] = x, its channels at the places of the permutation. */
static void
permute(const struct sq_rotation *r, const float *x, int64_t rows, float *out)
{
    const int32_t *permutation = r->blocks.permutation;
    for (int64_t t = 0; t < rows; t++, x += r->k, out += r->k) {
        for (int64_t i = 0; i < r->k; i++) {
            out[i] = x[permutation[i]];
        }
    }
}

/* out [rows][k] = L X R^T of each row, by way of half [rows][k], which is neither; out may be x. */
static void
apply_factors(const struct rotate_job *job, const float *x, int64_t rows, float *half, float *out,
              char *scratch)
{
    const int64_t k = job->rotation->k;
    if (is_trivial(&job->rotation->left) && is_sylvester(&job->rotation->right)) {
        sylvester_right(job, x, rows, out);
        return;
    }
    double *wide = (double *)(void *)scratch;
    double *workspace = (double *)(void *)(scratch + job->layout.wide_bytes);
    float *first = is_trivial(&job->rotation->right) && out != x ? out : half;
    for (int64_t i = 0; i < rows; i++) {
        apply_left(job, x + i * k, first + i * k, wide, workspace);
    }
    if (first == half) {
        apply_right(job, half, rows, out, wide, workspace);
    }
}

/* Rows first .. first + rows - 1, rotated, to y or to fn: the one place that tells the kinds
 * apart. The two copies a and b of the scratch are at most layout.block rows. y may be x. */
static void
rotate_block(const struct rotate_job *job, int64_t first, int64_t rows, char *scratch)
{
    const struct scratch_layout *layout = &job->layout;
    const struct sq_rotation *r = job->rotation;
    const float *x = job->x + first * r->k;
    float *a = (float *)(void *)(scratch + layout->wide_bytes + layout->transform_bytes);
    float *b = a + layout->block_bytes / sizeof(float);
    const int odd = r->kind == SQ_BLOCKS || (r->kind == SQ_ALIGNED && !is_trivial(&r->right));
    float *out = job->y ? job->y + first * r->k : odd ? a : b; /* by the number of products */
    if (r->kind == SQ_BLOCKS) {
        multiply_blocks(job, r->blocks.first, x, rows, a);
        permute(r, a, rows, b);
        multiply_blocks(job, r->blocks.second, b, rows, out);
    }
    else if (r->kind == SQ_ALIGNED) {
        multiply_blocks(job, r->blocks.first, x, rows, a);
        apply_factors(job, a, rows, b, out, scratch);
    }
    else {
        apply_factors(job, x, rows, a, out, scratch);
    }
    if (!job->y) {
        job->fn(job->context, first, rows, out);
    }
}

/* ---- all rows --------------------------------------------------------------------------- */

/* Workers are items, so that their scratch does not depend on who runs them; they draw blocks. */
static void
rotate_worker(void *context, int64_t begin, int64_t end, int thread)
{
    struct rotate_job *job = context;
    const int64_t block = job->layout.block, blocks = sq_ceil_div(job->m, block);
    (void)thread;
    for (int64_t worker = begin; worker < end; worker++) {
        char *scratch = job->scratch + (size_t)worker * job->layout.total_bytes;
        for (int64_t i; !sq_stopped() && (i = atomic_fetch_add(&job->next, 1)) < blocks;) {
            rotate_block(job, i * block, sq_min_i64(block, job->m - i * block), scratch);
        }
    }
}

/* Rows begin .. end - 1 of one token's L X R^T: each needs its own row of L only. */
static void
rotate_strip(void *context, int64_t begin, int64_t end, int thread)
{
    const struct rotate_job *job = context;
    const struct sq_factor *left = &job->rotation->left, *right = &job->rotation->right;
    const int64_t k1 = left->order, k2 = right->order, rows = end - begin;
    float *half = (float *)(void *)job->scratch + begin * k2;
    float *out = half + job->layout.block_bytes / sizeof(float);
    (void)thread;
    job->kernels->gemm_f32(rows, k2, k1, left->matrix + begin * k1, k1, job->x, k2, half, k2);
    job->kernels->gemm_f32(rows, k2, k2, half, k2, right->matrix_t, k2, out, k2);
}

/* Fewer tokens than threads: the rows of one token at a time are shared out. */
static void
rotate_few(struct rotate_job *job)
{
    const int64_t k1 = job->rotation->left.order, k2 = job->rotation->right.order;
    const int64_t grain = sq_ceil_div(SQ_STRIP_WORK, k2 * (k1 + k2));
    const float *out = (float *)(void *)(job->scratch + job->layout.block_bytes);
    for (int64_t i = 0; i < job->m; i++, job->x += k1 * k2) {
        sq_parallel_for(k1, grain, rotate_strip, job);
        job->fn(job->context, i, 1, out);
    }
}

/* Blocks begin .. end - 1 of one token, behind its alignment. */
static void
align_strip(void *context, int64_t begin, int64_t end, int thread)
{
    const struct rotate_job *job = context;
    const int64_t b = job->rotation->blocks.b;
    float *out = (float *)(void *)job->scratch;
    (void)thread;
    for (int64_t j = begin; j < end; j++) {
        job->kernels->gemm_f32(1, b, b, job->x + j * b, b, job->rotation->blocks.first + j * b * b,
                               b, out + j * b, b);
    }
}

/* Rows begin .. end - 1 of the left factor times an aligned token. */
static void
left_strip(void *context, int64_t begin, int64_t end, int thread)
{
    const struct rotate_job *job = context;
    const struct sq_factor *left = &job->rotation->left;
    const int64_t k1 = left->order, k2 = job->rotation->right.order;
    const float *aligned = (float *)(void *)job->scratch;
    float *out = (float *)(void *)(job->scratch + job->layout.block_bytes);
    (void)thread;
    job->kernels->gemm_f32(end - begin, k2, k1, left->matrix + begin * k1, k1, aligned, k2,
                           out + begin * k2, k2);
}

/* As rotate_few, of a token that is aligned and then has a left factor alone. */
static void
align_few(struct rotate_job *job)
{
    const struct sq_rotation *r = job->rotation;
    const int64_t b = r->blocks.b, work = r->k; /* of a row of the factor */
    const float *out = (float *)(void *)(job->scratch + job->layout.block_bytes);
    for (int64_t i = 0; i < job->m; i++, job->x += r->k) {
        sq_parallel_for(r->k / b, sq_ceil_div(SQ_STRIP_WORK, b * b), align_strip, job);
        sq_parallel_for(r->left.order, sq_ceil_div(SQ_STRIP_WORK, work), left_strip, job);
        job->fn(job->context, i, 1, out);
    }
}

/* 1 if m rows of the rotation's k do not fit int64_t bytes. */
static int
rows_overflow(const struct sq_rotation *r, int64_t m)
{
    int64_t all;
    return m < 0 || !sq_product(m, r->k, &all) || all > INT64_MAX / 8;
}

static sq_status
rotate(const struct sq_rotation *r, const float *x, int64_t m, float *y, sq_rows_fn fn,
       void *context, int64_t workers_max, void *workspace)
{
    SQ_TRY(sq_rotation_check(r));
    if (!x || !workspace || (!y && !fn)) {
        return SQ_ERR_NULL;
    }
    if (rows_overflow(r, m)) {
        return SQ_ERR_RANGE;
    }
    if (m == 0) {
        return SQ_OK;
    }
    const int64_t workers = sq_min_i64(sq_min_i64(sq_get_num_threads(), workers_max), m);
    struct rotate_job job = {.kernels = sq_kernels_active(),
                             .rotation = r,
                             .layout = scratch_layout(r, sq_ceil_div(m, workers)),
                             .x = x,
                             .y = y,
                             .fn = fn,
                             .context = context,
                             .m = m,
                             .scratch = workspace};
    const int few = !y && m < sq_get_num_threads() && r->left.matrix;
    if (few && r->kind == SQ_KRONECKER && r->right.matrix) {
        rotate_few(&job);
    }
    else if (few && r->kind == SQ_ALIGNED && is_trivial(&r->right)) {
        align_few(&job);
    }
    else {
        sq_parallel_for(workers, 1, rotate_worker, &job);
    }
    return SQ_OK;
}

/* Scratch of so many workers for m rows; it grows with m, and fewer workers need no more. */
static size_t
workspace_bytes(const struct sq_rotation *r, int64_t m, int64_t workers)
{
    if (!r || r->kind == SQ_UNROTATED) {
        return 0;
    }
    if (sq_rotation_check(r) != SQ_OK || rows_overflow(r, m)) {
        return SIZE_MAX / 2;
    }
    return (size_t)sq_min_i64(workers, m) * scratch_layout(r, m).total_bytes;
}

size_t
sq_rotation_workspace_bytes(const struct sq_rotation *rotation, int64_t m)
{
    return workspace_bytes(rotation, m, SQ_ROTATE_WORKERS);
}

size_t
sq_rotation_serial_bytes(const struct sq_rotation *rotation, int64_t m)
{
    return workspace_bytes(rotation, m, 1);
}

sq_status
sq_rotate(const struct sq_rotation *rotation, const float *x, int64_t m, float *y, void *workspace)
{
    return y ? rotate(rotation, x, m, y, NULL, NULL, SQ_ROTATE_WORKERS, workspace) : SQ_ERR_NULL;
}

sq_status
sq_rotate_each(const struct sq_rotation *rotation, const float *x, int64_t m, sq_rows_fn fn,
               void *context, void *workspace)
{
    return rotate(rotation, x, m, NULL, fn, context, SQ_ROTATE_WORKERS, workspace);
}

sq_status
sq_rotate_serially(const struct sq_rotation *rotation, float *x, int64_t m, void *workspace)
{
    return rotate(rotation, x, m, x, NULL, NULL, 1, workspace);
}
