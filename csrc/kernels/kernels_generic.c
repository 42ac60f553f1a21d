/* SPDX-License-Identifier: Apache-2.0 */
/* Scalar truth: complete, readable, never tuned. */
#include "kernels/sq_kernels.h"

#include <float.h>
#include <math.h>
#include <string.h>

#include "core/sq_internal.h"
#include "kernels/sylvester.h"
#include "kernels/thin_panels.h"

enum { MR = 4, NR = 8, LANES = 8, THIN_BLOCK = NR * SQ_K_ALIGN };

/* ---- packed weights --------------------------------------------------------------------- */

/* A panel is the words themselves: NR rows of k / 8, low nibble first, code + 8. */
static void
sq_pack_panel_4x8__generic(const int32_t *words, int64_t k, uint8_t *panel)
{
    memcpy(panel, words, (size_t)(NR * k / 2));
}

/* Of bytes: the codes themselves. */
static void
sq_pack_panel_w8_4x8__generic(const int8_t *codes, int64_t k, uint8_t *panel)
{
    memcpy(panel, codes, (size_t)(NR * k));
}

static void
sq_gptq_columns__generic(const struct sq_gptq_columns *columns, struct sq_gptq_lanes *lanes)
{
    round_gptq_columns(columns, lanes);
}

static void
sq_sylvester__generic(float *x, int64_t count, int64_t from, int64_t to, float scale)
{
    sylvester_stages(x, count, from, to, scale);
}

static struct sq_pair_sums
sq_sum_pairs__generic(const double *a, const double *b, int64_t rows)
{
    return sum_pairs(a, b, rows);
}

static void
sq_rotate_pairs__generic(double *a, double *b, int64_t rows, double c, double s)
{
    rotate_pairs(a, b, rows, c, s);
}

static void
sq_widen_panel__generic(int bits, const uint8_t *thin, int64_t bytes, int zero, uint8_t *panel)
{
    widen_panel(bits, thin, bytes, zero, panel, THIN_BLOCK);
}

static ALWAYS_INLINE int
weight_code(const uint8_t *row, int64_t k, const int bits)
{
    if (bits == 8) {
        return (int8_t)row[k];
    }
    const int byte = row[k / 2];
    return (k % 2 ? byte >> 4 : byte & 15) - 8;
}

/* Byte k / 2 of a row holds code k because words are little-endian. */
_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "panels alias little-endian words");

static void
store(const struct sq_panel_args *args, int64_t i, int64_t j, float value)
{
    float *y = args->y + i * args->ld_y + j;
    *y = args->accumulate ? *y + value : value;
}

static ALWAYS_INLINE void
gemm_codes(const struct sq_panel_args *args, const int bits)
{
    for (int64_t i = 0; i < args->m; i++) {
        const int8_t *a = (const int8_t *)args->a + i * args->ld_a;
        for (int64_t j = 0; j < NR; j++) {
            const uint8_t *row = args->panel + j * (args->k * bits / 8);
            float total = 0.0f;
            for (int64_t begin = 0; begin < args->k; begin += args->g) {
                int32_t sum = 0;
                for (int64_t k = begin; k < begin + args->g; k++) {
                    sum += a[k] * weight_code(row, k, bits);
                }
                total += args->w_scales[begin / args->g * NR + j] * (float)sum;
            }
            store(args, i, j, args->a_scales[i] * total);
        }
    }
}

static ALWAYS_INLINE void
gemm_values(const struct sq_panel_args *args, const int bits)
{
    for (int64_t i = 0; i < args->m; i++) {
        const float *a = (const float *)args->a + i * args->ld_a;
        for (int64_t j = 0; j < NR; j++) {
            const uint8_t *row = args->panel + j * (args->k * bits / 8);
            float total = 0.0f;
            for (int64_t begin = 0; begin < args->k; begin += args->g) {
                float sum = 0.0f;
                for (int64_t k = begin; k < begin + args->g; k++) {
                    sum += a[k] * (float)weight_code(row, k, bits);
                }
                total += args->w_scales[begin / args->g * NR + j] * sum;
            }
            store(args, i, j, total);
        }
    }
}

static void
sq_gemm_a8w4_f32_4x8__generic(const struct sq_panel_args *args)
{
    gemm_codes(args, 4);
}

static void
sq_gemm_a8w8_f32_4x8__generic(const struct sq_panel_args *args)
{
    gemm_codes(args, 8);
}

static void
sq_gemm_a16w4_f32_4x8__generic(const struct sq_panel_args *args)
{
    gemm_values(args, 4);
}

static void
sq_gemm_a16w8_f32_4x8__generic(const struct sq_panel_args *args)
{
    gemm_values(args, 8);
}

/* ---- float32 ---------------------------------------------------------------------------- */

static void
sq_gemm_f32__generic(int64_t m, int64_t n, int64_t k, const float *a, int64_t ld_a, const float *b,
                     int64_t ld_b, float *c, int64_t ld_c)
{
    for (int64_t i = 0; i < m; i++) {
        float *row = c + i * ld_c;
        for (int64_t j = 0; j < n; j++) {
            row[j] = 0.0f;
        }
        for (int64_t p = 0; p < k; p++) {
            for (int64_t j = 0; j < n; j++) {
                row[j] += a[i * ld_a + p] * b[p * ld_b + j];
            }
        }
    }
}

/* ---- quantizers ------------------------------------------------------------------------- */

static int
sq_extremes__generic(const float *x, int64_t k, float *min, float *max)
{
    int finite = 1;
    float low = x[0], high = x[0];
    for (int64_t i = 0; i < k; i++) {
        finite &= fabsf(x[i]) <= FLT_MAX;
        low = x[i] < low ? x[i] : low;
        high = x[i] > high ? x[i] : high;
    }
    *min = low;
    *max = high;
    return finite;
}

/* Clamping first is the same as rounding first, since low and high are integers, and keeps Inf (a
 * tiny scale) out of the conversion. */
static float
rounded(float x, float inv_scale, float low, float high)
{
    return rintf(fminf(fmaxf(x * inv_scale, low), high));
}

static void
sq_quantize_codes__generic(const float *x, int64_t k, float inv_scale, float low, float high,
                           int offset, int8_t *codes)
{
    for (int64_t i = 0; i < k; i++) {
        codes[i] = (int8_t)((int)rounded(x[i], inv_scale, low, high) + offset);
    }
}

static double
sum_of_lanes(const double *lane)
{
    return ((lane[0] + lane[4]) + (lane[2] + lane[6])) +
           ((lane[1] + lane[5]) + (lane[3] + lane[7]));
}

/* The square of a float32 is exact in float64, so an FMA there changes nothing. */
static void
sq_quantize_errors__generic(const float *x, int64_t k, const struct sq_step *steps, int count,
                            double *errors)
{
    for (int c = 0; c < count; c++) {
        const struct sq_step *s = &steps[c];
        const float inv_scale = 1.0f / s->scale;
        double lane[LANES] = {0};
        for (int64_t i = 0; i < k; i++) {
            const double e = x[i] - s->scale * rounded(x[i], inv_scale, s->low, s->high);
            lane[i % LANES] += e * e;
        }
        errors[c] = sum_of_lanes(lane);
    }
}

static void
sq_fixed_point__generic(const float *x, int64_t k, float inv_unit, int16_t *u)
{
    for (int64_t i = 0; i < k; i++) {
        u[i] = (int16_t)rintf(x[i] * inv_unit);
    }
    for (int64_t i = k; i < sq_round_up(k, SQ_FIXED_ALIGN); i++) {
        u[i] = 0;
    }
}

static void
sq_fixed_errors__generic(const int16_t *u, int64_t k, const struct sq_fixed_steps *steps,
                         struct sq_fixed_errors *errors)
{
    errors->clipped = 0;
    for (int c = 0; c < SQ_FIXED_BATCH; c++) {
        const int32_t step = steps->step[c], inverse = steps->inverse[c];
        int64_t sum = 0;
        for (int64_t i = 0; i < k; i++) {
            const int32_t magnitude = abs(u[i]), most = u[i] < 0 ? 8 : 7;
            const int32_t fine = (magnitude * inverse + (1 << 14)) >> 15;
            const int32_t nearest = (fine + 128) >> 8, code = nearest < most ? nearest : most;
            const int32_t error = magnitude - step * code, over = magnitude - step * most;
            sum += error * error;
            errors->clipped += c == SQ_FIXED_BATCH - 1 && over > 0 ? over * over : 0;
        }
        errors->error[c] = sum;
    }
}

/* ---- rows ------------------------------------------------------------------------------- */

static void
sq_rms_norm_row__generic(const float *x, const float *weight, int64_t n, float eps, float *y)
{
    double lane[LANES] = {0};
    for (int64_t i = 0; i < n; i++) {
        lane[i % LANES] += (double)x[i] * x[i];
    }
    const float inv_rms = (float)(1.0 / sqrt(sum_of_lanes(lane) / (double)n + eps));
    for (int64_t i = 0; i < n; i++) {
        y[i] = x[i] * inv_rms * weight[i];
    }
}

static void
sq_silu_mul__generic(const float *gate, const float *up, int64_t n, float *y)
{
    for (int64_t i = 0; i < n; i++) {
        y[i] = gate[i] / (1.0f + expf(-gate[i])) * up[i];
    }
}

static void
sq_softmax_row__generic(float *x, int64_t n, int64_t n_padded, float scale)
{
    float max = -INFINITY, sum = 0.0f;
    for (int64_t i = 0; i < n; i++) {
        x[i] *= scale;
        max = x[i] > max ? x[i] : max;
    }
    for (int64_t i = 0; i < n; i++) {
        x[i] = expf(x[i] - max);
        sum += x[i];
    }
    for (int64_t i = 0; i < n; i++) {
        x[i] /= sum;
    }
    for (int64_t i = n; i < n_padded; i++) {
        x[i] = 0.0f;
    }
}

/* ---- 16-bit floats ---------------------------------------------------------------------- */

static float
float_of_bits(uint32_t bits)
{
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* Binary16 has 5 exponent bits (bias 15) and 10 of mantissa; float32 8 (bias 127) and 23. */
static float
float_of_f16(uint16_t h)
{
    const uint32_t sign = (uint32_t)(h & 0x8000) << 16;
    const uint32_t exponent = (h >> 10) & 31, mantissa = h & 1023;
    if (exponent == 31) { /* Inf, NaN (made quiet) */
        return float_of_bits(sign | 0x7f800000 | (mantissa ? 0x400000 : 0) | mantissa << 13);
    }
    if (exponent == 0) { /* zero and subnormals: mantissa * 2^-24, exact */
        const float magnitude = (float)mantissa * 0x1p-24f;
        return sign ? -magnitude : magnitude;
    }
    return float_of_bits(sign | (exponent + 127 - 15) << 23 | mantissa << 13);
}

static float
widened(int is_bf16, uint16_t bits)
{
    return is_bf16 ? float_of_bits((uint32_t)bits << 16) : float_of_f16(bits);
}

/* 16-bit floats [n][k] that are widened when they are used. */
struct narrow {
    int64_t k;
    int is_bf16;
    const uint16_t *halves;
};

/* out [count] <- row j's weights from input p on. */
static void
widen_run(const struct narrow *w, int64_t j, int64_t p, int64_t count, float *out)
{
    for (int64_t i = 0; i < count; i++) {
        out[i] = widened(w->is_bf16, w->halves[j * w->k + p + i]);
    }
}

/* A piece of HALF_OUTPUTS rows of w is widened, transposed, and serves all tokens, whose sums are
 * as many chains side by side: one alone would wait for every addition. From HALF_TOKENS on that
 * wins over the plain loop, with the same sums: each is one chain over k, ascending, from zero. */
enum { HALF_OUTPUTS = 32, HALF_INPUTS = 128, HALF_TOKENS = 4 };

/* outputs rows from j on, inputs columns from p on. */
static void
widen_piece(const struct narrow *w, int64_t j, int64_t outputs, int64_t p, int64_t inputs,
            float piece[HALF_INPUTS][HALF_OUTPUTS])
{
    float run[HALF_INPUTS];
    for (int64_t o = 0; o < outputs; o++) {
        widen_run(w, j + o, p, inputs, run);
        for (int64_t i = 0; i < inputs; i++) {
            piece[i][o] = run[i];
        }
    }
}

/* y [outputs] += x [inputs] times the piece; what stands in the columns behind them is ignored. */
static void
add_piece(int64_t outputs, int64_t inputs, const float *x, float piece[HALF_INPUTS][HALF_OUTPUTS],
          float *y)
{
    float sums[HALF_OUTPUTS] = {0};
    memcpy(sums, y, (size_t)outputs * sizeof *y);
    for (int64_t p = 0; p < inputs; p++) {
        for (int j = 0; j < HALF_OUTPUTS; j++) {
            sums[j] += x[p] * piece[p][j];
        }
    }
    memcpy(y, sums, (size_t)outputs * sizeof *y);
}

static void
gemm_by_piece(const struct narrow *w, int64_t m, int64_t n, const float *x, int64_t ld_x, float *y,
              int64_t ld_y)
{
    float piece[HALF_INPUTS][HALF_OUTPUTS] = {{0}};
    for (int64_t j = 0; j < n; j += HALF_OUTPUTS) {
        const int64_t outputs = sq_min_i64(HALF_OUTPUTS, n - j);
        for (int64_t i = 0; i < m; i++) {
            memset(y + i * ld_y + j, 0, (size_t)outputs * sizeof *y);
        }
        for (int64_t p = 0; p < w->k; p += HALF_INPUTS) {
            const int64_t inputs = sq_min_i64(HALF_INPUTS, w->k - p);
            widen_piece(w, j, outputs, p, inputs, piece);
            for (int64_t i = 0; i < m; i++) {
                add_piece(outputs, inputs, x + i * ld_x + p, piece, y + i * ld_y + j);
            }
        }
    }
}

/* The same sums, one after the other. */
static void
gemm_by_output(const struct narrow *w, int64_t m, int64_t n, const float *x, int64_t ld_x, float *y,
               int64_t ld_y)
{
    float run[HALF_INPUTS];
    for (int64_t i = 0; i < m; i++) {
        for (int64_t j = 0; j < n; j++) {
            float sum = 0.0f;
            for (int64_t p = 0; p < w->k; p += HALF_INPUTS) {
                const int64_t inputs = sq_min_i64(HALF_INPUTS, w->k - p);
                widen_run(w, j, p, inputs, run);
                for (int64_t q = 0; q < inputs; q++) {
                    sum += x[i * ld_x + p + q] * run[q];
                }
            }
            y[i * ld_y + j] = sum;
        }
    }
}

static void
gemm_narrow(const struct narrow *w, int64_t m, int64_t n, const float *x, int64_t ld_x, float *y,
            int64_t ld_y)
{
    (m >= HALF_TOKENS ? gemm_by_piece : gemm_by_output)(w, m, n, x, ld_x, y, ld_y);
}

static void
sq_gemm_half__generic(int is_bf16, int64_t m, int64_t n, int64_t k, const float *x, int64_t ld_x,
                      const uint16_t *w, float *y, int64_t ld_y)
{
    gemm_narrow(&(struct narrow){.k = k, .is_bf16 = is_bf16, .halves = w}, m, n, x, ld_x, y, ld_y);
}

/* The codes of block b of row j, zeros behind its inputs. */
static void
block_codes(const struct sq_code_rows *w, int64_t j, int64_t b, int32_t codes[SQ_ROW_BLOCK])
{
    const uint8_t *row = w->codes + j * sq_code_row_bytes(w->bits, w->k);
    for (int64_t i = 0; i < SQ_ROW_BLOCK; i++) {
        const int64_t p = b * SQ_ROW_BLOCK + i;
        codes[i] = p < w->k ? sq_code_of_row(w->bits, row, p) : 0;
    }
}

static void
sq_gemm_rows__generic(const struct sq_code_rows *w, int64_t n, const struct sq_token_rows *x,
                      int64_t m, float *y, int64_t ld_y)
{
    for (int64_t j = 0; j < n; j++) {
        float totals[SQ_ROW_TOKENS] = {0.0f};
        for (int64_t b = 0; b < x->blocks; b++) {
            int32_t codes[SQ_ROW_BLOCK];
            block_codes(w, j, b, codes);
            const float w_scale = sq_scale_of_row(w, j, b * SQ_ROW_BLOCK);
            for (int64_t i = 0; i < m * x->parts; i++) {
                const int64_t block = i * x->ld + b;
                int32_t sum = 0;
                for (int64_t p = 0; p < SQ_ROW_BLOCK; p++) {
                    sum += codes[p] * x->codes[block * SQ_ROW_BLOCK + p];
                }
                const float scale = w_scale * x->scales[block];
                totals[i] += scale * (float)sum;
            }
        }
        for (int64_t i = 0; i < m; i++) {
            const float *token = totals + i * x->parts;
            y[i * ld_y + j] = token[0];
            for (int part = 1; part < x->parts; part++) {
                y[i * ld_y + j] += token[part];
            }
        }
    }
}

static int
sq_f16_to_f32__generic(const uint16_t *in, int64_t count, float *out)
{
    int finite = 1;
    for (int64_t i = 0; i < count; i++) {
        out[i] = float_of_f16(in[i]);
        finite &= (in[i] & 0x7c00) != 0x7c00;
    }
    return finite;
}

static int
sq_bf16_to_f32__generic(const uint16_t *in, int64_t count, float *out)
{
    int finite = 1;
    for (int64_t i = 0; i < count; i++) {
        out[i] = float_of_bits((uint32_t)in[i] << 16);
        finite &= (in[i] & 0x7f80) != 0x7f80;
    }
    return finite;
}

/* To nearest, halves to even: beyond the normal range by adding a number whose last place is
 * float16's smallest step, within it by adding half a step less one, and the odd bit. */
static uint16_t
f16_of_float(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    const uint32_t sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) { /* NaN, made quiet */
        return (uint16_t)(sign | 0x7e00 | (magnitude >> 13 & 0x3ff));
    }
    if (magnitude >= 0x477fe000) { /* 65504 */
        return (uint16_t)(sign | 0x7bff);
    }
    if (magnitude < 0x38800000) { /* below 2^-14: a multiple of 2^-24 */
        const float shifted = float_of_bits(magnitude) + 0.5f;
        memcpy(&bits, &shifted, sizeof bits);
        return (uint16_t)(sign | (bits - 0x3f000000));
    }
    const uint32_t rounded_up = magnitude + 0xfff + (magnitude >> 13 & 1);
    return (uint16_t)(sign | ((rounded_up >> 13) - ((127 - 15) << 10)));
}

static void
sq_f32_to_f16__generic(const float *in, int64_t count, uint16_t *out)
{
    for (int64_t i = 0; i < count; i++) {
        out[i] = f16_of_float(in[i]);
    }
}

/* ---- KV cache --------------------------------------------------------------------------- */

static void
kv_to_f32(const uint8_t *codes, const float *scales, const float *minima, int by_row, int64_t rows,
          int64_t n, float *out, int bits)
{
    const int64_t group = 64 / bits, row_bytes = sq_ceil_div(n, group) * 8;
    for (int64_t r = 0; r < rows; r++) {
        for (int64_t i = 0; i < n; i++) {
            const int byte = codes[r * row_bytes + i / group * 8 + i % 8];
            const int code = bits == 8 ? byte : i % group < 8 ? byte & 15 : byte >> 4;
            const int64_t of = by_row ? r : i;
            out[r * n + i] = scales[of] * (float)code + minima[of];
        }
    }
}

static void
sq_kv8_to_f32__generic(const uint8_t *codes, const float *scales, const float *minima, int by_row,
                       int64_t rows, int64_t n, float *out)
{
    kv_to_f32(codes, scales, minima, by_row, rows, n, out, 8);
}

static void
sq_kv4_to_f32__generic(const uint8_t *codes, const float *scales, const float *minima, int by_row,
                       int64_t rows, int64_t n, float *out)
{
    kv_to_f32(codes, scales, minima, by_row, rows, n, out, 4);
}

const struct sq_kernels sq_kernels_generic = {
    .name = "generic",
    .required_features = 0,
    .mr = MR,
    .nr = NR,
    .row_block_bytes = 1 << 18,
    .pack_panel = sq_pack_panel_4x8__generic,
    .gemm_a4w4 = sq_gemm_a8w4_f32_4x8__generic,
    .gemm_a8w4 = sq_gemm_a8w4_f32_4x8__generic,
    .gemm_a16w4 = sq_gemm_a16w4_f32_4x8__generic,
    .pack_panel_w8 = sq_pack_panel_w8_4x8__generic,
    .gemm_a8w8 = sq_gemm_a8w8_f32_4x8__generic,
    .gemm_a16w8 = sq_gemm_a16w8_f32_4x8__generic,
    .thin_block = THIN_BLOCK,
    .widen_panel = sq_widen_panel__generic,
    .gptq_columns = sq_gptq_columns__generic,
    .sylvester = sq_sylvester__generic,
    .sum_pairs = sq_sum_pairs__generic,
    .rotate_pairs = sq_rotate_pairs__generic,
    .gemm_f32 = sq_gemm_f32__generic,
    .gemm_half = sq_gemm_half__generic,
    .gemm_rows = sq_gemm_rows__generic,
    .extremes = sq_extremes__generic,
    .quantize_codes = sq_quantize_codes__generic,
    .quantize_errors = sq_quantize_errors__generic,
    .fixed_point = sq_fixed_point__generic,
    .fixed_errors = sq_fixed_errors__generic,
    .rms_norm_row = sq_rms_norm_row__generic,
    .silu_mul = sq_silu_mul__generic,
    .softmax_row = sq_softmax_row__generic,
    .f16_to_f32 = sq_f16_to_f32__generic,
    .bf16_to_f32 = sq_bf16_to_f32__generic,
    .f32_to_f16 = sq_f32_to_f16__generic,
    .kv8_to_f32 = sq_kv8_to_f32__generic,
    .kv4_to_f32 = sq_kv4_to_f32__generic,
};
_Static_assert(NR <= SQ_NR_MAX, "the tail panel's buffer");
_Static_assert(NR *SQ_K_ALIGN / 2 % SQ_ALIGN_BYTES == 0,
               "the panel behind 8-bit inputs is aligned");
