/* SPDX-License-Identifier: Apache-2.0 */
/* A libFuzzer target for what takes untrusted bytes and sizes in the core: run_fuzz.sh compiles and
 * runs it. The first byte of an input chooses the part, the second whether sizes are sound. Every
 * buffer has exactly the bytes that the headers of csrc/ promise. */
#include <math.h>

#include "fuzz_input.h"

#include "core/sq_internal.h"
#include "core/sq_threads.h"
#include "kernels/code_rows.h"
#include "kernels/sq_kernels.h"

static const int weight_bits[] = {4, 5, 6, 8};
static const int row_bits[] = {4, 6, 8};

static sq_dtype
any_dtype(struct input *in)
{
    return (sq_dtype)number(in, up_to(in, 2));
}

static int64_t
dtype_bytes(sq_dtype dtype)
{
    return dtype == SQ_F32 ? 4 : 2;
}

/* ---- codes and words -------------------------------------------------------------------- */

static void
fuzz_words(struct input *in)
{
    const int bits = (int)number(in, weight_bits[up_to(in, 3)]);
    const int64_t n = number(in, up_to(in, 20)), k = number(in, up_to(in, 150));
    const int known = sq_weight_bits_valid(bits) && k > 0;
    const int64_t length = known ? sq_packed_words(bits, k) : 0;
    int32_t *words = matrix(in, n, length, sizeof *words);
    int32_t *again = matrix(in, n, length, sizeof *again);
    int8_t *codes = matrix(in, n, known ? k : 0, 1), *same = matrix(in, n, known ? k : 0, 1);
    if (in->too_large) {
        HOLDS(n == 0 || sq_unpack_codes(bits, NULL, n, k, NULL) != SQ_OK);
        return;
    }
    if (sq_unpack_codes(bits, words, n, k, codes) != SQ_OK) {
        return;
    }
    HOLDS(sq_pack_codes(bits, codes, n, k, again) == SQ_OK);
    HOLDS(sq_unpack_codes(bits, again, n, k, same) == SQ_OK);
    HOLDS(memcmp(codes, same, (size_t)(n * k)) == 0);
    if (n > 0) { /* what fits no code */
        codes[up_to(in, 255) % (n * k)] = (int8_t)next_byte(in);
        (void)sq_pack_codes(bits, codes, n, k, again);
    }
}

/* ---- packed weights and their products -------------------------------------------------- */

static void
multiply(struct input *in, const sq_packed_t *w, int bits, int64_t m)
{
    int64_t n, k, g;
    sq_packed_shape(w, &n, &k, &g);
    const int64_t int8_inputs = number(in, bits == 4 ? sq_packed_int8_inputs(w) : 0);
    const float clip = real(in, 0.9f);
    float *x = floats(in, m, k), *y = floats(in, m, n), *alone = floats(in, 1, n);
    void *memory = buffer(in, (int64_t)sq_activations_workspace_bytes(bits, m, k), 1);
    struct sq_activations a;
    if (in->too_large ||
        sq_activations_prepare(sq_packed_kernels(w), bits, clip, int8_inputs, NULL, x, m, k, NULL,
                               memory, &a) != SQ_OK ||
        sq_linear_packed(w, &a, y, n) != SQ_OK || m == 0) {
        return;
    }
    const int64_t t = m - 1;
    HOLDS(sq_activations_prepare(sq_packed_kernels(w), bits, clip, int8_inputs, NULL, x + t * k, 1,
                                 k, NULL, memory, &a) == SQ_OK);
    HOLDS(sq_linear_packed(w, &a, alone, n) == SQ_OK);
    for (int64_t j = 0; j < n; j++) { /* a token does not see the others */
        HOLDS(alone[j] == y[t * n + j] || (isnan(alone[j]) && isnan(y[t * n + j])));
    }
}

static void
fuzz_packed(struct input *in)
{
    static const int activation_bits[] = {4, 8, 16};
    const int bits = (int)number(in, weight_bits[up_to(in, 3)]);
    const int64_t g = number(in, up_to(in, 2) * SQ_K_ALIGN);
    const int64_t step = g > 0 && g < MOST_BYTES ? g : SQ_K_ALIGN; /* others are to be refused */
    const int64_t k = number(in, g ? step * (1 + up_to(in, 4)) : 1 + up_to(in, 200));
    const int64_t n = number(in, 1 + up_to(in, 100)), blocks = k > step ? (k - 1) / step : 0;
    const int64_t int8_inputs = number(in, step * up_to(in, blocks < 4 ? blocks : 4));
    const int known = sq_weight_bits_valid(bits) && k > 0 && g >= 0;
    int32_t *words = matrix(in, n, known ? sq_packed_words(bits, k) : 0, sizeof *words);
    float *scales = floats(in, n, !known ? 0 : g ? k / g : 1);
    const struct sq_kernels *kernels = up_to(in, 1) ? sq_kernels_active() : &sq_kernels_generic;
    sq_packed_t *w = NULL;
    if (in->too_large || sq_packed_create(kernels, words, scales, n, k, g, int8_inputs, bits, &w)) {
        HOLDS(!w);
        return;
    }
    multiply(in, w, (int)number(in, activation_bits[up_to(in, 2)]), number(in, up_to(in, 9)));
    sq_packed_destroy(w);
}

/* ---- rows of codes, floats -------------------------------------------------------------- */

static void
fuzz_code_rows(struct input *in)
{
    const int bits = (int)number(in, row_bits[up_to(in, 2)]);
    const int64_t rows = number(in, up_to(in, 30)), k = number(in, 1 + up_to(in, 140));
    const int64_t m = number(in, up_to(in, 6));
    const int known = sq_code_row_bits_valid(bits) && k > 0 && k < MOST_BYTES;
    struct sq_code_rows w = {.bits = bits, .k = k, .rows = rows};
    uint8_t *codes = matrix(in, rows, known ? sq_code_row_bytes(bits, k) : 0, 1);
    uint16_t *scales = matrix(in, rows, known ? sq_code_row_scales(k) : 0, 2);
    int64_t *index = buffer(in, m, sizeof *index), bad_row;
    float *x = floats(in, m, k), *y = floats(in, m, rows);
    const sq_dtype dtype = any_dtype(in);
    void *table = matrix(in, rows, k, dtype_bytes(dtype));
    if (in->too_large) {
        return;
    }
    w.codes = codes;
    w.scales = scales;
    (void)sq_linear_rows(&w, (int)number(in, 8 * (1 + rows % 3)), x, m, y, rows);
    for (int64_t i = 0; i < m; i++) {
        index[i] = number(in, rows > 0 ? (index[i] & 0xff) % rows : 0);
    }
    (void)sq_gather_code_rows(&w, index, m, x);
    (void)sq_gather_rows(dtype, table, rows, k, index, m, x);
    (void)sq_to_float32(dtype, table, sq_min_i64(rows, m) * k, 1, x);
    (void)sq_quantize_rows(bits, dtype, table, rows, k, codes, scales, &bad_row);
}

static void
fuzz_dense(struct input *in)
{
    const sq_dtype dtype = any_dtype(in);
    const int64_t m = number(in, up_to(in, 70)), n = number(in, up_to(in, 40));
    const int64_t k = number(in, 1 + up_to(in, 70));
    const void *w = matrix(in, n, k, dtype_bytes(dtype));
    float *x = floats(in, m, k), *y = floats(in, m, n);
    if (!in->too_large) {
        (void)sq_linear_dense(dtype, w, x, m, n, k, y, n);
        (void)sq_linear_steady(dtype, w, x, m, n, k, y);
    }
}

/* n times k; beyond 64 bits -1, which no buffer has. */
static int64_t
product(int64_t n, int64_t k)
{
    int64_t found;
    return __builtin_mul_overflow(n, k, &found) ? -1 : found;
}

static void
fuzz_decode(struct input *in)
{
    const int64_t count = number(in, up_to(in, 3)), n = number(in, up_to(in, 40));
    const int64_t k = number(in, up_to(in, 40)), elements = product(n, k);
    if (up_to(in, 1)) {
        const int64_t rows = number(in, 1 + up_to(in, 20)), columns = number(in, 1 + up_to(in, 20));
        const int64_t grid =
            rows > 0 && columns > 0 && n > 0 && elements > 0 && elements <= MOST_BYTES
                ? sq_ceil_div(n, rows) * sq_ceil_div(k, columns)
                : 0;
        uint8_t *codes = matrix(in, count, elements, 1);
        float *scales = floats(in, count, grid);
        uint16_t *out = matrix(in, count, elements, 2);
        (void)sq_decode_fp8(in->too_large ? NULL : codes, scales, count, n, k, rows, columns, out);
        return;
    }
    uint8_t *codes = matrix(in, count, elements, 16), *scales = matrix(in, count, elements, 1);
    uint16_t *out = matrix(in, count, elements, 64);
    (void)sq_decode_mxfp4(in->too_large ? NULL : codes, scales, count, n, k, out);
}

/* ---- the quantizer ---------------------------------------------------------------------- */

static struct sq_quantizer
any_quantizer(struct input *in, int64_t group)
{
    const uint8_t flags = next_byte(in);
    return (struct sq_quantizer){.bits = (int)number(in, weight_bits[flags % 4]),
                                 .symmetric = (int)number(in, flags >> 2 & 1),
                                 .group = number(in, group),
                                 .clip = real(in, 1.0f - up_to(in, 99) * 0.01f),
                                 .search = (int)number(in, flags >> 3 & 1),
                                 .bfloat16_scales = (int)number(in, flags >> 4 & 1)};
}

static void
fuzz_quantize(struct input *in)
{
    const int64_t group = 1 + up_to(in, 40), m = number(in, up_to(in, 10));
    const int64_t k = number(in, group * (1 + up_to(in, 4)));
    const struct sq_quantizer q = any_quantizer(in, up_to(in, 1) ? group : 0);
    const int64_t groups = q.group > 0 && k > 0 ? k / q.group : 1;
    float *x = floats(in, m, k), *scales = floats(in, m, groups);
    int8_t *codes = matrix(in, m, k, 1);
    int32_t *zeros = q.symmetric ? NULL : matrix(in, m, groups, sizeof *zeros);
    if (in->too_large) {
        HOLDS(sq_quantize(&q, NULL, m, k, NULL, NULL, zeros) != SQ_OK);
    }
    else if (sq_quantize(&q, x, m, k, codes, scales, zeros) == SQ_OK) {
        HOLDS(sq_dequantize(codes, scales, zeros, m, k, groups, x) == SQ_OK);
        HOLDS(sq_all_finite(scales, m * groups));
    }
    if (!in->too_large) {
        (void)sq_dequantize(codes, scales, zeros, m, k, groups, x);
    }
}

static void
fuzz_weight(struct input *in)
{
    const int64_t group = SQ_K_ALIGN * up_to(in, 2);
    const int64_t n = number(in, up_to(in, 20)),
                  k = number(in, group ? 2 * group : 1 + up_to(in, 90));
    const struct sq_quantizer q = any_quantizer(in, group);
    const sq_dtype dtype = any_dtype(in);
    const int known = sq_weight_bits_valid(q.bits) && k > 0;
    const void *weight = matrix(in, n, k, dtype_bytes(dtype));
    const struct sq_weight_transform transform = {.columns = up_to(in, 1) ? floats(in, 1, k) : NULL,
                                                  .rows = up_to(in, 1) ? floats(in, 1, n) : NULL};
    int32_t *words = matrix(in, n, known ? sq_packed_words(q.bits, k) : 0, sizeof *words);
    float *scales = floats(in, n, q.group > 0 && k > 0 ? k / q.group : 1);
    float *out = floats(in, n, k);
    int64_t bad_row;
    if (!in->too_large) {
        (void)sq_quantize_weight(&q, &transform, dtype, weight, n, k, words, scales, &bad_row);
        (void)sq_transform_weight(&transform, dtype, weight, n, k, out, &bad_row);
    }
}

static void
fuzz_gptq(struct input *in)
{
    const int64_t group = 1 + up_to(in, 8), n = number(in, up_to(in, 9));
    const int64_t k = number(in, group * (1 + up_to(in, 4)));
    const int by_diagonal = up_to(in, 1);
    const struct sq_quantizer q = any_quantizer(in, up_to(in, 1) ? group : 0);
    float *x = floats(in, k, k), *gram = floats(in, k, k), *weights = floats(in, n, k);
    float *scales = floats(in, n, q.group > 0 && k > 0 ? k / q.group : 1);
    int8_t *codes = matrix(in, n, k, 1);
    int32_t *permutation = buffer(in, k, sizeof *permutation);
    if (in->too_large) {
        return;
    }
    if (up_to(in, 1)) {
        memset(gram, 0, (size_t)(k > 0 ? k * k : 0) * sizeof *gram);
        (void)sq_gram_update(up_to(in, 1) ? 8 : 32, NULL, x, k, k, gram);
    }
    const float damping = real(in, 0.01f);
    if (up_to(in, 3) && sq_gptq_factor(gram, k, damping, by_diagonal, permutation) != SQ_OK) {
        return;
    }
    struct sq_gptq_feedback *feedback = NULL;
    if (up_to(in, 1) && sq_gptq_feedback_make(gram, k, &feedback) != SQ_OK) {
        return;
    }
    (void)sq_gptq_round(&q, gram, permutation, feedback, weights, n, k, codes, scales);
    sq_gptq_feedback_free(feedback);
}

/* ---- the KV cache ----------------------------------------------------------------------- */

static void
store_and_read(struct input *in, sq_kv_cache_t *cache, int64_t layer, int32_t sequence,
               int64_t position)
{
    const struct sq_kv_shape *s = sq_kv_cache_shape(cache);
    const int64_t d = s->head_dim, elements = (position + 1) * s->kv_heads * d;
    float *key = floats(in, 1, d), *value = floats(in, 1, d), *scratch = floats(in, 1, d);
    float *keys = floats(in, elements, 1), *values = floats(in, elements, 1);
    if (in->too_large || layer < 0 || layer >= s->layers) {
        return;
    }
    for (int64_t head = 0; head < s->kv_heads; head++) {
        uint8_t *block = sq_cache_block(cache, layer, sequence, position / SQ_PAGE_TOKENS, head);
        HOLDS(block);
        sq_cache_rotate(cache, sq_kernels_active(), key, 1, scratch);
        sq_cache_store(cache, sq_kernels_active(), block, position % SQ_PAGE_TOKENS, key, value);
    }
    HOLDS(sq_kv_cache_read(cache, layer, sequence, position + 1, keys, values) == SQ_OK);
    for (int64_t i = elements - d; i < elements && s->bits == 32; i++) {
        HOLDS(memcmp(values + i, value + (i - elements + d), sizeof *values) == 0);
    }
}

static void
fuzz_cache(struct input *in)
{
    static const int cache_bits[] = {4, 8, 16, 32};
    struct sq_kv_shape shape = {.layers = number(in, 1 + up_to(in, 3)),
                                .sequences = number(in, 1 + up_to(in, 3)),
                                .kv_heads = number(in, 1 + up_to(in, 2)),
                                .head_dim = number(in, 1 + up_to(in, 40)),
                                .capacity = number(in, 1 + up_to(in, 200)),
                                .limit_bytes = number(in, up_to(in, 1) << 16),
                                .bits = (int)number(in, cache_bits[up_to(in, 3)]),
                                .hadamard = up_to(in, 1),
                                .bfloat16 = up_to(in, 1)};
    if (shape.head_dim > 1024) { /* a matrix of its square, which takes seconds */
        shape.hadamard = 0;
    }
    const int64_t tables = product(shape.layers, shape.sequences);
    if (tables > MOST_BYTES && tables >> 40 == 0) { /* memory that there may be, in seconds */
        return;
    }
    sq_kv_cache_t *cache = NULL;
    if (sq_kv_cache_create(&shape, &cache) != SQ_OK) {
        HOLDS(!cache);
        return;
    }
    const int fits = sq_kv_cache_page_bytes(cache) < MOST_BYTES;
    for (int step = 0; fits && step < 12; step++) {
        const int64_t first = number(in, up_to(in, 3)), last = number(in, first + up_to(in, 2));
        int32_t *sequence = buffer(in, 2, sizeof *sequence);
        int64_t *position = buffer(in, 2, sizeof *position);
        for (int t = 0; t < 2; t++) {
            sequence[t] = (int32_t)number(in, (uint32_t)sequence[t] % shape.sequences);
            position[t] = number(in, (int64_t)((uint64_t)position[t] % (uint64_t)shape.capacity));
        }
        const int64_t most = position[0] > position[1] ? position[0] : position[1];
        const uint64_t layers = last > first ? (uint64_t)last - (uint64_t)first : 0;
        if (layers > 1000 || (most < shape.capacity && most > MOST_BYTES / (1 + (int64_t)layers))) {
            continue; /* pages that there may be, in seconds */
        }
        if (sq_kv_cache_reserve(cache, first, last, sequence, position, 2) == SQ_OK &&
            last > first) {
            store_and_read(in, cache, last - 1, sequence[0], position[0]);
        }
        HOLDS(!shape.limit_bytes || sq_kv_cache_bytes(cache) <= shape.limit_bytes);
        if (up_to(in, 3) == 0) {
            (void)sq_kv_cache_release(cache, number(in, up_to(in, 3)));
        }
    }
    sq_kv_cache_destroy(cache);
}

static void
fuzz_kv_codes(struct input *in)
{
    const int bits = (int)number(in, up_to(in, 1) ? 4 : 8);
    const int64_t m = number(in, up_to(in, 9)), n = number(in, up_to(in, 70));
    float *x = floats(in, m, n);
    uint8_t *codes = matrix(in, m, n, 1);
    uint16_t *scales = buffer(in, m, 2), *minima = buffer(in, m, 2);
    if (!in->too_large) {
        (void)sq_kv_quantize(bits, x, m, n, codes, scales, minima);
    }
}

/* ---- rotations and chains --------------------------------------------------------------- */

/* Pairs in range: who makes a rotation proves them. */
static struct sq_factor
any_factor(struct input *in, int64_t order)
{
    struct sq_factor f = {.order = number(in, order)};
    if (up_to(in, 1)) {
        f.matrix = floats(in, f.order, f.order);
        f.matrix_t = number(in, 1) ? floats(in, f.order, f.order) : NULL;
        return f;
    }
    f.hadamard = up_to(in, 1);
    f.steps = order > 1 && f.order == order ? number(in, up_to(in, 9)) : 0;
    int32_t *pairs = matrix(in, f.steps, 2, sizeof *pairs);
    for (int64_t i = 0; !in->too_large && i < f.steps; i++) {
        pairs[2 * i] = (int32_t)((uint32_t)pairs[2 * i] % order);
        pairs[2 * i + 1] = (pairs[2 * i] + 1) % (int32_t)order;
    }
    f.pairs = pairs;
    f.cos_sin = floats(in, f.steps, 2);
    return f;
}

static void
fuzz_rotation(struct input *in)
{
    const int64_t k1 = 1 + up_to(in, 20), k2 = 1 + up_to(in, 20), m = number(in, up_to(in, 9));
    struct sq_rotation r = {.kind = (int)number(in, SQ_KRONECKER + up_to(in, 2)),
                            .k = number(in, k1 * k2),
                            .left = any_factor(in, k1),
                            .right = any_factor(in, k2)};
    const int64_t b = r.blocks.b = number(in, k2);
    if (r.kind != SQ_KRONECKER && b > 0 && b < 4096 && r.k > 0 && r.k < MOST_BYTES) {
        int32_t *permutation = buffer(in, r.k, sizeof *permutation);
        for (int64_t i = 0; !in->too_large && i < r.k; i++) {
            permutation[i] = (int32_t)((i + 1) % r.k);
        }
        r.blocks = (struct sq_block_rotation){b, floats(in, r.k / b, b * b), permutation,
                                              floats(in, r.k / b, b * b)};
    }
    if (in->too_large || sq_rotation_check(&r) != SQ_OK || r.k > 4096 || m < 0 || m > 100) {
        return;
    }
    float *x = floats(in, m, r.k), *y = floats(in, m, r.k);
    void *workspace = buffer(in, (int64_t)sq_rotation_serial_bytes(&r, m), 1);
    void *parallel = malloc(sq_rotation_workspace_bytes(&r, m) + 1);
    if (parallel && !in->too_large) {
        HOLDS(sq_rotate(&r, x, m, y, parallel) == SQ_OK);
        HOLDS(sq_rotate_serially(&r, x, m, workspace) == SQ_OK);
    }
    free(parallel);
}

static void
fuzz_matrices(struct input *in)
{
    const int64_t n = number(in, up_to(in, 24)), count = number(in, up_to(in, 3));
    const int64_t columns = n > 0 && n < 4096 ? n : 1; /* the buffers are too small for more */
    float *matrices = floats(in, count, n * columns), error;
    double ratio, *wide = buffer(in, n * columns, sizeof *wide);
    int64_t k1, k2;
    (void)sq_factor_sizes(n < MOST_BYTES ? n : MOST_BYTES, &k1, &k2);
    if (!in->too_large && (n < 4096 || n > INT32_MAX)) {
        (void)sq_orthogonality_error(matrices, count, n, &error);
        (void)sq_pivot_ratio(matrices, count, n, &ratio);
        (void)sq_hadamard_matrix(n, wide);
    }
}

static void
fuzz_chains(struct input *in)
{
    const int64_t g = number(in, up_to(in, 9)), rows = number(in, up_to(in, 6));
    const int64_t n = number(in, up_to(in, 12));
    int32_t *pairs = matrix(in, g, 2, sizeof *pairs);
    double *angles = buffer(in, g, sizeof *angles), *x = matrix(in, rows, n, sizeof *x);
    double *u = buffer(in, n, sizeof *u), *v = buffer(in, n, sizeof *v);
    int32_t *own = matrix(in, n, 2, 2 * sizeof *own);
    double *own_angles = matrix(in, n, 2, sizeof *own_angles);
    int64_t steps;
    if (in->too_large) {
        return;
    }
    for (int64_t i = 0; n > 0 && i < g; i++) {
        pairs[2 * i] = (int32_t)number(in, (uint32_t)pairs[2 * i] % n);
        pairs[2 * i + 1] = (int32_t)number(in, (pairs[2 * i] + 1) % n);
        angles[i] = (double)any_float(in);
    }
    for (int64_t i = 0; i < n; i++) {
        u[i] = (double)any_float(in);
        v[i] = (double)any_float(in);
    }
    (void)sq_chain_apply(pairs, angles, g, x, rows, n);
    (void)sq_urt(v, u, n, own, own_angles, &steps);
    (void)sq_art_columns(x, rows, n, g, pairs, angles, &steps);
    (void)sq_zigzag(v, n, number(in, 1 + up_to(in, 3)), own);
    (void)sq_art_extremes(v, n, 1.5, sq_max_i64(0, n), own, own_angles, &steps);
}

/* ---- logits ----------------------------------------------------------------------------- */

static void
fuzz_logits(struct input *in)
{
    const int64_t m = number(in, up_to(in, 5)), v = number(in, 1 + up_to(in, 60));
    const int64_t workers = number(in, 1 + up_to(in, 3)), top_k = number(in, up_to(in, 60));
    const float temperature = real(in, up_to(in, 8) * 0.25f);
    const float top_p = real(in, 1.0f - up_to(in, 9) * 0.1f);
    float *p = floats(in, m, v), *q = floats(in, m, v);
    int64_t *target = buffer(in, m, sizeof *target);
    double *uniform = buffer(in, m, sizeof *uniform), *out = buffer(in, m, sizeof *out);
    uint8_t *same = buffer(in, m, 1);
    void *workspace = matrix(in, workers, v, 16);
    if (in->too_large) {
        return;
    }
    for (int64_t t = 0; t < m; t++) {
        target[t] = number(in, v > 0 ? (int64_t)((uint64_t)target[t] % (uint64_t)v) : 0);
        uniform[t] = (double)real(in, next_byte(in) / 256.0f);
    }
    (void)sq_negative_log_likelihood(p, target, m, v, out);
    (void)sq_kl_divergence(p, q, m, v, out, same);
    if (sq_sample_rows(p, m, v, temperature, top_k, top_p, uniform, workers, workspace, target) ==
        SQ_OK) {
        for (int64_t t = 0; t < m; t++) {
            HOLDS(target[t] >= 0 && target[t] < v);
        }
    }
}

/* ---- the target ------------------------------------------------------------------------- */

static void (*const parts[])(struct input *) = {
    fuzz_words,  fuzz_packed, fuzz_code_rows, fuzz_dense,    fuzz_decode,   fuzz_quantize,
    fuzz_weight, fuzz_gptq,   fuzz_cache,     fuzz_kv_codes, fuzz_rotation, fuzz_matrices,
    fuzz_chains, fuzz_logits, fuzz_layer,     fuzz_layer};

int
LLVMFuzzerInitialize(int *argc, char ***argv);

int
LLVMFuzzerInitialize(int *argc, char ***argv)
{
    (void)argc;
    (void)argv;
    sq_kernels_init(NULL);
    sq_set_num_threads(1);
    return 0;
}

int
LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int
LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct input in = {.at = data, .left = size};
    const uint8_t part = next_byte(&in) % (sizeof parts / sizeof parts[0]);
    in.wild = next_byte(&in) & 1;
    parts[part](&in);
    free_buffers(&in);
    return 0;
}
