/* SPDX-License-Identifier: Apache-2.0 */
/* AVX-512 with VNNI: tiles of 512 bits on AVX2's panels; what is missing is AVX2's. */
#define TILE_BITS 512
#define TILE_MR 12 /* 12 rows x 32 outputs are 24 accumulators of 32 registers */
#define TILE_DOT _mm512_dpbusd_epi32
#define TILE_GEMM
#include "kernels/kernels_x86_template.h"
#include "kernels/kernels_x86_rows_template.h"
#include "kernels/kernels_x86_exp_template.h"
#include "kernels/sylvester.h"
#include "kernels/thin_panels.h"

#include "core/sq_cpu.h"

/* vpdpbusd sums into 32 bits whatever the codes' width is: one kernel for both. */
static void
sq_gemm_a8w4_f32_12x32__avx512vnni(const struct sq_panel_args *args)
{
    FOR_TILES(tile_codes, 4, BLOCKS_A8)
}

static void
sq_gemm_a16w4_f32_12x32__avx512vnni(const struct sq_panel_args *args)
{
    FOR_TILES(tile_values, 4)
}

static void
sq_gemm_a8w5_f32_12x32__avx512vnni(const struct sq_panel_args *args)
{
    FOR_TILES(tile_codes, 5, BLOCKS_W8)
}

static void
sq_gemm_a8w6_f32_12x32__avx512vnni(const struct sq_panel_args *args)
{
    FOR_TILES(tile_codes, 6, BLOCKS_W8)
}

static void
sq_gemm_a8w8_f32_12x32__avx512vnni(const struct sq_panel_args *args)
{
    FOR_TILES(tile_codes, 8, BLOCKS_W8)
}

static void
sq_gemm_a16w8_f32_12x32__avx512vnni(const struct sq_panel_args *args)
{
    FOR_TILES(tile_values, 8)
}

static void
sq_gptq_columns__avx512vnni(const struct sq_gptq_columns *columns, struct sq_gptq_lanes *lanes)
{
    round_gptq_columns(columns, lanes);
}

static void
sq_sylvester__avx512vnni(float *x, int64_t count, int64_t from, int64_t to, float scale)
{
    sylvester_stages(x, count, from, to, scale);
}

static struct sq_pair_sums
sq_sum_pairs__avx512vnni(const double *a, const double *b, int64_t rows)
{
    return sum_pairs(a, b, rows);
}

static void
sq_rotate_pairs__avx512vnni(double *a, double *b, int64_t rows, double c, double s)
{
    rotate_pairs(a, b, rows, c, s);
}

static void
sq_widen_panel__avx512vnni(int bits, const uint8_t *thin, int64_t bytes, int zero, uint8_t *panel)
{
    widen_panel(bits, thin, bytes, zero, panel, THIN_BLOCK);
}

static void
sq_gemm_f32_12x32__avx512vnni(int64_t m, int64_t n, int64_t k, const float *a, int64_t ld_a,
                              const float *b, int64_t ld_b, float *c, int64_t ld_c)
{
    gemm_f32(m, n, k, a, ld_a, b, ld_b, c, ld_c);
}

static void
sq_gemm_page__avx512vnni(const struct sq_page_args *args)
{
    if (args->is_bf16) {
        gemm_page(args, 1);
    }
    else {
        gemm_page(args, 0);
    }
}

static void
sq_gemm_half__avx512vnni(int is_bf16, int64_t m, int64_t n, int64_t k, const float *x, int64_t ld_x,
                         const uint16_t *w, float *y, int64_t ld_y)
{
    gemm_half(is_bf16, m, n, k, x, ld_x, w, y, ld_y);
}

static void
sq_gemm_rows__avx512vnni(const struct sq_code_rows *w, int64_t n, const struct sq_token_rows *x,
                         int64_t m, float *y, int64_t ld_y)
{
    gemm_rows(w, n, x, m, y, ld_y);
}

static void
sq_silu_mul__avx512vnni(const float *gate, const float *up, int64_t n, float *y)
{
    silu_mul(gate, up, n, y);
}

static void
sq_softmax_row__avx512vnni(float *x, int64_t n, int64_t n_padded, float scale)
{
    softmax_row(x, n, n_padded, scale);
}

/* ---- 16-bit floats ---------------------------------------------------------------------- */

static ALWAYS_INLINE int
halves_to_f32(const uint16_t *in, int64_t count, float *out, const int is_f16)
{
    const __m256i exponent = _mm256_set1_epi16(is_f16 ? 0x7c00 : 0x7f80);
    __mmask16 bad = 0;
    for (int64_t i = 0; i < count; i += LANES) {
        const __mmask16 there = (__mmask16)(count - i < LANES ? (1 << (count - i)) - 1 : 0xffff);
        const __m256i v = _mm256_maskz_loadu_epi16(there, in + i);
        bad |= _mm256_cmpeq_epi16_mask(_mm256_and_si256(v, exponent), exponent);
        const __m512 values =
            is_f16 ? _mm512_cvtph_ps(v)
                   : _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16));
        _mm512_mask_storeu_ps(out + i, there, values);
    }
    return bad == 0;
}

static int
sq_f16_to_f32__avx512vnni(const uint16_t *in, int64_t count, float *out)
{
    return halves_to_f32(in, count, out, 1);
}

static int
sq_bf16_to_f32__avx512vnni(const uint16_t *in, int64_t count, float *out)
{
    return halves_to_f32(in, count, out, 0);
}

const struct sq_kernels sq_kernels_avx512vnni = {
    .name = "avx512vnni",
    .required_features = SQ_CPU_AVX512_VNNI,
    .base = &sq_kernels_avx2,
    .steps = {"dpbusd 512", "dpbusd 512", "fma 512"},
    .mr = TILE_MR,
    .gemm_a4w4 = sq_gemm_a8w4_f32_12x32__avx512vnni,
    .gemm_a8w4 = sq_gemm_a8w4_f32_12x32__avx512vnni,
    .gemm_a16w4 = sq_gemm_a16w4_f32_12x32__avx512vnni,
    .gemm_a8w8 = sq_gemm_a8w8_f32_12x32__avx512vnni,
    .gemm_a16w8 = sq_gemm_a16w8_f32_12x32__avx512vnni,
    .widen_panel = sq_widen_panel__avx512vnni,
    .gptq_columns = sq_gptq_columns__avx512vnni,
    .sylvester = sq_sylvester__avx512vnni,
    .sum_pairs = sq_sum_pairs__avx512vnni,
    .rotate_pairs = sq_rotate_pairs__avx512vnni,
    .thin_rows = TILE_MR,
    .gemm_a8w5 = sq_gemm_a8w5_f32_12x32__avx512vnni,
    .gemm_a8w6 = sq_gemm_a8w6_f32_12x32__avx512vnni,
    .gemm_f32 = sq_gemm_f32_12x32__avx512vnni,
    .gemm_page = sq_gemm_page__avx512vnni,
    .gemm_half = sq_gemm_half__avx512vnni,
    .gemm_rows = sq_gemm_rows__avx512vnni,
    .silu_mul = sq_silu_mul__avx512vnni,
    .softmax_row = sq_softmax_row__avx512vnni,
    .f16_to_f32 = sq_f16_to_f32__avx512vnni,
    .bf16_to_f32 = sq_bf16_to_f32__avx512vnni,
};
