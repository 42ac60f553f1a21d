/* SPDX-License-Identifier: Apache-2.0 */
/* The core's one public header: status, types and prototypes, in pipeline order.
 *
 * Letters: m tokens, n outputs, k = k1 * k2 inputs, g group length along k. Row-major everywhere.
 * Every pointer states its shape. Nothing here prints, aborts or touches errno; results go through
 * out-pointers; inputs are never written. Functions are thread safe as long as their outputs
 * differ. Scales multiply: x = scale * code. Angles are float64, activations float32. */
#ifndef SINGLEQUANT_H
#define SINGLEQUANT_H

#include <stddef.h>
#include <stdint.h>

/* ---- status ----------------------------------------------------------------------------- */

typedef enum sq_status {
    SQ_OK = 0,
    SQ_ERR_NULL = 1,
    SQ_ERR_SHAPE = 2,
    SQ_ERR_RANGE = 3,
    SQ_ERR_DTYPE = 4,
    SQ_ERR_NOMEM = 5,
    SQ_ERR_FORMAT = 6,
    SQ_ERR_NONFINITE = 7,
    SQ_ERR_INTERNAL = 8
} sq_status;

/* Static text of a status; never NULL. */
const char *
sq_status_text(sq_status status);

/* Element types of weights that stay in 16 or 32 bits. Numbers are pinned. */
typedef enum sq_dtype { SQ_F32 = 0, SQ_F16 = 1, SQ_BF16 = 2 } sq_dtype;

/* ---- factors: which k1, k2 -------------------------------------------------------------- */

/* Kronecker sizes k = k1 * k2: k2 carries a Hadamard matrix (powers of two first, 12*2^i and 20*2^i
 * where they at least halve the larger factor), both as near sqrt(k) as possible. Every k >= 1. */
sq_status
sq_factor_sizes(int64_t k, int64_t *k1, int64_t *k2);

/* ---- statistics (calibrate) ------------------------------------------------------------- */

/* Streaming statistics of one site's inputs; the arrays are the caller's, zeroed by _reset. */
struct sq_statistics {
    int64_t k, count;
    double *min, *max, *sum2; /* [k] each; sum2: of squares */
};

sq_status
sq_statistics_reset(struct sq_statistics *s);

/* Adds x [m][k]. Rejects NaN and Inf with SQ_ERR_NONFINITE and leaves s as it was. */
sq_status
sq_statistics_update(struct sq_statistics *s, const float *x, int64_t m);

/* dst += src; sizes must agree. */
sq_status
sq_statistics_merge(struct sq_statistics *dst, const struct sq_statistics *src);

/* gram [k1][k1] <- sum over tokens of X X^T, X [k1][k2] being the token reshaped, x [m][k1 k2]: in
 * float64, one chain per entry. NaN or Inf: SQ_ERR_NONFINITE. Parallel over rows of gram. */
sq_status
sq_axis_gram(const float *x, int64_t m, int64_t k1, int64_t k2, double *gram);

/* Largest magnitude and sum of squares of each column of w [n][k], in float64 chains over the rows.
 * NaN or Inf: SQ_ERR_NONFINITE. Parallel over columns. */
sq_status
sq_column_moments(sq_dtype dtype, const void *w, int64_t n, int64_t k, double *max_abs /* [k] */,
                  double *sum2 /* [k] */);

/* ---- rotations (rotate) --------------------------------------------------------------------
 * A chain is a list of Givens rotations in order of application. Rotation t with pair (i, j) and
 * angle theta maps a vector v by v_i' = c v_i - s v_j, v_j' = s v_i + c v_j. */

/* theta = pi/4 - atan2(b, a), which makes both entries sqrt((a^2 + b^2) / 2). */
double
sq_givens_angle(double a, double b);

/* Orthonormal matrix h [n][n] with near-flat entries for every n: Sylvester, Paley I and II and
 * their Kronecker products with Sylvester where they exist, otherwise Hartley kron Sylvester. */
sq_status
sq_hadamard_matrix(int64_t n, double *h /* [n][n] */);

/* x [rows][n] <- each row times H^T (so v <- H v for each row v), without an n x n matrix.
 * workspace: [3 n] doubles. */
sq_status
sq_hadamard_transform(double *x, int64_t rows, int64_t n, double *workspace);

/* Applies a chain to every row of x [rows][n]. pairs [g][2], angles [g]. */
sq_status
sq_chain_apply(const int32_t *pairs, const double *angles, int64_t g, double *x, int64_t rows,
               int64_t n);

/* ART on signed extremes (paper section on massive outliers): repeat {pair the index of largest
 * absolute value with the one of smallest, rotate them equal} while the largest exceeds
 * threshold * (median absolute value of the start) and fewer than max_steps were made.
 * v [n] is the vector of signed extremes, updated in place. pairs [max_steps][2],
 * angles [max_steps]; *steps receives the count. */
sq_status
sq_art_extremes(double *v, int64_t n, double threshold, int64_t max_steps, int32_t *pairs,
                double *angles, int64_t *steps);

/* ART with the angle taken at the extreme's own row (token-exact): on columns [n][rows], repeat
 * {i = column of largest absolute value, j = column whose largest absolute value is smallest,
 * (a, b) = their values in the row where i peaks, rotate by sq_givens_angle(a, b)}; stops when the
 * pair's peak no longer falls or at max_steps. columns is updated in place. */
sq_status
sq_art_columns(double *columns, int64_t n, int64_t rows, int64_t max_steps, int32_t *pairs,
               double *angles, int64_t *steps);

/* URT: the chain of U = G_u^T G_v that maps v onto u, |u| = |v| (rescaled to it). 2 (n - 1)
 * rotations at most. pairs [2n][2], angles [2n]. */
sq_status
sq_urt(const double *v, const double *u, int64_t n, int32_t *pairs, double *angles, int64_t *steps);

/* The chain that maps v to matrix v, for an orthogonal matrix [n][n] of determinant 1: Givens
 * rotations turn it into the identity column by column, and the chain undoes them in reverse. With
 * determinant -1 the last row comes out negated. n (n - 1) / 2 rotations at most; pairs and angles
 * have room for them. matrix is overwritten. SQ_ERR_RANGE if it is not orthogonal within 1e-6. */
#define SQ_CHAIN_MATRIX_MAX 4096
sq_status
sq_chain_from_matrix(double *matrix, int64_t n, int32_t *pairs, double *angles, int64_t *steps);

/* Eigenvectors of the symmetric gram [n][n] as rows, eigenvalues falling: the principal directions
 * of an axis. The same bytes on every machine with IEEE arithmetic. */
sq_status
sq_principal_directions(const double *gram, int64_t n, double *directions /* [n][n] */);

/* One uniformity sweep on columns [n][rows]: every pair of columns once, disjoint pairs at a time
 * (round-robin), each rotated by (pi - arg sum z^4) / 4, z = a + i b, which minimises
 * sum(a^4 + b^4). columns is updated in place. pairs [n (n-1) / 2][2], angles alike. Parallel over
 * the disjoint pairs; the result does not depend on the number of threads. */
sq_status
sq_uniformity_sweep(double *columns, int64_t n, int64_t rows, int32_t *pairs, double *angles,
                    int64_t *steps);

/* One factor as it is applied to an axis vector: v <- chain(H v) or v <- matrix v.
 * order <= SQ_FACTOR_DENSE_MAX: matrix is set, the rest unused. Above: matrix is NULL. */
#define SQ_FACTOR_DENSE_MAX 512
struct sq_factor {
    int64_t order;
    const float *matrix;   /* [order][order] or NULL */
    const float *matrix_t; /* its transpose, in a right factor: what rows are multiplied by */
    int hadamard;          /* without matrix: 1 = Hadamard transform first */
    int64_t steps;         /* without matrix: the chain */
    const int32_t *pairs;  /* [steps][2] */
    const float *cos_sin;  /* [steps][2] */
};

/* out [n][n] <- transpose of a [n][n]; out is not a. */
void
sq_transpose(const float *a, int64_t n, float *out);

/* ---- DuQuant (rotate) ---------------------------------------------------------------------
 * arXiv 2406.01721, section 3.2: x' = x R1 P R2, R1 and R2 block-diagonal with k / b blocks [b][b],
 * P a permutation of the channels. */

/* Largest block of sq_duquant_* and of a rotation, and largest random matrix. */
#define SQ_DUQUANT_B_MAX 4096

/* q [n][n] <- a random orthogonal matrix (Haar's measure) of the seed's own stream. workspace:
 * [2 n]. */
sq_status
sq_random_orthogonal(int64_t n, uint64_t seed, double *q, double *workspace);

/* steps [count][b][b] <- R~ Q of equation 2, with its own random Q for each greedy step: the first
 * row of R~ and the first column of every matrix are 1 / sqrt(b). Parallel over steps; takes
 * b^2 doubles of memory per thread. */
sq_status
sq_duquant_steps(int64_t b, int64_t count, uint64_t seed, float *steps);

/* blocks [k / b][b][b] <- R^ of each block of b columns of sample [rows][k]: at most count greedy
 * steps R^i = E_d steps[i] E_d, d the column of largest absolute value, of which the first n are
 * kept, n the step after which the largest absolute value (the peak) was least; 0 of them where no
 * step lowers it. peaks [k / b][count + 1]: the peak before and after each step. Parallel over
 * blocks; takes 2 (rows + b) b + 5 b^2 floats of memory per thread. NaN or Inf: SQ_ERR_NONFINITE.
 */
sq_status
sq_duquant_blocks(const float *sample, int64_t rows, int64_t k, const float *steps, int64_t count,
                  int64_t b, float *blocks, float *peaks);

/* permutation [k]: the channels by descending maxima [k] (the lower index first among equals),
 * dealt over the k / b blocks back and forth; channel permutation[i] goes to place i. */
sq_status
sq_zigzag(const double *maxima, int64_t k, int64_t b, int32_t *permutation);

/* ---- a site's rotation ------------------------------------------------------------------- */

struct sq_block_rotation {
    int64_t b;
    const float *first;         /* [k / b][b][b] */
    const int32_t *permutation; /* [k], each of 0 .. k - 1 once */
    const float *second;        /* [k / b][b][b] */
};

enum { SQ_UNROTATED, SQ_KRONECKER, SQ_BLOCKS };

/* Largest k of a rotation. */
#define SQ_ROTATION_K_MAX ((int64_t)1 << 40)

/* A row x [k] becomes
 *   SQ_KRONECKER  L X R^T, where X [k1][k2] is the row reshaped, L the left factor and R the right
 *                 one (both act on their axis's vectors: R2 of the paper is R^T);
 *   SQ_BLOCKS     x blockdiag(first), permuted, times blockdiag(second).
 * Who makes one proves its contents once: indices in range, a permutation, orthogonal matrices. The
 * functions below check sizes and pointers alone. */
struct sq_rotation {
    int kind;                        /* one of the above */
    int64_t k;                       /* k1 k2; 0 for SQ_UNROTATED, which fits every k */
    struct sq_factor left, right;    /* SQ_KRONECKER */
    struct sq_block_rotation blocks; /* SQ_BLOCKS */
};

/* SQ_OK if the sizes and pointers of a rotation (not SQ_UNROTATED) agree. */
sq_status
sq_rotation_check(const struct sq_rotation *rotation);

/* *error <- the largest |M M^T - I| of matrices [count][n][n], NaN if one holds NaN or Inf. */
sq_status
sq_orthogonality_error(const float *matrices, int64_t count, int64_t n, float *error);

/* Bytes of workspace for m rows or fewer in the functions below, whatever the number of threads is
 * when the call comes; untouched scratch takes no memory. 0 for NULL and SQ_UNROTATED, SIZE_MAX / 2
 * when the sizes are out of range. */
size_t
sq_rotation_workspace_bytes(const struct sq_rotation *rotation, int64_t m);

/* y [m][k] <- the rows of x, each rotated. y may be x. Parallel over rows; the value of a row
 * depends on that row alone, bit for bit. */
sq_status
sq_rotate(const struct sq_rotation *rotation, const float *x, int64_t m, float *y, void *workspace);

/* Takes rotated rows `first` and following, values [rows][k], which are valid during the call. */
typedef void (*sq_rows_fn)(void *context, int64_t first, int64_t rows, const float *values);

/* Hands the rows of x [m][k], each rotated as by sq_rotate, to fn: a block of rows at a time, as it
 * lies in the cache, on several threads at once. */
sq_status
sq_rotate_each(const struct sq_rotation *rotation, const float *x, int64_t m, sq_rows_fn fn,
               void *context, void *workspace);

/* x [m][k] <- rotated on the calling thread alone, whatever the number of threads is: for calls
 * inside a parallel loop. Its workspace is that of sq_rotation_serial_bytes. */
size_t
sq_rotation_serial_bytes(const struct sq_rotation *rotation, int64_t m);

sq_status
sq_rotate_serially(const struct sq_rotation *rotation, float *x, int64_t m, void *workspace);

/* ---- quantizers (quantize) -------------------------------------------------------------- */

/* Symmetric: scale = clip * max|x| / (2^(bits-1) - 1), code = clamp(rint(x / scale)) in
 * [-2^(bits-1), 2^(bits-1) - 1]. Asymmetric: lo = min(0, min x), hi = max(0, max x), scale = clip *
 * (hi - lo) / (2^bits - 1), x = scale * (code - zero), code in [0, 2^bits - 1], zero = rint(-clip *
 * lo / scale). x / scale is the float32 product with inv_scale = 1 / scale; halves go to even. A
 * scale below the smallest normal float32 becomes 0, and the row's codes and zero with it. A row is
 * a token (per token) or an output channel (per channel); groups of g columns along k. Every kernel
 * table gives the same bytes. */
struct sq_quantizer {
    int bits;      /* 4 or 8 */
    int symmetric; /* 1 or 0 */
    int64_t group; /* g, or 0 for the whole row */
    float clip;    /* in (0, 1] */
    int search;    /* 1: per row and group, clip times the SQ_CLIP_RATIO of least squared error */
};

/* Ratio i of the clip search, 1.00 down to 0.20; among equals the largest wins. On Gaussian,
 * Laplace and Student (3, 4) rows and groups the error is within 0.4 % of a search in steps of 0.01
 * down to 0.05; steps of 0.04 cost up to 1.4 %, a floor of 0.40 up to 14 % (whole rows, heavy
 * tails). With 4 symmetric bits and clip 1 a sum of integers, of values rounded to 1 / 10150 of the
 * group's largest, first rules out all ratios but those within 0.2 % of its least. */
#define SQ_CLIP_RATIOS 41
#define SQ_CLIP_RATIO(i) ((float)(100 - 2 * (i)) / 100.0f)

/* x [m][k] -> codes [m][k] (int8: symmetric codes as they are, asymmetric ones as uint8 bits),
 * scales [m][k / g], zeros [m][k / g] (NULL when symmetric). k must be a multiple of g; the last
 * group may not be short. NaN or Inf: SQ_ERR_NONFINITE. Parallel over rows. */
sq_status
sq_quantize(const struct sq_quantizer *q, const float *x, int64_t m, int64_t k, int8_t *codes,
            float *scales, int32_t *zeros);

/* One token x [k], symmetric: codes [k] and its scale. Serial. */
struct sq_kernels;
sq_status
sq_quantize_row(const struct sq_kernels *kernels, int bits, float clip, const float *x, int64_t k,
                int8_t *codes, float *scale);

/* x [m][k] <- scale * (code - zero), codes as sq_quantize writes them; groups = k / g per row;
 * zeros is NULL for symmetric codes. Parallel over rows. */
sq_status
sq_dequantize(const int8_t *codes, const float *scales, const int32_t *zeros, int64_t m, int64_t k,
              int64_t groups, float *x);

/* ---- GPTQ (quantize) --------------------------------------------------------------------
 * Rounding column by column, each column's error spread over the columns still to come so that
 * tr(E H E^T) stays small, E = W - dequantized codes, H = sum over tokens of x x^T (Frantar et al.,
 * arXiv 2210.17323). One factor of H serves all linears of a site. */

/* gram [k][k] (symmetric) += x^T x for x [m][k]. The sums are made in the lower triangle and
 * mirrored. NaN or Inf in x: SQ_ERR_NONFINITE, gram is as it was. Parallel over blocks of gram. */
sq_status
sq_gram_update(const float *x, int64_t m, int64_t k, float *gram);

/* Largest k of sq_gptq_*: a factor of 2^16 x 2^16 has 16 GiB. */
#define SQ_GPTQ_K_MAX (1 << 16)

/* gram [k][k] (symmetric) <- L, lower triangular, zeros above, of
 *     L L^T = P (gram + damping * mean(diagonal) * I) P^T;
 * row i of L stands for input permutation[i], and inputs are rounded from the last row to the
 * first. by_diagonal 0: inputs in their own order (permutation[i] = k - 1 - i), 1: in the order of
 * falling diagonal, "act order". An input that is zero on every token has no error to spread and is
 * rounded to nearest. Values that are not finite: SQ_ERR_NONFINITE. Not positive definite:
 * SQ_ERR_RANGE. In both cases gram is spoiled. In float32; again in float64, with 8 k^2 bytes of
 * scratch, where that fails. Parallel over blocks. */
sq_status
sq_gptq_factor(float *gram, int64_t k, float damping, int by_diagonal, int32_t *permutation);

/* weights [n][k] -> codes [n][k], scales [n][k / g] (q->group = g, or 0 for whole rows) on the
 * symmetric grid of sq_quantize with q's bits, clip and search. factor [k][k] and permutation [k]
 * are sq_gptq_factor's. Scales of whole rows are of the weights as given. Those of groups are taken
 * when their first column is reached, of the weights as they have become by then, unless the
 * order is by diagonal: then of the weights as given, in their stored places ("static groups").
 * SQ_ERR_RANGE also when permutation is none or factor's diagonal not positive. Parallel over
 * rows; a row's result does not depend on the other rows. */
sq_status
sq_gptq_round(const struct sq_quantizer *q, const float *factor, const int32_t *permutation,
              const float *weights, int64_t n, int64_t k, int8_t *codes, float *scales);

/* ---- weights (quantize) -------------------------------------------------------------------
 * From a stored weight to the words of the file in one pass, a few rows at a time in cache. */

/* What happens to a weight's rows before they are rounded, in this order. */
struct sq_weight_transform {
    const float *columns;               /* [k] multiplies the columns: a balance; or NULL */
    const float *rows;                  /* [n] multiplies the rows; or NULL */
    const struct sq_rotation *rotation; /* of the rows; or NULL */
};

/* weight [n][k] of dtype -> words [n][ceil(k / 8)] as sq_pack_int4 makes them and scales [n][k / g]
 * (q: 4 symmetric bits). Takes 10 bytes of scratch per element of the few rows that a thread has in
 * work. SQ_ERR_NONFINITE: *bad_row is the first row that holds NaN or Inf, or comes to hold it; the
 * outputs are then spoiled. Parallel over blocks of rows; a row's words depend on that row alone.
 */
sq_status
sq_quantize_weight(const struct sq_quantizer *q, const struct sq_weight_transform *transform,
                   sq_dtype dtype, const void *weight, int64_t n, int64_t k, int32_t *words,
                   float *scales, int64_t *bad_row);

/* The rows as sq_quantize_weight would round them: out [n][k] in float32. */
sq_status
sq_transform_weight(const struct sq_weight_transform *transform, sq_dtype dtype, const void *weight,
                    int64_t n, int64_t k, float *out, int64_t *bad_row);

/* Asks the system to read [address, address + bytes), if it is a mapped file, ahead of its use. */
void
sq_will_need(const void *address, size_t bytes);

/* ---- packing (pack) --------------------------------------------------------------------- */

/* Words of one packed row: ceil(k / 8) int32, low nibble first, code + 8; the tail is code 0. */
int64_t
sq_packed_words(int64_t k);

/* codes [n][k] in [-8, 7] -> words [n][ceil(k / 8)] (the pack-quantized layout). */
sq_status
sq_pack_int4(const int8_t *codes, int64_t n, int64_t k, int32_t *words);

sq_status
sq_unpack_int4(const int32_t *words, int64_t n, int64_t k, int8_t *codes);

/* int4 weights in the panels of one kernel table. Made by _create, owned by the caller of it. */
typedef struct sq_packed_t sq_packed_t;

/* words [n][ceil(k / 8)], scales [n][k / g]; g = 0 means one scale per output channel, otherwise g
 * must be a multiple of SQ_K_ALIGN that divides k. int8_inputs: leading inputs whose activations
 * come with 8 bits where the others have 4, a multiple of SQ_K_ALIGN (and of g) below k; 0: none.
 * Copies; the copy is never written again and may be shared between threads. k <= SQ_PACKED_K_MAX,
 * so that integer sums fit 32 bits. */
#define SQ_PACKED_K_MAX (1 << 20)
sq_status
sq_packed_create(const struct sq_kernels *kernels, const int32_t *words, const float *scales,
                 int64_t n, int64_t k, int64_t g, int64_t int8_inputs, sq_packed_t **out);

void
sq_packed_destroy(sq_packed_t *w);

void
sq_packed_shape(const sq_packed_t *w, int64_t *n, int64_t *k, int64_t *g);

int64_t
sq_packed_int8_inputs(const sq_packed_t *w);

/* Memory held by w's panels and scales. */
size_t
sq_packed_bytes(const sq_packed_t *w);

/* The table that made w's panels, which is the table that must multiply them. */
const struct sq_kernels *
sq_packed_kernels(const sq_packed_t *w);

/* ---- linears (runtime) ------------------------------------------------------------------ */

/* A token's activations as the linears read them. k is padded with zeros to ld, a multiple of
 * SQ_K_ALIGN that suits the caches. sums[b] is the sum of the token's codes before block b of
 * SQ_K_ALIGN, so that a weight group's sum is one difference (the kernels multiply code + 8 and
 * correct by it). */
#define SQ_K_ALIGN 32
struct sq_activations {
    int bits; /* 4, 8: codes; 16: values */
    int64_t m, k, ld;
    int64_t int8_inputs; /* leading ones with 8-bit codes and a scale of their own; bits is 4 */
    float *values;       /* [m][ld] for 16 */
    int8_t *codes;       /* [m][ld] for 4 and 8 */
    float *scales; /* [m] for 4 and 8; behind them [m] of the int8_inputs when there are any */
    int32_t *sums; /* [m][ld / SQ_K_ALIGN + 1] for 4 and 8 */
};

/* Row length and workspace for m tokens of k inputs. */
int64_t
sq_activations_ld(int64_t k);

size_t
sq_activations_workspace_bytes(int bits, int64_t m, int64_t k);

/* Fills a from x [m][k], rotated on the way (rotation NULL or SQ_UNROTATED: as it is): symmetric
 * per token with the given clip, or a copy for 16 bits. The first int8_inputs get 8 bits over their
 * own unclipped range (0 unless bits is 4). Memory comes from workspace; rotation_workspace is
 * sq_rotate_each's. NaN or Inf: SQ_ERR_NONFINITE. Parallel over tokens. */
sq_status
sq_activations_prepare(const struct sq_kernels *kernels, int bits, float clip, int64_t int8_inputs,
                       const struct sq_rotation *rotation, const float *x, int64_t m, int64_t k,
                       void *rotation_workspace, void *workspace, struct sq_activations *a);

/* y [m][ld_y] = a w^T, n columns written. Integer sums are exact; a token's results do not depend
 * on m, on the batch or on the number of threads. Parallel over panels. */
sq_status
sq_linear_packed(const sq_packed_t *w, const struct sq_activations *a, float *y, int64_t ld_y);

/* y [m][ld_y] = x w^T for w [n][k] in 32 or 16 bits, in fixed blocks so that results do not depend
 * on the number of threads. 16-bit weights and at most SQ_DENSE_FEW tokens: w is widened in
 * registers, and a token's results do not depend on m either. All else goes through BLAS, whose
 * last bits follow m. */
#define SQ_DENSE_FEW 64
sq_status
sq_linear_dense(sq_dtype dtype, const void *w, const float *x, int64_t m, int64_t n, int64_t k,
                float *y, int64_t ld_y);

/* out [count] float32 <- in [count] of dtype. With reject, NaN and Inf are SQ_ERR_NONFINITE. */
sq_status
sq_to_float32(sq_dtype dtype, const void *in, int64_t count, int reject, float *out);

/* out [m][width] float32 <- rows index [m] of table [rows][width]; SQ_ERR_RANGE outside it. */
sq_status
sq_gather_rows(sq_dtype dtype, const void *table, int64_t rows, int64_t width, const int64_t *index,
               int64_t m, float *out);

/* ---- decoder (runtime) ------------------------------------------------------------------ */

/* One linear of a layer: packed, or dense when packed is NULL. bias [n] or NULL. Borrowed. */
struct sq_linear {
    int64_t n, k;
    const sq_packed_t *packed;
    sq_dtype dtype;
    const void *dense; /* [n][k] */
    const float *bias;
};

/* One site: the linears that share an input. */
struct sq_site {
    struct sq_rotation rotation;
    int bits; /* of the activations entering packed linears: 4, 8, 16 */
    float clip;
};

enum { SQ_Q, SQ_K, SQ_V, SQ_O, SQ_GATE, SQ_UP, SQ_DOWN, SQ_N_LINEARS };
enum { SQ_SITE_QKV, SQ_SITE_O, SQ_SITE_GATE_UP, SQ_SITE_DOWN, SQ_N_SITES };

/* The most tokens of a call, inputs of a linear, and heads. */
#define SQ_TOKENS_MAX ((int64_t)1 << 24)
#define SQ_WIDTH_MAX ((int64_t)1 << 24)
#define SQ_HEADS_MAX ((int64_t)1 << 16)

struct sq_architecture {
    int64_t hidden, intermediate, heads, kv_heads, head_dim;
    float rms_eps;
    int64_t sliding_window; /* 0: none */
    const float *inv_freq;  /* [head_dim / 2] rotary frequencies, scaled as the model wants */
    float rope_scale;       /* multiplies cos and sin */
};

struct sq_layer {
    const float *norm_attention, *norm_mlp; /* [hidden] */
    struct sq_linear linears[SQ_N_LINEARS];
    struct sq_site sites[SQ_N_SITES];
};

/* ---- KV cache (runtime): keys and values of every layer, in pages of SQ_PAGE_TOKENS positions of
 * one sequence and layer, taken when a position is first written and given back by _release. A
 * position that was never written holds zeros. bits:
 *   32, 16  float32, float16 (clamped to finite values);
 *   8, 4    per token and head unsigned codes, x = scale * code + minimum, scale and minimum in
 *           float16; a head with NaN or Inf becomes NaN. With hadamard, queries and keys take the
 *           orthonormal matrix of sq_hadamard_matrix(head_dim) after the rotary embedding, which
 *           spreads a key's outlying channels over its codes and leaves the scores as they are.
 * No call may run beside another one on the same cache, not on another layer either. */
#define SQ_PAGE_TOKENS 64
struct sq_kv_shape {
    int64_t layers, sequences, kv_heads, head_dim;
    int64_t capacity;    /* positions of a sequence */
    int64_t limit_bytes; /* of pages; 0: none */
    int bits, hadamard;
};
typedef struct sq_kv_cache_t sq_kv_cache_t;

/* No page is taken yet. SQ_ERR_RANGE: a size below 1, bits that are none of the above, more than
 * 2^31 - 1 sequences, 2^31 positions or 2^24 head_dim. SQ_ERR_NOMEM also where sizes overflow. */
sq_status
sq_kv_cache_create(const struct sq_kv_shape *shape, sq_kv_cache_t **out);

void
sq_kv_cache_destroy(sq_kv_cache_t *cache);

const struct sq_kv_shape *
sq_kv_cache_shape(const sq_kv_cache_t *cache);

/* Bytes of one page, and of all pages in memory: those of sequences and, for reuse, at most as many
 * free ones. The second may be called while another call runs. */
int64_t
sq_kv_cache_page_bytes(const sq_kv_cache_t *cache);
int64_t
sq_kv_cache_bytes(const sq_kv_cache_t *cache);

/* Takes the pages of layers first .. last - 1 that position[t] of sequence[t], t < m, still need.
 * SQ_ERR_NOMEM: no memory, or more than limit_bytes; nothing was taken then. */
sq_status
sq_kv_cache_reserve(sq_kv_cache_t *cache, int64_t first, int64_t last, const int32_t *sequence,
                    const int64_t *position, int64_t m);

/* Frees the pages of a sequence in all layers; it holds zeros again. */
sq_status
sq_kv_cache_release(sq_kv_cache_t *cache, int64_t sequence);

/* keys, values [count][kv_heads][head_dim] <- what positions 0 .. count - 1 of a sequence hold in a
 * layer, as attention sees it (keys rotated). */
sq_status
sq_kv_cache_read(const sq_kv_cache_t *cache, int64_t layer, int64_t sequence, int64_t count,
                 float *keys, float *values);

/* x [m][n] -> codes [m][n] and each row's scale and minimum, float16 bits, as the cache with 8 or 4
 * bits rounds a head: both are rounded so that every x is within half a step of scale * code +
 * minimum as long as it is a float16 in size. */
sq_status
sq_kv_quantize(int bits, const float *x, int64_t m, int64_t n, uint8_t *codes, uint16_t *scales,
               uint16_t *minima);

/* Where to copy the (unrotated) input of each site, [m][k of the site]; NULL: nowhere. */
struct sq_record {
    float *inputs[SQ_N_SITES];
};

/* length: one more than the largest position of the call. */
size_t
sq_layer_workspace_bytes(const struct sq_architecture *a, const struct sq_layer *layer, int64_t m,
                         int64_t length);

/* hidden [m][hidden] is updated in place by one decoder layer, number index of the cache. Token t
 * belongs to sequence[t] and stands at position[t]; its key and value are written to the cache
 * there first (pages are reserved as needed, before anything is written); it attends to positions 0
 * .. position[t] of its own sequence. record may be NULL. */
sq_status
sq_layer_forward(const struct sq_architecture *a, const struct sq_layer *layer,
                 sq_kv_cache_t *cache, int64_t index, const int32_t *sequence,
                 const int64_t *position, int64_t m, float *hidden, const struct sq_record *record,
                 void *workspace);

/* y [m][n] <- RMSNorm(x) * weight. */
sq_status
sq_rms_norm(const float *x, const float *weight, int64_t m, int64_t n, float eps, float *y);

/* Next token from logits [v]: temperature 0 is argmax; top_k 0 and top_p 1 are off. uniform is
 * the caller's random number, in [0, 1). workspace: v * 16 bytes. */
sq_status
sq_sample(const float *logits, int64_t v, float temperature, int64_t top_k, float top_p,
          double uniform, void *workspace, int64_t *token);

/* ---- evaluate --------------------------------------------------------------------------- */

/* nll [m] <- -log softmax(logits [m][v])[target [m]], in float64. */
sq_status
sq_negative_log_likelihood(const float *logits, const int64_t *target, int64_t m, int64_t v,
                           double *nll);

/* kl [m] <- KL(softmax(p) || softmax(q)) in nats; same_top [m] <- 1 where the argmax agree. */
sq_status
sq_kl_divergence(const float *p, const float *q, int64_t m, int64_t v, double *kl,
                 uint8_t *same_top);

/* ---- outliers (inspect) ------------------------------------------------------------------- */

/* What is measured of a token x [k] with codes q [k] and scale s. */
enum {
    SQ_OUTLIER_PEAK,    /* max |x| */
    SQ_OUTLIER_SUM,     /* sum |x| */
    SQ_OUTLIER_SUM2,    /* sum x^2 */
    SQ_OUTLIER_SUM4,    /* sum x^4 */
    SQ_OUTLIER_ERROR,   /* sum (x - s q)^2 */
    SQ_OUTLIER_ENTROPY, /* Shannon entropy of q in bits */
    SQ_OUTLIER_FIELDS
};

/* x [m][k], its symmetric codes [m][k] and scales [m] -> tokens [m], and per channel: channel_sum2
 * [k], the sum of squares, and channel_above [k], the number of tokens whose |x| there exceeds
 * normal times the token's root mean square. k >= 1, normal > 0. NaN or Inf: SQ_ERR_NONFINITE.
 * Parallel over tokens, then channels. */
sq_status
sq_outliers(const float *x, int64_t m, int64_t k, const int8_t *codes, const float *scales,
            double normal, double (*tokens)[SQ_OUTLIER_FIELDS], double *channel_sum2,
            int64_t *channel_above);

#endif
