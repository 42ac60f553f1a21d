/* SPDX-License-Identifier: Apache-2.0 */
/* AVX-VNNI: the codes' tiles with vpdpbusd on 256 bits, on AVX2's panels; the rest is AVX2's. */
#define TILE_BITS 256
#define TILE_MR 6 /* 12 accumulators of 16 registers */
#define TILE_DOT _mm256_dpbusd_avx_epi32
#define TILE_DOT_256 _mm256_dpbusd_avx_epi32
#include "kernels/kernels_x86_template.h"
#include "kernels/kernels_x86_rows_template.h"

#include "core/sq_cpu.h"

static void
sq_gemm_a8w4_f32_6x32__avxvnni(const struct sq_panel_args *args)
{
    FOR_TILES(tile_codes, 4, BLOCKS_A8)
}

static void
sq_gemm_a8w5_f32_6x32__avxvnni(const struct sq_panel_args *args)
{
    FOR_TILES(tile_codes, 5, BLOCKS_W8)
}

static void
sq_gemm_a8w6_f32_6x32__avxvnni(const struct sq_panel_args *args)
{
    FOR_TILES(tile_codes, 6, BLOCKS_W8)
}

static void
sq_gemm_a8w8_f32_6x32__avxvnni(const struct sq_panel_args *args)
{
    FOR_TILES(tile_codes, 8, BLOCKS_W8)
}

static void
sq_gemm_rows__avxvnni(const struct sq_code_rows *w, int64_t n, const struct sq_token_rows *x,
                      int64_t m, float *y, int64_t ld_y)
{
    gemm_rows(w, n, x, m, y, ld_y);
}

const struct sq_kernels sq_kernels_avxvnni = {
    .name = "avxvnni",
    .required_features = SQ_CPU_AVX_VNNI,
    .base = &sq_kernels_avx2,
    .steps = {"dpbusd 256", "dpbusd 256", NULL},
    .mr = 12, /* of 6 here and of 4 in the base's float kernel */
    .gemm_a4w4 = sq_gemm_a8w4_f32_6x32__avxvnni,
    .gemm_a8w4 = sq_gemm_a8w4_f32_6x32__avxvnni,
    .gemm_a8w8 = sq_gemm_a8w8_f32_6x32__avxvnni,
    .thin_rows = TILE_MR,
    .gemm_a8w5 = sq_gemm_a8w5_f32_6x32__avxvnni,
    .gemm_a8w6 = sq_gemm_a8w6_f32_6x32__avxvnni,
    .gemm_rows = sq_gemm_rows__avxvnni,
};
