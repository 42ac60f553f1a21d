/* SPDX-License-Identifier: Apache-2.0 */
/* AVX2 + FMA + F16C kernels. The packed ones are kernels_x86_template.h's with 16-bit sums. */
#define TILE_BITS 256
#define TILE_MR 4 /* 4 rows x 16 outputs are 8 accumulators of 16 registers */
#define TILE_GEMM
#include "kernels/kernels_x86_template.h"
#include "kernels/kernels_x86_rows_template.h"
#include "kernels/kernels_x86_exp_template.h"
#include "kernels/panel_dwords.h"
#include "kernels/sylvester.h"
#include "kernels/thin_panels.h"

#include <math.h>

#include "core/sq_cpu.h"

/* ---- packed weights --------------------------------------------------------------------- */

static void
sq_pack_panel_4x32__avx2(const int32_t *words, int64_t k, uint8_t *panel)
{
    pack_sub_panels(words, k, SUBS, SUB, panel);
}

static void
sq_gemm_a4w4_f32_4x32__avx2(const struct sq_panel_args *args)
{
    FOR_TILES(tile_codes, 4, BLOCKS_A4)
}

static void
sq_gemm_a8w4_f32_4x32__avx2(const struct sq_panel_args *args)
{
    FOR_TILES(tile_codes, 4, BLOCKS_A8)
}

static void
sq_gemm_a16w4_f32_4x32__avx2(const struct sq_panel_args *args)
{
    FOR_TILES(tile_values, 4)
}

static void
sq_pack_panel_w8_4x32__avx2(const int8_t *codes, int64_t k, uint8_t *panel)
{
    pack_sub_panels_w8(codes, k, SUBS, SUB, 128, panel);
}

static void
sq_gptq_columns__avx2(const struct sq_gptq_columns *columns, struct sq_gptq_lanes *lanes)
{
    round_gptq_columns(columns, lanes);
}

static void
sq_sylvester__avx2(float *x, int64_t count, int64_t from, int64_t to, float scale)
{
    sylvester_stages(x, count, from, to, scale);
}

static struct sq_pair_sums
sq_sum_pairs__avx2(const double *a, const double *b, int64_t rows)
{
    return sum_pairs(a, b, rows);
}

static void
sq_rotate_pairs__avx2(double *a, double *b, int64_t rows, double c, double s)
{
    rotate_pairs(a, b, rows, c, s);
}

static void
sq_widen_panel__avx2(int bits, const uint8_t *thin, int64_t bytes, int zero, uint8_t *panel)
{
    widen_panel(bits, thin, bytes, zero, panel, THIN_BLOCK);
}

static void
sq_gemm_a8w5_f32_4x32__avx2(const struct sq_panel_args *args)
{
    FOR_TILES(tile_codes, 5, BLOCKS_W8)
}

static void
sq_gemm_a8w6_f32_4x32__avx2(const struct sq_panel_args *args)
{
    FOR_TILES(tile_codes, 6, BLOCKS_W8)
}

static void
sq_gemm_a8w5_in_bytes_4x32__avx2(const struct sq_panel_args *args)
{
    FOR_TILES(tile_codes, IN_BYTES(5), BLOCKS_W8)
}

static void
sq_gemm_a8w6_in_bytes_4x32__avx2(const struct sq_panel_args *args)
{
    FOR_TILES(tile_codes, IN_BYTES(6), BLOCKS_W8)
}

static void
sq_gemm_a8w8_f32_4x32__avx2(const struct sq_panel_args *args)
{
    FOR_TILES(tile_codes, 8, BLOCKS_W8)
}

static void
sq_gemm_a16w8_f32_4x32__avx2(const struct sq_panel_args *args)
{
    FOR_TILES(tile_values, 8)
}

/* ---- float32 gemm ----------------------------------------------------------------------- */

static void
sq_gemm_f32_6x16__avx2(int64_t m, int64_t n, int64_t k, const float *a, int64_t ld_a,
                       const float *b, int64_t ld_b, float *c, int64_t ld_c)
{
    gemm_f32(m, n, k, a, ld_a, b, ld_b, c, ld_c);
}

static void
sq_gemm_page__avx2(const struct sq_page_args *args)
{
    if (args->is_bf16) {
        gemm_page(args, 1);
    }
    else {
        gemm_page(args, 0);
    }
}

static void
sq_gemm_half__avx2(int is_bf16, int64_t m, int64_t n, int64_t k, const float *x, int64_t ld_x,
                   const uint16_t *w, float *y, int64_t ld_y)
{
    gemm_half(is_bf16, m, n, k, x, ld_x, w, y, ld_y);
}

static void
sq_gemm_rows__avx2(const struct sq_code_rows *w, int64_t n, const struct sq_token_rows *x,
                   int64_t m, float *y, int64_t ld_y)
{
    gemm_rows(w, n, x, m, y, ld_y);
}

/* ---- quantizers ------------------------------------------------------------------------- */

static ALWAYS_INLINE float
horizontal_min(__m256 x)
{
    __m128 v = _mm_min_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    v = _mm_min_ps(v, _mm_movehl_ps(v, v));
    return _mm_cvtss_f32(_mm_min_ss(v, _mm_movehdup_ps(v)));
}

/* Two running sums of four float64 lanes: elements 0..3 and 4..7 of each eight. */
static ALWAYS_INLINE double
sum_of_lanes(__m256d low, __m256d high)
{
    const __m256d four = _mm256_add_pd(low, high);
    const __m128d two = _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd(four, 1));
    return _mm_cvtsd_f64(two) + _mm_cvtsd_f64(_mm_unpackhi_pd(two, two));
}

/* Adds the squares of x; exact products, so that FMA and two roundings agree. */
static ALWAYS_INLINE void
add_squares(__m256 x, __m256d *low, __m256d *high)
{
    const __m256d a = _mm256_cvtps_pd(_mm256_castps256_ps128(x));
    const __m256d b = _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1));
    *low = _mm256_fmadd_pd(a, a, *low);
    *high = _mm256_fmadd_pd(b, b, *high);
}

/* NaN and Inf are those whose bits without the sign, as integers, reach Inf's. */
static int
sq_extremes__avx2(const float *x, int64_t k, float *min, float *max)
{
    const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
    __m256 low = _mm256_set1_ps(x[0]), high = low;
    __m256i largest = _mm256_setzero_si256();
    int64_t i = 0;
    for (; i + 8 <= k; i += 8) {
        const __m256 v = _mm256_loadu_ps(x + i);
        low = _mm256_min_ps(v, low);
        high = _mm256_max_ps(v, high);
        largest = _mm256_max_epi32(largest, _mm256_and_si256(_mm256_castps_si256(v), magnitude));
    }
    if (i < k) {
        const __m256i mask = lane_mask(k - i);
        const __m256 v = _mm256_blendv_ps(_mm256_set1_ps(x[0]), _mm256_maskload_ps(x + i, mask),
                                          _mm256_castsi256_ps(mask));
        low = _mm256_min_ps(v, low);
        high = _mm256_max_ps(v, high);
        largest = _mm256_max_epi32(largest, _mm256_and_si256(_mm256_castps_si256(v), magnitude));
    }
    *min = horizontal_min(low);
    *max = horizontal_max(high);
    const __m256i infinite = _mm256_cmpgt_epi32(largest, _mm256_set1_epi32(0x7f7fffff));
    return _mm256_testz_si256(infinite, infinite);
}

static ALWAYS_INLINE __m256
rounded(__m256 x, __m256 inv_scale, __m256 low, __m256 high)
{
    const __m256 clamped = _mm256_min_ps(_mm256_max_ps(_mm256_mul_ps(x, inv_scale), low), high);
    return _mm256_round_ps(clamped, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

/* The low bytes of 32 integers below 256, in order. */
static ALWAYS_INLINE __m256i
low_bytes(__m256i a, __m256i b, __m256i c, __m256i d)
{
    const __m256i bytes = _mm256_packus_epi16(_mm256_packus_epi32(a, b), _mm256_packus_epi32(c, d));
    return _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}

static void
sq_quantize_codes__avx2(const float *x, int64_t k, float inv_scale, float low, float high,
                        int offset, int8_t *codes)
{
    const __m256 inv = _mm256_set1_ps(inv_scale);
    const __m256 lo = _mm256_set1_ps(low), hi = _mm256_set1_ps(high);
    const __m256i add = _mm256_set1_epi32(offset), byte = _mm256_set1_epi32(255);
    for (int64_t i = 0; i < k; i += 32) {
        const int64_t count = sq_min_i64(k - i, 32);
        __m256i part[4];
        UNROLL
        for (int v = 0; v < 4; v++) {
            const float *from = x + i + 8 * v;
            const __m256 values = count == 32 ? _mm256_loadu_ps(from)
                                              : _mm256_maskload_ps(from, lane_mask(count - 8 * v));
            const __m256i code = _mm256_cvtps_epi32(rounded(values, inv, lo, hi));
            part[v] = _mm256_and_si256(_mm256_add_epi32(code, add), byte);
        }
        const __m256i bytes = low_bytes(part[0], part[1], part[2], part[3]);
        if (count == 32) {
            _mm256_storeu_si256((__m256i *)(codes + i), bytes);
        }
        else {
            _Alignas(32) int8_t tail[32];
            _mm256_store_si256((__m256i *)tail, bytes);
            memcpy(codes + i, tail, (size_t)count);
        }
    }
}

enum { STEPS_AT_ONCE = 4 }; /* of the clip search */

/* Errors of a few steps in one pass over x: their chains of additions overlap. */
static ALWAYS_INLINE void
errors_of(const int count, const float *x, int64_t k, const struct sq_step *steps, double *errors)
{
    __m256 scale[STEPS_AT_ONCE], inv[STEPS_AT_ONCE], low[STEPS_AT_ONCE], high[STEPS_AT_ONCE];
    __m256d sum_low[STEPS_AT_ONCE], sum_high[STEPS_AT_ONCE];
    UNROLL
    for (int c = 0; c < count; c++) {
        scale[c] = _mm256_set1_ps(steps[c].scale);
        inv[c] = _mm256_set1_ps(1.0f / steps[c].scale);
        low[c] = _mm256_set1_ps(steps[c].low);
        high[c] = _mm256_set1_ps(steps[c].high);
        sum_low[c] = sum_high[c] = _mm256_setzero_pd();
    }
    for (int64_t i = 0; i < k; i += 8) { /* a masked-off element is 0 and so is its error */
        const __m256 v =
            k - i >= 8 ? _mm256_loadu_ps(x + i) : _mm256_maskload_ps(x + i, lane_mask(k - i));
        UNROLL
        for (int c = 0; c < count; c++) {
            const __m256 back = _mm256_mul_ps(scale[c], rounded(v, inv[c], low[c], high[c]));
            add_squares(_mm256_sub_ps(v, back), &sum_low[c], &sum_high[c]);
        }
    }
    UNROLL
    for (int c = 0; c < count; c++) {
        errors[c] = sum_of_lanes(sum_low[c], sum_high[c]);
    }
}

static void
sq_quantize_errors__avx2(const float *x, int64_t k, const struct sq_step *steps, int count,
                         double *errors)
{
    int c = 0;
    for (; c + STEPS_AT_ONCE <= count; c += STEPS_AT_ONCE) {
        errors_of(STEPS_AT_ONCE, x, k, steps + c, errors + c);
    }
    for (; c < count; c++) {
        errors_of(1, x, k, steps + c, errors + c);
    }
}

static void
sq_fixed_point__avx2(const float *x, int64_t k, float inv_unit, int16_t *u)
{
    const __m256 inv = _mm256_set1_ps(inv_unit);
    for (int64_t i = 0; i < k; i += SQ_FIXED_ALIGN) {
        __m256i part[2];
        UNROLL
        for (int v = 0; v < 2; v++) {
            const float *from = x + i + 8 * v;
            const __m256 values = k - i >= SQ_FIXED_ALIGN
                                      ? _mm256_loadu_ps(from)
                                      : _mm256_maskload_ps(from, lane_mask(k - i - 8 * v));
            part[v] = _mm256_cvtps_epi32(_mm256_mul_ps(values, inv));
        }
        const __m256i both = _mm256_packs_epi32(part[0], part[1]);
        _mm256_store_si256((__m256i *)(u + i), _mm256_permute4x64_epi64(both, 0xd8));
    }
}

/* acc += the squares of e. */
static ALWAYS_INLINE __m256i
add_products(__m256i e, __m256i acc)
{
    return _mm256_add_epi32(acc, _mm256_madd_epi16(e, e));
}

/* The sum of eight unsigned 32-bit lanes. */
static ALWAYS_INLINE int64_t
sum_of_dwords(__m256i x)
{
    const __m256i even = _mm256_and_si256(x, _mm256_set1_epi64x(0xffffffff));
    const __m256i four = _mm256_add_epi64(even, _mm256_srli_epi64(x, 32));
    const __m128i two =
        _mm_add_epi64(_mm256_castsi256_si128(four), _mm256_extracti128_si256(four, 1));
    return _mm_cvtsi128_si64(_mm_add_epi64(two, _mm_unpackhi_epi64(two, two)));
}

/* A pair of squares is at most 2 * (0.8 * SQ_FIXED_PEAK)^2, the error of a value at the peak with
 * the smallest step; SQ_FIXED_BLOCK / 16 such pairs meet in a lane. */
_Static_assert((int64_t)SQ_FIXED_BLOCK / 16 * 2 * (SQ_FIXED_PEAK * 4 / 5) *
                       (SQ_FIXED_PEAK * 4 / 5) <=
                   UINT32_MAX,
               "unsigned 32-bit lanes hold a block's squares");
_Static_assert(2LL * (SQ_FIXED_PEAK * 4 / 5) * (SQ_FIXED_PEAK * 4 / 5) <= INT32_MAX,
               "madd's pairs fit");
/* 8 steps at ratio 1, and 256 times the largest quotient, 7 / 0.2, fit 16 bits. */
_Static_assert(8 * SQ_FIXED_STEP(0) <= INT16_MAX && 256 * 35 + 128 <= INT16_MAX &&
                   SQ_FIXED_INVERSE(SQ_FIXED_STEP(40)) <= INT16_MAX,
               "16-bit lanes");

static void
sq_fixed_errors__avx2(const int16_t *u, int64_t k, const struct sq_fixed_steps *steps,
                      struct sq_fixed_errors *errors)
{
    const __m256i seven = _mm256_set1_epi16(7), byte = _mm256_set1_epi16(128);
    __m256i step[SQ_FIXED_BATCH], inverse[SQ_FIXED_BATCH];
    UNROLL
    for (int c = 0; c < SQ_FIXED_BATCH; c++) {
        step[c] = _mm256_set1_epi16(steps->step[c]);
        inverse[c] = _mm256_set1_epi16(steps->inverse[c]);
        errors->error[c] = 0;
    }
    errors->clipped = 0;
    for (int64_t begin = 0; begin < k; begin += SQ_FIXED_BLOCK) {
        const int64_t end = sq_min_i64(begin + SQ_FIXED_BLOCK, k);
        __m256i sum[SQ_FIXED_BATCH], clipped = _mm256_setzero_si256();
        UNROLL
        for (int c = 0; c < SQ_FIXED_BATCH; c++) {
            sum[c] = _mm256_setzero_si256();
        }
        for (int64_t i = begin; i < end; i += SQ_FIXED_ALIGN) {
            const __m256i value = _mm256_load_si256((const __m256i *)(u + i));
            const __m256i most = _mm256_sub_epi16(seven, _mm256_srai_epi16(value, 15));
            const __m256i magnitude = _mm256_abs_epi16(value);
            UNROLL
            for (int c = 0; c < SQ_FIXED_BATCH; c++) {
                const __m256i fine = _mm256_mulhrs_epi16(magnitude, inverse[c]);
                const __m256i code = _mm256_min_epi16(_mm256_mulhrs_epi16(fine, byte), most);
                const __m256i back = _mm256_mullo_epi16(code, step[c]);
                sum[c] = add_products(_mm256_sub_epi16(magnitude, back), sum[c]);
            }
            const __m256i largest = _mm256_mullo_epi16(most, step[SQ_FIXED_BATCH - 1]);
            clipped = add_products(_mm256_subs_epu16(magnitude, largest), clipped);
        }
        UNROLL
        for (int c = 0; c < SQ_FIXED_BATCH; c++) {
            errors->error[c] += sum_of_dwords(sum[c]);
        }
        errors->clipped += sum_of_dwords(clipped);
    }
}

/* ---- rows ------------------------------------------------------------------------------- */

static void
sq_rms_norm_row__avx2(const float *x, const float *weight, int64_t n, float eps, float *y)
{
    __m256d low = _mm256_setzero_pd(), high = _mm256_setzero_pd();
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) {
        add_squares(_mm256_loadu_ps(x + i), &low, &high);
    }
    const __m256i mask = lane_mask(n - i);
    add_squares(_mm256_maskload_ps(x + i, mask), &low, &high);
    const float inv_rms = (float)(1.0 / sqrt(sum_of_lanes(low, high) / (double)n + eps));
    const __m256 inv = _mm256_set1_ps(inv_rms);
    for (i = 0; i + 8 <= n; i += 8) {
        const __m256 scaled = _mm256_mul_ps(_mm256_loadu_ps(x + i), inv);
        _mm256_storeu_ps(y + i, _mm256_mul_ps(scaled, _mm256_loadu_ps(weight + i)));
    }
    const __m256 scaled = _mm256_mul_ps(_mm256_maskload_ps(x + i, mask), inv);
    _mm256_maskstore_ps(y + i, mask, _mm256_mul_ps(scaled, _mm256_maskload_ps(weight + i, mask)));
}

static void
sq_silu_mul__avx2(const float *gate, const float *up, int64_t n, float *y)
{
    silu_mul(gate, up, n, y);
}

static void
sq_softmax_row__avx2(float *x, int64_t n, int64_t n_padded, float scale)
{
    softmax_row(x, n, n_padded, scale);
}

/* ---- 16-bit floats ---------------------------------------------------------------------- */

/* Eight 16-bit values, of which count exist. */
static ALWAYS_INLINE __m128i
load_halves(const uint16_t *in, int64_t count)
{
    __m128i v = _mm_setzero_si128();
    if (count >= 8) {
        v = _mm_loadu_si128((const __m128i *)in);
    }
    else {
        memcpy(&v, in, (size_t)count * sizeof *in);
    }
    return v;
}

/* Converts 16-bit values and notes those whose exponent bits are all ones. */
static ALWAYS_INLINE int
halves_to_f32(const uint16_t *in, int64_t count, float *out, const int is_f16)
{
    const __m128i exponent = _mm_set1_epi16(is_f16 ? 0x7c00 : 0x7f80);
    __m128i bad = _mm_setzero_si128();
    for (int64_t i = 0; i < count; i += 8) {
        const __m128i v = load_halves(in + i, count - i);
        bad = _mm_or_si128(bad, _mm_cmpeq_epi16(_mm_and_si128(v, exponent), exponent));
        const __m256 values =
            is_f16 ? _mm256_cvtph_ps(v)
                   : _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(v), 16));
        if (count - i >= 8) {
            _mm256_storeu_ps(out + i, values);
        }
        else {
            _mm256_maskstore_ps(out + i, lane_mask(count - i), values);
        }
    }
    return _mm_testz_si128(bad, bad);
}

static int
sq_f16_to_f32__avx2(const uint16_t *in, int64_t count, float *out)
{
    return halves_to_f32(in, count, out, 1);
}

static int
sq_bf16_to_f32__avx2(const uint16_t *in, int64_t count, float *out)
{
    return halves_to_f32(in, count, out, 0);
}

static void
sq_f32_to_f16__avx2(const float *in, int64_t count, uint16_t *out)
{
    const __m256 low = _mm256_set1_ps(-65504.0f), high = _mm256_set1_ps(65504.0f);
    for (int64_t i = 0; i < count; i += 8) {
        const __m256 v = count - i >= 8 ? _mm256_loadu_ps(in + i)
                                        : _mm256_maskload_ps(in + i, lane_mask(count - i));
        /* of max and min the second operand stays where one is NaN */
        const __m256 clamped = _mm256_min_ps(high, _mm256_max_ps(low, v));
        const __m128i halves = _mm256_cvtps_ph(clamped, _MM_FROUND_TO_NEAREST_INT);
        memcpy(out + i, &halves, (size_t)sq_min_i64(count - i, 8) * sizeof *out);
    }
}

/* ---- KV cache --------------------------------------------------------------------------- */

/* scale * code + minimum of the 8 codes in the low bytes of 32-bit lanes. */
static ALWAYS_INLINE __m256
kv_values(__m256i codes, __m256 scale, __m256 minimum)
{
    return _mm256_fmadd_ps(_mm256_cvtepi32_ps(codes), scale, minimum);
}

/* The first count floats at in, zeros behind them. */
static ALWAYS_INLINE __m256
load_f32(const float *in, int64_t count)
{
    return count >= 8 ? _mm256_loadu_ps(in) : _mm256_maskload_ps(in, lane_mask(count));
}

/* The first count floats, of 8 or more that there are, at out. */
static ALWAYS_INLINE void
store_f32(float *out, int64_t count, __m256 values)
{
    if (count >= 8) {
        _mm256_storeu_ps(out, values);
    }
    else {
        _mm256_maskstore_ps(out, lane_mask(count), values);
    }
}

/* One group of 8 bytes, of which count codes are wanted. */
static ALWAYS_INLINE void
kv_group(const int bits, const uint8_t *codes, const __m256 scale[2], const __m256 minimum[2],
         int64_t count, float *out)
{
    const __m256i bytes = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)codes));
    if (bits == 8) {
        store_f32(out, count, kv_values(bytes, scale[0], minimum[0]));
        return;
    }
    const __m256i low = _mm256_and_si256(bytes, _mm256_set1_epi32(15));
    store_f32(out, count, kv_values(low, scale[0], minimum[0]));
    if (count > 8) {
        store_f32(out + 8, count - 8, kv_values(_mm256_srli_epi32(bytes, 4), scale[1], minimum[1]));
    }
}

/* Rows one after the other where each has its scale, otherwise groups of columns, whose scales
 * stay in registers from row to row. */
static ALWAYS_INLINE void
kv_to_f32(const int bits, const uint8_t *codes, const float *scales, const float *minima,
          int by_row, int64_t rows, int64_t n, float *out)
{
    const int64_t group = 64 / bits, row_bytes = sq_ceil_div(n, group) * 8;
    __m256 scale[2], minimum[2];
    if (by_row) {
        for (int64_t r = 0; r < rows; r++) {
            scale[0] = scale[1] = _mm256_set1_ps(scales[r]);
            minimum[0] = minimum[1] = _mm256_set1_ps(minima[r]);
            int64_t i = 0;
            for (; i + group <= n; i += group) {
                kv_group(bits, codes + r * row_bytes + i / group * 8, scale, minimum, group,
                         out + r * n + i);
            }
            if (i < n) {
                kv_group(bits, codes + r * row_bytes + i / group * 8, scale, minimum, n - i,
                         out + r * n + i);
            }
        }
        return;
    }
    for (int64_t i = 0; i < n; i += group) {
        const int64_t count = sq_min_i64(group, n - i);
        for (int64_t h = 0; h < group / 8; h++) {
            const int64_t left = sq_max_i64(0, count - 8 * h);
            scale[h] = load_f32(left ? scales + i + 8 * h : scales, left);
            minimum[h] = load_f32(left ? minima + i + 8 * h : minima, left);
        }
        if (count == group) {
            for (int64_t r = 0; r < rows; r++) {
                kv_group(bits, codes + r * row_bytes + i / group * 8, scale, minimum, group,
                         out + r * n + i);
            }
        }
        else {
            for (int64_t r = 0; r < rows; r++) {
                kv_group(bits, codes + r * row_bytes + i / group * 8, scale, minimum, count,
                         out + r * n + i);
            }
        }
    }
}

static void
sq_kv8_to_f32__avx2(const uint8_t *codes, const float *scales, const float *minima, int by_row,
                    int64_t rows, int64_t n, float *out)
{
    kv_to_f32(8, codes, scales, minima, by_row, rows, n, out);
}

static void
sq_kv4_to_f32__avx2(const uint8_t *codes, const float *scales, const float *minima, int by_row,
                    int64_t rows, int64_t n, float *out)
{
    kv_to_f32(4, codes, scales, minima, by_row, rows, n, out);
}

const struct sq_kernels sq_kernels_avx2 = {
    .name = "avx2",
    .required_features = SQ_CPU_AVX2,
    .steps = {"maddubs + add16 256", "8 x (maddubs + add16), madd + add32 256", "fma 256"},
    .mr = TILE_MR,
    .nr = NR,
    .row_block_bytes = 1 << 18,
    .pack_panel = sq_pack_panel_4x32__avx2,
    .gemm_a4w4 = sq_gemm_a4w4_f32_4x32__avx2,
    .gemm_a8w4 = sq_gemm_a8w4_f32_4x32__avx2,
    .gemm_a16w4 = sq_gemm_a16w4_f32_4x32__avx2,
    .pack_panel_w8 = sq_pack_panel_w8_4x32__avx2,
    .gemm_a8w8 = sq_gemm_a8w8_f32_4x32__avx2,
    .gemm_a16w8 = sq_gemm_a16w8_f32_4x32__avx2,
    .w8_zero = 128,
    .thin_block = THIN_BLOCK,
    .widen_panel = sq_widen_panel__avx2,
    .gptq_columns = sq_gptq_columns__avx2,
    .sylvester = sq_sylvester__avx2,
    .sum_pairs = sq_sum_pairs__avx2,
    .rotate_pairs = sq_rotate_pairs__avx2,
    .thin_rows = 2 * TILE_MR, /* with 8 rows both ways are as fast */
    .gemm_a8w5 = sq_gemm_a8w5_f32_4x32__avx2,
    .gemm_a8w6 = sq_gemm_a8w6_f32_4x32__avx2,
    .gemm_a8w5_in_bytes = sq_gemm_a8w5_in_bytes_4x32__avx2,
    .gemm_a8w6_in_bytes = sq_gemm_a8w6_in_bytes_4x32__avx2,
    .gemm_f32 = sq_gemm_f32_6x16__avx2,
    .gemm_page = sq_gemm_page__avx2,
    .gemm_half = sq_gemm_half__avx2,
    .gemm_rows = sq_gemm_rows__avx2,
    .extremes = sq_extremes__avx2,
    .quantize_codes = sq_quantize_codes__avx2,
    .quantize_errors = sq_quantize_errors__avx2,
    .fixed_point = sq_fixed_point__avx2,
    .fixed_errors = sq_fixed_errors__avx2,
    .rms_norm_row = sq_rms_norm_row__avx2,
    .silu_mul = sq_silu_mul__avx2,
    .softmax_row = sq_softmax_row__avx2,
    .f16_to_f32 = sq_f16_to_f32__avx2,
    .bf16_to_f32 = sq_bf16_to_f32__avx2,
    .f32_to_f16 = sq_f32_to_f16__avx2,
    .kv8_to_f32 = sq_kv8_to_f32__avx2,
    .kv4_to_f32 = sq_kv4_to_f32__avx2,
};
