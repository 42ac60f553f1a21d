/* SPDX-License-Identifier: Apache-2.0 */
/* Cholesky factors, panel by panel; what is behind a panel is updated after it.
 *
 * In float32 the work is in products of the kernel table. A triangular system is solved on turned
 * rows: what belongs to one column of the factor lies side by side, so that a few columns after
 * each product are plain loops over lanes. In float64, where only matrices come that are near to
 * singular, all sums are of one kind, dots(). */
#include "solve/sq_cholesky.h"

#include <float.h>
#include <math.h>
#include <stdatomic.h>
#include <string.h>

#include "core/sq_internal.h"
#include "core/sq_scratch.h"
#include "core/sq_threads.h"
#include "core/sq_tiles.h"

enum {
    TILE = 256,
    DEPTH = 512, /* columns of a panel of the factor */
    SQUARE = 16,
    LD_PANEL = DEPTH + SQUARE, /* or rows would share cache sets */
    STEP = 32,                 /* columns of a triangle that are solved together */
    LANES = 16
};

/* ---- triangular systems in float32 ------------------------------------------------------ */

/* x [n][ld_x] <- l^-1 x for n <= STEP and `lanes` lanes, which are whole LANES. */
static ALWAYS_INLINE void
solve_lanes(const float *l, int64_t ld_l, int64_t n, float *x, int64_t ld_x, int64_t lanes)
{
    for (int64_t first = 0; first < lanes; first += LANES) {
        for (int64_t i = 0; i < n; i++) {
            float *to = x + i * ld_x + first, sum[LANES];
            memcpy(sum, to, sizeof sum);
            for (int64_t p = 0; p < i; p++) {
                const float factor = l[i * ld_l + p];
                const float *from = x + p * ld_x + first;
                for (int j = 0; j < LANES; j++) {
                    sum[j] -= factor * from[j];
                }
            }
            for (int j = 0; j < LANES; j++) {
                to[j] = sum[j] / l[i * (ld_l + 1)];
            }
        }
    }
}

/* x [rows][ld_x] -= product [rows][columns]. */
static void
subtract(const float *product, int64_t rows, int64_t columns, float *x, int64_t ld_x)
{
    for (int64_t r = 0; r < rows; r++) {
        for (int64_t c = 0; c < columns; c++) {
            x[r * ld_x + c] -= product[r * columns + c];
        }
    }
}

/* turned [columns][ld_turned] <- x [rows][ld_x], rows as columns; zeros up to whole LANES. */
static void
turn(const float *x, int64_t ld_x, int64_t rows, int64_t columns, float *turned, int64_t ld_turned)
{
    for (int64_t r0 = 0; r0 < rows; r0 += SQUARE) {
        const int64_t r1 = sq_min_i64(rows, r0 + SQUARE);
        for (int64_t c = 0; c < columns; c++) {
            float *to = turned + c * ld_turned;
            for (int64_t r = r0; r < r1; r++) {
                to[r] = x[r * ld_x + c];
            }
            for (int64_t r = r1; r < r0 + SQUARE; r++) {
                to[r] = 0.0f;
            }
        }
    }
}
_Static_assert(SQUARE == LANES, "turn() pads to LANES");

/* The reverse: x [rows][ld_x] <- turned [columns][ld_turned]. */
static void
turn_back(const float *turned, int64_t ld_turned, int64_t rows, int64_t columns, float *x,
          int64_t ld_x)
{
    for (int64_t r0 = 0; r0 < rows; r0 += SQUARE) {
        const int64_t r1 = sq_min_i64(rows, r0 + SQUARE);
        for (int64_t c0 = 0; c0 < columns; c0 += SQUARE) {
            const int64_t c1 = sq_min_i64(columns, c0 + SQUARE);
            for (int64_t r = r0; r < r1; r++) {
                for (int64_t c = c0; c < c1; c++) {
                    x[r * ld_x + c] = turned[c * ld_turned + r];
                }
            }
        }
    }
}

/* x [n][ld_x] <- l^-1 x of so many lanes, whole LANES. product: [STEP][lanes]. */
static void
solve_turned(const struct sq_kernels *kernels, const float *l, int64_t ld_l, int64_t n, float *x,
             int64_t ld_x, int64_t lanes, float *product)
{
    for (int64_t i = 0; i < n; i += STEP) {
        const int64_t rows = sq_min_i64(STEP, n - i);
        if (i) {
            kernels->gemm_f32(rows, lanes, i, l + i * ld_l, ld_l, x, ld_x, product, lanes);
            subtract(product, rows, lanes, x + i * ld_x, ld_x);
        }
        solve_lanes(l + i * (ld_l + 1), ld_l, rows, x + i * ld_x, ld_x, lanes);
    }
}

void
sq_solve_rows(const float *l, int64_t ld_l, int64_t n, float *x, int64_t ld_x, int64_t rows,
              float *scratch)
{
    const int64_t lanes = sq_round_up(rows, LANES);
    float *columns = scratch, *turned = scratch + n * n; /* of l, one after the other */
    for (int64_t p = 0; p < n; p++) {
        for (int64_t i = 0; i <= p; i++) {
            columns[i * n + p] = l[p * ld_l + i];
        }
    }
    turn(x, ld_x, rows, n, turned, lanes);
    for (int64_t first = 0; first < lanes && !sq_stopped(); first += LANES) {
        for (int64_t i = n - 1; i >= 0; i--) {
            float *to = turned + i * lanes + first, sum[LANES];
            memcpy(sum, to, sizeof sum);
            for (int64_t p = n - 1; p > i; p--) {
                const float factor = columns[i * n + p];
                const float *from = turned + p * lanes + first;
                for (int j = 0; j < LANES; j++) {
                    sum[j] -= factor * from[j];
                }
            }
            for (int j = 0; j < LANES; j++) {
                to[j] = sum[j] / columns[i * (n + 1)];
            }
        }
    }
    turn_back(turned, lanes, rows, n, x, ld_x);
}

/* ---- factor in float32 ------------------------------------------------------------------ */

struct factor_job {
    const struct sq_kernels *kernels;
    float *a;
    int64_t k, pivot; /* first row of the square that was just factored */
    float *square;    /* [DEPTH][DEPTH]: the square, rows as columns */
    float *product;   /* [STEP][DEPTH] */
    /* The panel's tiles below the square, and the same turned. */
    float *panel;  /* [tiles][TILE][LD_PANEL] */
    float *turned; /* [tiles][DEPTH][TILE] */
    atomic_int no_memory;
};

/* The triangle of STEP columns at most, in a row of lanes: x [n][DEPTH] holds columns of a. 0, or 1
 * when it is not positive definite. */
static int
factor_few(float *x, int64_t n)
{
    for (int64_t i = 0; i < n; i++) {
        const float pivot = x[i * (DEPTH + 1)];
        if (!(pivot > 0.0f && pivot <= FLT_MAX)) {
            return 1;
        }
        const float root = sqrtf(pivot);
        for (int64_t j = i; j < n; j++) {
            x[i * DEPTH + j] /= root;
        }
        for (int64_t p = i + 1; p < n; p++) {
            for (int64_t j = p; j < n; j++) {
                x[p * DEPTH + j] -= x[i * DEPTH + p] * x[i * DEPTH + j];
            }
        }
    }
    return 0;
}

/* The lower triangle of the square of n <= DEPTH rows at the pivot <- its factor. 0, or 1 when it
 * is not positive definite. */
static int
factor_square(const struct factor_job *job, int64_t n)
{
    const int64_t k = job->k;
    float *a = job->a + job->pivot * (k + 1);
    for (int64_t i = 0; i < n; i += STEP) {
        const int64_t columns = sq_min_i64(STEP, n - i), rows = n - i;
        float *strip = job->square + i * (DEPTH + 1); /* row j: column i + j of a, from row i on */
        turn(a + i * (k + 1), k, rows, columns, strip, DEPTH);
        if (i) {
            job->kernels->gemm_f32(columns, rows, i, a + i * k, k, job->square + i, DEPTH,
                                   job->product, rows);
            subtract(job->product, columns, rows, strip, DEPTH);
        }
        if (factor_few(strip, columns)) {
            return 1;
        }
        for (int64_t r = 0; r < columns; r++) {
            for (int64_t c = 0; c <= r; c++) {
                a[(i + r) * k + i + c] = strip[c * DEPTH + r];
            }
        }
        if (rows > columns) { /* STEP columns then, which are whole LANES */
            solve_lanes(a + i * (k + 1), k, columns, strip + columns, DEPTH,
                        sq_round_up(rows, LANES) - columns);
            turn_back(strip + columns, DEPTH, rows - columns, columns, a + (i + STEP) * k + i, k);
        }
    }
    return 0;
}
_Static_assert(STEP % LANES == 0 && DEPTH % STEP == 0, "strips begin at whole LANES");

/* Rows of the panel below the square: A_i,p <- A_i,p L_pp^-T, and copies. */
static void
solve_panel(void *context, int64_t begin, int64_t end, int thread)
{
    struct factor_job *job = context;
    const int64_t k = job->k, p = job->pivot;
    (void)thread;
    float *product = sq_thread_scratch(STEP * TILE * sizeof *product);
    if (!product) {
        atomic_store(&job->no_memory, 1);
        return;
    }
    for (int64_t t = begin; t < end; t++) {
        const int64_t i = p + DEPTH + t * TILE, rows = sq_min_i64(TILE, k - i);
        float *tile = job->a + i * k + p, *turned = job->turned + t * DEPTH * TILE;
        float *panel = job->panel + t * TILE * LD_PANEL;
        turn(tile, k, rows, DEPTH, turned, TILE);
        solve_turned(job->kernels, job->a + p * (k + 1), k, DEPTH, turned, TILE,
                     sq_round_up(rows, LANES), product);
        turn_back(turned, TILE, rows, DEPTH, panel, LD_PANEL);
        for (int64_t r = 0; r < rows; r++) {
            memcpy(tile + r * k, panel + r * LD_PANEL, DEPTH * sizeof *tile);
        }
    }
}

/* Tiles of the trailing lower triangle: A_i,j -= A_i,p A_j,p^T. */
static void
update_trailing(void *context, int64_t begin, int64_t end, int thread)
{
    struct factor_job *job = context;
    const int64_t k = job->k, p = job->pivot;
    (void)thread;
    float *product = sq_thread_scratch(TILE * TILE * sizeof *product);
    if (!product) {
        atomic_store(&job->no_memory, 1);
        return;
    }
    for (int64_t t = begin; t < end; t++) {
        int64_t row, column;
        sq_tile_place(t, &row, &column);
        const int64_t i = p + DEPTH + row * TILE, j = p + DEPTH + column * TILE;
        const int64_t ni = sq_min_i64(TILE, k - i), nj = sq_min_i64(TILE, k - j);
        job->kernels->gemm_f32(ni, nj, DEPTH, job->panel + row * TILE * LD_PANEL, LD_PANEL,
                               job->turned + column * DEPTH * TILE, TILE, product, TILE);
        for (int64_t r = 0; r < ni; r++) {
            subtract(product + r * TILE, 1, i == j ? r + 1 : nj, job->a + (i + r) * k + j, k);
        }
    }
}

sq_status
sq_cholesky(float *a, int64_t k)
{
    const int64_t tiles = sq_ceil_div(k, TILE);
    struct factor_job job = {.kernels = sq_kernels_active(), .a = a, .k = k};
    job.square = sq_alloc(DEPTH * DEPTH * sizeof *job.square);
    job.product = sq_alloc(STEP * DEPTH * sizeof *job.product);
    job.panel = sq_alloc((size_t)(tiles * TILE * LD_PANEL) * sizeof *job.panel);
    job.turned = sq_alloc((size_t)(tiles * TILE * DEPTH) * sizeof *job.turned);
    const int whole = job.square && job.product && job.panel && job.turned;
    sq_status status = whole ? SQ_OK : SQ_ERR_NOMEM;
    for (; job.pivot < k && status == SQ_OK && !sq_stopped(); job.pivot += DEPTH) {
        const int64_t size = sq_min_i64(DEPTH, k - job.pivot);
        if (factor_square(&job, size)) {
            status = SQ_ERR_RANGE;
            break;
        }
        const int64_t below = sq_ceil_div(k - job.pivot - size, TILE);
        sq_parallel_for(below, 1, solve_panel, &job);
        sq_parallel_for(sq_tiles(below), 1, update_trailing, &job);
        status = atomic_load(&job.no_memory) ? SQ_ERR_NOMEM : SQ_OK;
    }
    free(job.square);
    free(job.product);
    free(job.panel);
    free(job.turned);
    return status;
}

/* ---- factor in float64 ------------------------------------------------------------------ */

/* Rows of a product at a time, and chains of each of its sums. */
enum { DOTS = 4, CHAINS = 4 };

/* out [count] <- a [n] times the rows of b [count][ld]. A sum is the same for each count. */
static ALWAYS_INLINE void
dots(const int count, const double *a, const double *b, int64_t ld, int64_t n, double *out)
{
    double chain[DOTS][CHAINS] = {{0}};
    int64_t i = 0;
    for (; i + CHAINS <= n; i += CHAINS) {
        for (int d = 0; d < count; d++) {
            for (int c = 0; c < CHAINS; c++) {
                chain[d][c] += a[i + c] * b[d * ld + i + c];
            }
        }
    }
    for (int c = 0; c < CHAINS && i < n; i++, c++) {
        for (int d = 0; d < count; d++) {
            chain[d][c] += a[i] * b[d * ld + i];
        }
    }
    for (int d = 0; d < count; d++) {
        out[d] = (chain[d][0] + chain[d][1]) + (chain[d][2] + chain[d][3]);
    }
}

static double
dot(const double *a, const double *b, int64_t n)
{
    double sum;
    dots(1, a, b, 0, n, &sum);
    return sum;
}

struct double_job {
    double *a;
    int64_t k, pivot;
};

/* The square of n <= TILE rows at the pivot. 0, or 1 when it is not positive definite. */
static int
factor_square_double(const struct double_job *job, int64_t n)
{
    const int64_t k = job->k;
    double *a = job->a + job->pivot * (k + 1);
    for (int64_t i = 0; i < n; i++) {
        double *row = a + i * k;
        for (int64_t j = 0; j < i; j++) {
            row[j] = (row[j] - dot(row, a + j * k, j)) / a[j * (k + 1)];
        }
        const double pivot = row[i] - dot(row, row, i);
        if (!(pivot > 0.0 && pivot <= DBL_MAX)) {
            return 1;
        }
        row[i] = sqrt(pivot);
    }
    return 0;
}

static void
solve_panel_double(void *context, int64_t begin, int64_t end, int thread)
{
    const struct double_job *job = context;
    const int64_t k = job->k, p = job->pivot;
    const double *l = job->a + p * (k + 1);
    (void)thread;
    for (int64_t i = p + TILE + begin; i < p + TILE + end; i++) {
        double *row = job->a + i * k + p;
        for (int64_t j = 0; j < TILE; j++) {
            row[j] = (row[j] - dot(row, l + j * k, j)) / l[j * (k + 1)];
        }
    }
}

/* Tiles of the lower triangle; what is above the diagonal stays. */
static void
update_trailing_double(void *context, int64_t begin, int64_t end, int thread)
{
    const struct double_job *job = context;
    const int64_t k = job->k, p = job->pivot;
    (void)thread;
    for (int64_t t = begin; t < end && !sq_stopped(); t++) {
        int64_t row, column;
        sq_tile_place(t, &row, &column);
        const int64_t i0 = p + (row + 1) * TILE, j0 = p + (column + 1) * TILE;
        for (int64_t i = i0; i < sq_min_i64(k, i0 + TILE); i++) {
            const double *a = job->a + i * k + p;
            const int64_t j1 = sq_min_i64(i + 1, j0 + TILE);
            double sums[DOTS], *to = job->a + i * k;
            for (int64_t j = j0; j < j1; j += DOTS) {
                const double *b = job->a + j * k + p;
                if (j + DOTS > j1) {
                    for (int64_t d = 0; d < j1 - j; d++) {
                        sums[d] = dot(a, b + d * k, TILE);
                    }
                }
                else {
                    dots(DOTS, a, b, k, TILE, sums);
                }
                for (int64_t d = 0; d < sq_min_i64(DOTS, j1 - j); d++) {
                    to[j + d] -= sums[d];
                }
            }
        }
    }
}

sq_status
sq_cholesky_double(double *a, int64_t k)
{
    struct double_job job = {a, k, 0};
    for (; job.pivot < k && !sq_stopped(); job.pivot += TILE) {
        const int64_t size = sq_min_i64(TILE, k - job.pivot), below = k - job.pivot - size;
        if (factor_square_double(&job, size)) {
            return SQ_ERR_RANGE;
        }
        sq_parallel_for(below, SQUARE, solve_panel_double, &job);
        sq_parallel_for(sq_tiles(sq_ceil_div(below, TILE)), 1, update_trailing_double, &job);
    }
    return SQ_OK;
}
