/* SPDX-License-Identifier: Apache-2.0 */
/* DuQuant (arXiv 2406.01721): random orthogonal matrices, the greedy rotation of each block, and
 * the zigzag permutation. */
#include <math.h>
#include <stdatomic.h>

#include "core/sq_internal.h"
#include "kernels/sq_kernels.h"
#include "core/sq_threads.h"

/* b^3 and the buffers below stay far from overflow */
#define MAX_BLOCK ((int64_t)SQ_DUQUANT_B_MAX)
enum { PRODUCT_ROWS = 1024 }; /* of a greedy step's product: it can be stopped between two */
#define MAX_ROWS ((int64_t)1 << 24)
#define MAX_K ((int64_t)1 << 24)
_Static_assert(MAX_ROWS + MAX_BLOCK <= INT64_MAX / (2 * MAX_BLOCK * (int64_t)sizeof(float)) / 64,
               "the buffers of one block");

/* ---- random orthogonal matrices --------------------------------------------------------- */

/* Word number i of a stream: splitmix64 (Steele, Lea, Flood 2014) as a counter's hash. */
static uint64_t
random_word(uint64_t seed, uint64_t i)
{
    uint64_t z = seed + (i + 1) * UINT64_C(0x9E3779B97F4A7C15);
    z = (z ^ (z >> 30)) * UINT64_C(0xBF58476D1CE4E5B9);
    z = (z ^ (z >> 27)) * UINT64_C(0x94D049BB133111EB);
    return z ^ (z >> 31);
}

/* In (0, 1): 53 random bits and a half. The largest would round to 1, whose logarithm is 0: a
 * normal of 0 leaves a reflection of order 1 without a direction. */
static double
random_uniform(uint64_t seed, uint64_t i)
{
    return fmin(((double)(random_word(seed, i) >> 11) + 0.5) * 0x1p-53, 1 - 0x1p-53);
}

/* Standard normal number i of a stream (Box and Muller's cosine). */
static double
random_normal(uint64_t seed, uint64_t i)
{
    const double radius = sqrt(-2.0 * log(random_uniform(seed, 2 * i)));
    return radius * cos(6.283185307179586 * random_uniform(seed, 2 * i + 1));
}

/* q [n][n] (rows ld apart) <- (I - 2 v v^T / v^T v) q; v is not zero. work [n]. */
static void
reflect(double *restrict q, int64_t ld, int64_t n, const double *restrict v, double *restrict work)
{
    double norm2 = 0;
    memset(work, 0, (size_t)n * sizeof *work);
    for (int64_t i = 0; i < n; i++) {
        norm2 += v[i] * v[i];
        for (int64_t j = 0; j < n; j++) {
            work[j] += v[i] * q[i * ld + j];
        }
    }
    for (int64_t i = 0; i < n; i++) {
        const double factor = 2.0 * v[i] / norm2;
        for (int64_t j = 0; j < n; j++) {
            q[i * ld + j] -= factor * work[j];
        }
    }
}

/* Stewart (1980): with Q of order n - 1 distributed by Haar's measure and x Gaussian, so is
 * H diag(s, Q), where H = I - 2 v v^T / v^T v, v = x + sign(x_0) |x| e_0, maps e_0 to s x / |x|,
 * s = -sign(x_0): its first column is x / |x|. Grown from the last row and column upwards;
 * q [n][n], rows ld apart. work: [2 n]. */
static void
fill_orthogonal(double *q, int64_t ld, int64_t n, uint64_t seed, double *work)
{
    double *v = work + n;
    uint64_t drawn = 0;
    for (int64_t order = 1; order <= n && !sq_stopped(); order++) {
        double *corner = q + (n - order) * (ld + 1), norm2 = 0;
        for (int64_t i = 0; i < order; i++) {
            v[i] = random_normal(seed, drawn++);
            norm2 += v[i] * v[i];
            corner[i] = corner[i * ld] = 0;
        }
        const double s = v[0] < 0 ? 1 : -1;
        corner[0] = s;
        v[0] -= s * sqrt(norm2);
        reflect(corner, ld, order, v, work);
    }
}

sq_status
sq_random_orthogonal(int64_t n, uint64_t seed, double *q, double *workspace)
{
    if (!q || !workspace) {
        return SQ_ERR_NULL;
    }
    if (n < 1) {
        return SQ_ERR_SHAPE;
    }
    if (n > MAX_BLOCK) {
        return SQ_ERR_RANGE;
    }
    fill_orthogonal(q, n, n, seed, workspace);
    return SQ_OK;
}

/* ---- R~ Q: one random matrix per greedy step -------------------------------------------- */

struct steps_job {
    int64_t b;
    uint64_t seed;
    float *steps; /* [count][b][b] */
    atomic_int no_memory;
};

/* Paper, equation 2, Q = diag(1, Q') with Q' random orthogonal: R~ is "an orthogonal initialized
 * rotation matrix, in which the first row is specifically uniformly distributed", here the
 * reflection that swaps e_0 with f = (1, ..., 1) / sqrt(b): its first row, and its first column,
 * which Q retains, are f. */
static void
make_steps(void *context, int64_t begin, int64_t end, int thread)
{
    struct steps_job *job = context;
    const int64_t b = job->b;
    const double flat = 1 / sqrt((double)b);
    double *matrix = sq_alloc((size_t)(b * b + 2 * b) * sizeof *matrix);
    (void)thread;
    if (!matrix) {
        atomic_store(&job->no_memory, 1);
        return;
    }
    double *work = matrix + b * b;
    for (int64_t step = begin; step < end; step++) {
        memset(matrix, 0, (size_t)(b * b) * sizeof *matrix);
        matrix[0] = 1;
        if (b > 1) {
            double *v = work + b;
            fill_orthogonal(matrix + b + 1, b, b - 1, random_word(job->seed, (uint64_t)step), work);
            for (int64_t i = 0; i < b; i++) {
                v[i] = flat;
            }
            v[0] -= 1;
            reflect(matrix, b, b, v, work);
        }
        for (int64_t i = 0; i < b * b; i++) {
            job->steps[step * b * b + i] = (float)matrix[i];
        }
    }
    free(matrix);
}

sq_status
sq_duquant_steps(int64_t b, int64_t count, uint64_t seed, float *steps)
{
    int64_t elements;
    if (!steps) {
        return SQ_ERR_NULL;
    }
    if (b < 1 || count < 0) {
        return SQ_ERR_SHAPE;
    }
    if (b > MAX_BLOCK || !sq_product(count, b * b, &elements) || elements > INT64_MAX / 8) {
        return SQ_ERR_RANGE;
    }
    struct steps_job job = {.b = b, .seed = seed, .steps = steps};
    sq_parallel_for(count, 1, make_steps, &job);
    return atomic_load(&job.no_memory) ? SQ_ERR_NOMEM : SQ_OK;
}

/* ---- greedy rotation of the blocks ------------------------------------------------------ */

/* Of one call. The identity's rows stand below the sample's, so that one product per step
 * rotates the sample and accumulates R^1 R^2 ... R^i. */
struct greedy_scratch {
    float *x, *next; /* [rows + b][b] */
    float *step;     /* [b][b] */
    int32_t *maxima; /* [b] */
    double *polish;  /* two of [b][b] */
};

/* Bytes of the parts above but the last, and of all. */
struct greedy_layout {
    size_t x, step, maxima, total;
};

static struct greedy_layout
greedy_layout(int64_t rows, int64_t b)
{
    struct greedy_layout l = {.x = sq_align_bytes((size_t)((rows + b) * b) * sizeof(float)),
                              .step = sq_align_bytes((size_t)(b * b) * sizeof(float)),
                              .maxima = sq_align_bytes((size_t)b * sizeof(int32_t))};
    l.total = 2 * l.x + l.step + l.maxima + sq_align_bytes((size_t)(2 * b * b) * sizeof(double));
    return l;
}

struct greedy_job {
    const struct sq_kernels *kernels;
    const float *sample; /* [rows][k] */
    int64_t rows, k, b;
    const float *steps; /* [count][b][b] */
    int64_t count;
    float *blocks, *peaks; /* [k / b][b][b], [k / b][count + 1] */
    struct greedy_layout layout;
    atomic_int no_memory;
};

/* d = argmax_j max_i |x_ij|, the first among equals, and that peak. maxima [b] is scratch: the bits
 * of |x_ij|, which order as integers like the values and place Inf and NaN, where products of huge
 * values overflow, above all. */
static int64_t
outlier_channel(const float *x, int64_t rows, int64_t b, int32_t *maxima, float *peak)
{
    int64_t d = 0;
    memset(maxima, 0, (size_t)b * sizeof *maxima);
    for (int64_t i = 0; i < rows; i++) {
        for (int64_t j = 0; j < b; j++) {
            int32_t bits;
            memcpy(&bits, x + i * b + j, sizeof bits);
            bits &= INT32_MAX;
            maxima[j] = bits > maxima[j] ? bits : maxima[j];
        }
    }
    for (int64_t j = 1; j < b; j++) {
        d = maxima[j] > maxima[d] ? j : d;
    }
    memcpy(peak, maxima + d, sizeof *peak);
    return d;
}

/* out <- E_d step E_d: rows, then columns 0 and d swapped. */
static void
switched_step(const float *step, int64_t b, int64_t d, float *out)
{
    for (int64_t i = 0; i < b; i++) {
        const int64_t from = i == 0 ? d : i == d ? 0 : i;
        memcpy(out + i * b, step + from * b, (size_t)b * sizeof *out);
        const float first = out[i * b];
        out[i * b] = out[i * b + d];
        out[i * b + d] = first;
    }
}

/* r <- 3/2 r - 1/2 r r^T r in float64 (Newton and Schulz): a product of hundreds of float32
 * matrices is orthogonal to some 1e-5 only; one step squares that. polish: two of [b][b]. */
static void
polish_orthogonal(float *r, int64_t b, double *polish)
{
    double *gram = polish, *out = polish + b * b;
    for (int64_t i = 0; i < b && !sq_stopped(); i++) {
        for (int64_t j = 0; j <= i; j++) {
            double sum = 0;
            for (int64_t t = 0; t < b; t++) {
                sum += (double)r[i * b + t] * (double)r[j * b + t];
            }
            gram[i * b + j] = gram[j * b + i] = sum;
        }
    }
    for (int64_t i = 0; i < b && !sq_stopped(); i++) {
        for (int64_t j = 0; j < b; j++) {
            out[i * b + j] = 1.5 * (double)r[i * b + j];
        }
        for (int64_t t = 0; t < b; t++) {
            const double factor = 0.5 * gram[i * b + t];
            for (int64_t j = 0; j < b; j++) {
                out[i * b + j] -= factor * (double)r[t * b + j];
            }
        }
    }
    for (int64_t i = 0; i < b * b; i++) {
        r[i] = (float)out[i];
    }
}

/* One block, paper section 3.2: (1) the outlier channel d; (2) R^i = E_d R~ Q E_d, equation 2;
 * (3) R^ = R^1 R^2 ... R^n, n = argmin over i of max |X R^1 ... R^i|, equation 3. The paper's i
 * starts at 1; here 0, the identity, takes part, so that no block's peak ever rises. */
static void
solve_block(const struct greedy_job *job, int64_t block, struct greedy_scratch *s)
{
    const int64_t rows = job->rows, b = job->b;
    float *best = job->blocks + block * b * b, *peaks = job->peaks + block * (job->count + 1);
    float lowest = 0;
    int64_t kept = 0;
    for (int64_t i = 0; i < rows; i++) {
        memcpy(s->x + i * b, job->sample + i * job->k + block * b, (size_t)b * sizeof *s->x);
    }
    memset(s->x + rows * b, 0, (size_t)(b * b) * sizeof *s->x);
    for (int64_t i = 0; i < b; i++) {
        s->x[rows * b + i * (b + 1)] = 1;
    }
    for (int64_t i = 0;; i++) {
        const int64_t d = outlier_channel(s->x, rows, b, s->maxima, &peaks[i]);
        if (i == 0 || peaks[i] < lowest) {
            lowest = peaks[i];
            kept = i;
            memcpy(best, s->x + rows * b, (size_t)(b * b) * sizeof *best);
        }
        if (i == job->count || sq_stopped()) {
            break;
        }
        switched_step(job->steps + i * b * b, b, d, s->step);
        for (int64_t r = 0; r < rows + b && !sq_stopped(); r += PRODUCT_ROWS) {
            job->kernels->gemm_f32(sq_min_i64(PRODUCT_ROWS, rows + b - r), b, b, s->x + r * b, b,
                                   s->step, b, s->next + r * b, b);
        }
        float *swap = s->x;
        s->x = s->next;
        s->next = swap;
    }
    if (kept > 0) {
        polish_orthogonal(best, b, s->polish);
    }
}

static void
solve_blocks(void *context, int64_t begin, int64_t end, int thread)
{
    struct greedy_job *job = context;
    const struct greedy_layout *l = &job->layout;
    char *base = sq_alloc(l->total);
    (void)thread;
    if (!base) {
        atomic_store(&job->no_memory, 1);
        return;
    }
    struct greedy_scratch s = {.x = (float *)base,
                               .next = (float *)(base + l->x),
                               .step = (float *)(base + 2 * l->x),
                               .maxima = (int32_t *)(base + 2 * l->x + l->step),
                               .polish = (double *)(base + 2 * l->x + l->step + l->maxima)};
    for (int64_t block = begin; block < end; block++) {
        solve_block(job, block, &s);
    }
    free(base);
}

sq_status
sq_duquant_blocks(const float *sample, int64_t rows, int64_t k, const float *steps, int64_t count,
                  int64_t b, float *blocks, float *peaks)
{
    if (!sample || !steps || !blocks || !peaks) {
        return SQ_ERR_NULL;
    }
    if (rows < 0 || k < 1 || count < 0 || b < 1 || k % b) {
        return SQ_ERR_SHAPE;
    }
    int64_t elements;
    if (b > MAX_BLOCK || rows > MAX_ROWS || k > MAX_K || !sq_product(count, b * b, &elements)) {
        return SQ_ERR_RANGE;
    }
    if (!sq_all_finite(sample, rows * k) || !sq_all_finite(steps, elements)) {
        return SQ_ERR_NONFINITE;
    }
    struct greedy_job job = {.kernels = sq_kernels_active(),
                             .sample = sample,
                             .rows = rows,
                             .k = k,
                             .b = b,
                             .steps = steps,
                             .count = count,
                             .blocks = blocks,
                             .peaks = peaks,
                             .layout = greedy_layout(rows, b)};
    sq_parallel_for(k / b, 1, solve_blocks, &job);
    return atomic_load(&job.no_memory) ? SQ_ERR_NOMEM : SQ_OK;
}

/* ---- zigzag permutation ----------------------------------------------------------------- */

struct channel {
    double maximum;
    int64_t index;
};

/* Descending; the lower index first among equals. */
static int
compare_channels(const void *a, const void *b)
{
    const struct channel *x = a, *y = b;
    if (x->maximum != y->maximum) {
        return x->maximum > y->maximum ? -1 : 1;
    }
    return x->index < y->index ? -1 : x->index > y->index;
}

/* Paper, section 3.2, the permutation: "assigning channels with the highest activations to the
 * first block ... the next highest ... to the subsequent blocks ... until the end of block K. Upon
 * reaching the final block, the order reverses": deal by deal, back and forth. */
sq_status
sq_zigzag(const double *maxima, int64_t k, int64_t b, int32_t *permutation)
{
    if (!maxima || !permutation) {
        return SQ_ERR_NULL;
    }
    if (k < 1 || b < 1 || k % b) {
        return SQ_ERR_SHAPE;
    }
    if (k > MAX_K) {
        return SQ_ERR_RANGE;
    }
    const int64_t blocks = k / b;
    struct channel *channels = sq_alloc((size_t)k * sizeof *channels);
    if (!channels) {
        return SQ_ERR_NOMEM;
    }
    for (int64_t i = 0; i < k; i++) {
        if (!isfinite(maxima[i])) {
            free(channels);
            return SQ_ERR_NONFINITE;
        }
        channels[i] = (struct channel){maxima[i], i};
    }
    qsort(channels, (size_t)k, sizeof *channels, compare_channels);
    for (int64_t rank = 0; rank < k; rank++) {
        const int64_t deal = rank / blocks, place = rank % blocks;
        const int64_t block = deal % 2 ? blocks - 1 - place : place;
        permutation[block * b + deal] = (int32_t)channels[rank].index;
    }
    free(channels);
    return SQ_OK;
}
