/* SPDX-License-Identifier: Apache-2.0 */
/* AArch64 Advanced SIMD with the dot product instructions (FEAT_DotProd).
 *
 * A panel is SUBS sub-panels of 8 outputs, each [k / 8][8] dwords; a dword holds 8 k of one output,
 * k 0..3 in the low nibbles of its bytes and k 4..7 in the high ones, all as code + 8. So v &
 * 0x0f.. and v >> 4 (by bytes) are bytes in k order, and sdot takes 4 k of one row from a lane of
 * the activation codes as they lie in memory. The + 8 is taken back once per group: sum (w + 8) a -
 * 8 sum a. A panel of 8 bits has a signed byte for each code in the same order, [k / 4][8] dwords,
 * and needs no correction; the functions below that take `bits` are inlined with either. Shifting
 * signed nibbles up to 16 times the code instead would leave 2^31 / (16 * 8 * 128) = 2^17 k for a
 * 32-bit sum, less than SQ_PACKED_K_MAX.
 *
 * Tiles keep 16 vectors of sums: up to 4 rows take the panel's 16 outputs at once, 5 to 8 rows one
 * sub-panel after the other. The other 16 registers hold a vector of every row, the weights and
 * constants. */
#include <arm_neon.h>
#include <math.h>
#include <string.h>

#include "core/sq_cpu.h"
#include "core/sq_internal.h"
#include "kernels/sq_kernels.h"
#include "kernels/panel_dwords.h"
#include "kernels/sylvester.h"
#include "kernels/thin_panels.h"

enum {
    MR = 8,
    SUB = 8,  /* outputs of a sub-panel */
    SUBS = 2, /* sub-panels of a panel */
    NR = SUB * SUBS,
    THIN_BLOCK = NR * SQ_K_ALIGN,
    BLOCK_K = 8, /* two steps of 4 k, a dword of nibbles */
    VECS_OF_SUB = SUB / 4,
    VECS_MAX = NR / 4
};
_Static_assert(NR <= SQ_NR_MAX, "the tail panel's buffer");
_Static_assert(NR *SQ_K_ALIGN / 2 % SQ_ALIGN_BYTES == 0,
               "the panel behind 8-bit inputs is aligned");
_Static_assert(SQ_K_ALIGN % (2 * BLOCK_K) == 0, "a group is whole pairs of blocks");

/* Rows times outputs; tile is (args, row, rows, vecs, sub, ...). */
#define TILE_WIDE(tile, rows, ...)                         \
    case rows:                                             \
        tile(args, row, rows, VECS_MAX, 0, ##__VA_ARGS__); \
        break;
#define TILE_TALL(tile, rows, ...)                                \
    case rows:                                                    \
        for (int s = 0; s < SUBS; s++) {                          \
            tile(args, row, rows, VECS_OF_SUB, s, ##__VA_ARGS__); \
        }                                                         \
        break;
#define FOR_TILES(tile, ...)                          \
    for (int64_t row = 0; row < args->m; row += MR) { \
        switch (sq_min_i64(MR, args->m - row)) {      \
            TILE_WIDE(tile, 1, ##__VA_ARGS__)         \
            TILE_WIDE(tile, 2, ##__VA_ARGS__)         \
            TILE_WIDE(tile, 3, ##__VA_ARGS__)         \
            TILE_WIDE(tile, 4, ##__VA_ARGS__)         \
            TILE_TALL(tile, 5, ##__VA_ARGS__)         \
            TILE_TALL(tile, 6, ##__VA_ARGS__)         \
            TILE_TALL(tile, 7, ##__VA_ARGS__)         \
            TILE_TALL(tile, 8, ##__VA_ARGS__)         \
        }                                             \
    }

/* ---- panels ----------------------------------------------------------------------------- */

static void
sq_pack_panel_8x16__neon(const int32_t *words, int64_t k, uint8_t *panel)
{
    pack_sub_panels(words, k, SUBS, SUB, panel);
}

static void
sq_gptq_columns__neon(const struct sq_gptq_columns *columns, struct sq_gptq_lanes *lanes)
{
    round_gptq_columns(columns, lanes);
}

static void
sq_sylvester__neon(float *x, int64_t count, int64_t from, int64_t to, float scale)
{
    sylvester_stages(x, count, from, to, scale);
}

static struct sq_pair_sums
sq_sum_pairs__neon(const double *a, const double *b, int64_t rows)
{
    return sum_pairs(a, b, rows);
}

static void
sq_rotate_pairs__neon(double *a, double *b, int64_t rows, double c, double s)
{
    rotate_pairs(a, b, rows, c, s);
}

static void
sq_widen_panel__neon(int bits, const uint8_t *thin, int64_t bytes, int zero, uint8_t *panel)
{
    widen_panel(bits, thin, bytes, zero, panel, THIN_BLOCK);
}

static void
sq_pack_panel_w8_8x16__neon(const int8_t *codes, int64_t k, uint8_t *panel)
{
    pack_sub_panels_w8(codes, k, SUBS, SUB, 0, panel);
}

/* Bytes of a block of 8 k of a sub-panel. */
#define BLOCK_BYTES(bits) (SUB * (bits))

/* Vector v of a block that starts at w, sub-panels being sub_bytes apart. */
static ALWAYS_INLINE uint8x16_t
load_block(const uint8_t *w, int64_t sub_bytes, int v)
{
    return vld1q_u8(w + v / VECS_OF_SUB * sub_bytes + v % VECS_OF_SUB * 16);
}

/* y [rows][4 vecs] of sub-panel sub <- values, times a scale per row or not, or added to y. */
static ALWAYS_INLINE void
store_tile(const struct sq_panel_args *args, int64_t row, const int rows, const int vecs,
           int64_t sub, const float *row_scales, float32x4_t values[MR][VECS_MAX])
{
    UNROLL
    for (int r = 0; r < rows; r++) {
        UNROLL
        for (int v = 0; v < vecs; v++) {
            float *y = args->y + (row + r) * args->ld_y + sub * SUB + 4 * v;
            float32x4_t value = values[r][v];
            if (row_scales) {
                value = vmulq_n_f32(value, row_scales[row + r]);
            }
            vst1q_f32(y, args->accumulate ? vaddq_f32(vld1q_f32(y), value) : value);
        }
    }
}

/* total += w_scale * sums, each rounded by itself; scales [4 vecs]. */
static ALWAYS_INLINE void
add_scaled(const int rows, const int vecs, const float *scales, float32x4_t sums[MR][VECS_MAX],
           float32x4_t total[MR][VECS_MAX])
{
    UNROLL
    for (int v = 0; v < vecs; v++) {
        const float32x4_t scale = vld1q_f32(scales + 4 * v);
        UNROLL
        for (int r = 0; r < rows; r++) {
            total[r][v] = vaddq_f32(total[r][v], vmulq_f32(scale, sums[r][v]));
        }
    }
}

/* ---- weights x codes -------------------------------------------------------------------- */

/* The 32-bit sums hold all of k: 15 * 128 * 2^20 < 2^31. (A sum that starts at -8 sum a may wrap on
 * its way; what it ends at, at most 8 * 128 * 2^20 = 2^30, is exact modulo 2^32.) */
_Static_assert((int64_t)15 * 128 * SQ_PACKED_K_MAX <= INT32_MAX, "32-bit sums over all of k");
_Static_assert((int64_t)128 * 128 * SQ_PACKED_K_MAX_W8 <= INT32_MAX, "and of 8-bit weights");

/* The instruction's lane must be a literal; lane is a constant after inlining. */
static ALWAYS_INLINE int32x4_t
dot_lane(int32x4_t sum, int8x16_t weights, int8x16_t codes, const int lane)
{
    switch (lane) {
        case 0:
            return vdotq_laneq_s32(sum, weights, codes, 0);
        case 1:
            return vdotq_laneq_s32(sum, weights, codes, 1);
        case 2:
            return vdotq_laneq_s32(sum, weights, codes, 2);
        default:
            return vdotq_laneq_s32(sum, weights, codes, 3);
    }
}

/* Sums of the even and the odd steps of 4 k. Two chains where a tile has at most 8 vectors, since
 * sdot takes about 4 cycles and two or more start in each; one chain, [0], where it has more. */
typedef int32x4_t chains[2][MR][VECS_MAX];

/* acc += the products of two blocks of 8 k. */
static ALWAYS_INLINE void
multiply_blocks(const int rows, const int vecs, const int8_t *a, int64_t ld_a, const uint8_t *w,
                int64_t sub_bytes, const int bits, chains acc)
{
    const int odd = rows * vecs <= 8;
    int8x16_t codes[MR];
    UNROLL
    for (int r = 0; r < rows; r++) {
        codes[r] = vld1q_s8(a + r * ld_a);
    }
    UNROLL
    for (int b = 0; b < 2; b++) {
        UNROLL
        for (int v = 0; v < vecs; v++) {
            const uint8_t *block = w + b * BLOCK_BYTES(bits);
            const uint8x16_t raw = load_block(block, sub_bytes, v);
            int8x16_t low = vreinterpretq_s8_u8(raw), high;
            if (bits == 8) {
                high = vreinterpretq_s8_u8(load_block(block + SUB * 4, sub_bytes, v));
            }
            else {
                low = vreinterpretq_s8_u8(vandq_u8(raw, vdupq_n_u8(15)));
                high = vreinterpretq_s8_u8(vshrq_n_u8(raw, 4));
            }
            UNROLL
            for (int r = 0; r < rows; r++) {
                acc[0][r][v] = dot_lane(acc[0][r][v], low, codes[r], 2 * b);
                acc[odd][r][v] = dot_lane(acc[odd][r][v], high, codes[r], 2 * b + 1);
            }
        }
    }
}

/* sums = those of one group, whose activations and weights start at a and w. */
static ALWAYS_INLINE void
group_of_codes(const struct sq_panel_args *args, const int rows, const int vecs, const int8_t *a,
               const int32_t *a_sums, const uint8_t *w, const int bits,
               float32x4_t sums[MR][VECS_MAX])
{
    const int64_t sub_bytes = args->k / BLOCK_K * BLOCK_BYTES(bits);
    const int odd = rows * vecs <= 8;
    chains acc;
    UNROLL
    for (int r = 0; r < rows; r++) {
        const int32_t *before = a_sums + r * args->ld_sums;
        const int32x4_t offset =
            vdupq_n_s32(bits == 4 ? -8 * (before[args->g / SQ_K_ALIGN] - before[0]) : 0);
        UNROLL
        for (int v = 0; v < vecs; v++) {
            acc[1][r][v] = vdupq_n_s32(0);
            acc[0][r][v] = offset;
        }
    }
    for (int64_t k = 0; k < args->g; k += 2 * BLOCK_K) {
        multiply_blocks(rows, vecs, a + k, args->ld_a, w + k / BLOCK_K * BLOCK_BYTES(bits),
                        sub_bytes, bits, acc);
    }
    UNROLL
    for (int r = 0; r < rows; r++) {
        UNROLL
        for (int v = 0; v < vecs; v++) {
            const int32x4_t sum = odd ? vaddq_s32(acc[0][r][v], acc[1][r][v]) : acc[0][r][v];
            sums[r][v] = vcvtq_f32_s32(sum);
        }
    }
}

static ALWAYS_INLINE void
clear(const int rows, const int vecs, float32x4_t values[MR][VECS_MAX])
{
    UNROLL
    for (int r = 0; r < rows; r++) {
        UNROLL
        for (int v = 0; v < vecs; v++) {
            values[r][v] = vdupq_n_f32(0.0f);
        }
    }
}

static ALWAYS_INLINE void
tile_codes(const struct sq_panel_args *args, int64_t row, const int rows, const int vecs,
           int64_t sub, const int bits)
{
    const int8_t *a = (const int8_t *)args->a + row * args->ld_a;
    const int32_t *a_sums = args->a_sums + row * args->ld_sums;
    const uint8_t *w = args->panel + sub * (args->k / BLOCK_K * BLOCK_BYTES(bits));
    float32x4_t total[MR][VECS_MAX], sums[MR][VECS_MAX];
    clear(rows, vecs, total);
    for (int64_t begin = 0; begin < args->k; begin += args->g) {
        group_of_codes(args, rows, vecs, a + begin, a_sums + begin / SQ_K_ALIGN,
                       w + begin / BLOCK_K * BLOCK_BYTES(bits), bits, sums);
        add_scaled(rows, vecs, args->w_scales + begin / args->g * NR + sub * SUB, sums, total);
    }
    store_tile(args, row, rows, vecs, sub, args->a_scales, total);
}

/* 4- and 8-bit activations alike: sdot adds into 32 bits. */
static void
sq_gemm_a8w4_f32_8x16__neon(const struct sq_panel_args *args)
{
    FOR_TILES(tile_codes, 4)
}

static void
sq_gemm_a8w8_f32_8x16__neon(const struct sq_panel_args *args)
{
    FOR_TILES(tile_codes, 8)
}

/* ---- float32 ---------------------------------------------------------------------------- */

static ALWAYS_INLINE float32x4_t
fma_lane(float32x4_t sum, float32x4_t row, float32x4_t values, const int lane)
{
    switch (lane) {
        case 0:
            return vfmaq_laneq_f32(sum, row, values, 0);
        case 1:
            return vfmaq_laneq_f32(sum, row, values, 1);
        case 2:
            return vfmaq_laneq_f32(sum, row, values, 2);
        default:
            return vfmaq_laneq_f32(sum, row, values, 3);
    }
}

/* acc += the products of 4 k, b a step of 4 in a block of 8: k number j is byte j, or with 4 bits
 * nibble b of it. With code + 8 XORed by 8 the nibble is two's complement. Two shifts extend the
 * sign. */
static ALWAYS_INLINE void
multiply_values(const int rows, const int vecs, const int b, const int bits, const float *a,
                int64_t ld_a, const int32x4_t raw[VECS_MAX], float32x4_t acc[MR][VECS_MAX])
{
    float32x4_t values[MR];
    UNROLL
    for (int r = 0; r < rows; r++) {
        values[r] = vld1q_f32(a + r * ld_a);
    }
    UNROLL
    for (int j = 0; j < 4; j++) {
        const int32x4_t up = vdupq_n_s32(32 - bits - 8 * j - (bits == 4 ? 4 * b : 0));
        UNROLL
        for (int v = 0; v < vecs; v++) {
            const int32x4_t top = vshlq_s32(raw[v], up);
            const int32x4_t code = bits == 4 ? vshrq_n_s32(top, 28) : vshrq_n_s32(top, 24);
            const float32x4_t weight = vcvtq_f32_s32(code);
            UNROLL
            for (int r = 0; r < rows; r++) {
                acc[r][v] = fma_lane(acc[r][v], weight, values[r], j);
            }
        }
    }
}

static ALWAYS_INLINE void
tile_values(const struct sq_panel_args *args, int64_t row, const int rows, const int vecs,
            int64_t sub, const int bits)
{
    const int64_t sub_bytes = args->k / BLOCK_K * BLOCK_BYTES(bits);
    const uint8x16_t sign = vdupq_n_u8(bits == 4 ? 0x88 : 0);
    const float *a = (const float *)args->a + row * args->ld_a;
    const uint8_t *w = args->panel + sub * sub_bytes;
    float32x4_t total[MR][VECS_MAX], acc[MR][VECS_MAX];
    clear(rows, vecs, total);
    for (int64_t begin = 0; begin < args->k; begin += args->g) {
        clear(rows, vecs, acc);
        for (int64_t k = 0; k < args->g; k += BLOCK_K) {
            int32x4_t raw[VECS_MAX];
            UNROLL
            for (int b = 0; b < 2; b++) {
                if (b == 0 || bits == 8) {
                    UNROLL
                    for (int v = 0; v < vecs; v++) {
                        const uint8x16_t block = load_block(w + b * SUB * 4, sub_bytes, v);
                        raw[v] = vreinterpretq_s32_u8(veorq_u8(block, sign));
                    }
                }
                multiply_values(rows, vecs, b, bits, a + 4 * b, args->ld_a, raw, acc);
            }
            a += BLOCK_K;
            w += BLOCK_BYTES(bits);
        }
        add_scaled(rows, vecs, args->w_scales + begin / args->g * NR + sub * SUB, acc, total);
    }
    store_tile(args, row, rows, vecs, sub, NULL, total);
}

static void
sq_gemm_a16w4_f32_8x16__neon(const struct sq_panel_args *args)
{
    FOR_TILES(tile_values, 4)
}

static void
sq_gemm_a16w8_f32_8x16__neon(const struct sq_panel_args *args)
{
    FOR_TILES(tile_values, 8)
}

/* m rows against NR columns of b and c, all of which exist. */
struct strip {
    int64_t m, k;
    const float *a, *b;
    float *c;
    int64_t ld_a, ld_b, ld_c;
    int first; /* 0: the chains go on from what c holds */
};

/* acc += values [lane] of each row times one row of b. */
static ALWAYS_INLINE void
multiply_row(const int rows, const int vecs, const int lane, const float *b,
             const float32x4_t values[MR], float32x4_t acc[MR][VECS_MAX])
{
    UNROLL
    for (int v = 0; v < vecs; v++) {
        const float32x4_t row = vld1q_f32(b + 4 * v);
        UNROLL
        for (int r = 0; r < rows; r++) {
            acc[r][v] = fma_lane(acc[r][v], row, values[r], lane);
        }
    }
}

static ALWAYS_INLINE void
tile_f32(const struct strip *args, int64_t row, const int rows, const int vecs, int64_t sub)
{
    const float *a = args->a + row * args->ld_a, *b = args->b + sub * SUB;
    float *c = args->c + row * args->ld_c + sub * SUB;
    float32x4_t acc[MR][VECS_MAX], values[MR];
    UNROLL
    for (int r = 0; r < rows; r++) {
        UNROLL
        for (int v = 0; v < vecs; v++) {
            acc[r][v] = args->first ? vdupq_n_f32(0.0f) : vld1q_f32(c + r * args->ld_c + 4 * v);
        }
    }
    int64_t p = 0;
    for (; p + 4 <= args->k; p += 4) {
        UNROLL
        for (int r = 0; r < rows; r++) {
            values[r] = vld1q_f32(a + r * args->ld_a + p);
        }
        UNROLL
        for (int j = 0; j < 4; j++) {
            multiply_row(rows, vecs, j, b + (p + j) * args->ld_b, values, acc);
        }
    }
    for (; p < args->k; p++) {
        UNROLL
        for (int r = 0; r < rows; r++) {
            values[r] = vld1q_dup_f32(a + r * args->ld_a + p);
        }
        multiply_row(rows, vecs, 0, b + p * args->ld_b, values, acc);
    }
    UNROLL
    for (int r = 0; r < rows; r++) {
        UNROLL
        for (int v = 0; v < vecs; v++) {
            vst1q_f32(c + r * args->ld_c + 4 * v, acc[r][v]);
        }
    }
}

static void
strip_f32(const struct strip *args)
{
    FOR_TILES(tile_f32)
}

enum { GEMM_KC = 256, GEMM_ROWS = 64, GEMM_COPY_ROWS = 24 };

/* Columns 0 .. columns - 1 of rows 0 .. s->m - 1 over all of k. The strip of b is copied to the
 * stack when it is the tail, so as to read no column past n (c goes through a buffer then), or when
 * enough rows use it: long strides of b fall on few cache sets. The chain is cut at GEMM_KC through
 * c, which loses nothing: a stored float32 is what it was. */
static void
block_f32(const struct strip *whole, int64_t columns)
{
    float copy[GEMM_KC * NR], buffer[GEMM_ROWS * NR];
    struct strip s = *whole;
    if (columns < NR) {
        memset(copy, 0, sizeof copy);
        s.c = buffer;
        s.ld_c = NR;
    }
    for (int64_t p = 0; p < whole->k || s.first; p += GEMM_KC) {
        s.k = sq_min_i64(whole->k - p, GEMM_KC);
        s.a = whole->a + p;
        s.b = whole->b + p * whole->ld_b;
        if (columns < NR || s.m >= GEMM_COPY_ROWS) {
            for (int64_t q = 0; q < s.k; q++) {
                memcpy(copy + q * NR, s.b + q * whole->ld_b, (size_t)columns * sizeof *copy);
            }
            s.b = copy;
            s.ld_b = NR;
        }
        strip_f32(&s);
        s.first = 0;
    }
    for (int64_t i = 0; columns < NR && i < s.m; i++) {
        memcpy(whole->c + i * whole->ld_c, buffer + i * NR, (size_t)columns * sizeof *buffer);
    }
}

static void
sq_gemm_f32_8x16__neon(int64_t m, int64_t n, int64_t k, const float *a, int64_t ld_a,
                       const float *b, int64_t ld_b, float *c, int64_t ld_c)
{
    for (int64_t i = 0; i < m; i += GEMM_ROWS) {
        for (int64_t j = 0; j < n; j += NR) {
            const struct strip s = {.m = sq_min_i64(m - i, GEMM_ROWS),
                                    .k = k,
                                    .a = a + i * ld_a,
                                    .b = b + j,
                                    .c = c + i * ld_c + j,
                                    .ld_a = ld_a,
                                    .ld_b = ld_b,
                                    .ld_c = ld_c,
                                    .first = 1};
            block_f32(&s, sq_min_i64(n - j, NR));
        }
    }
}

/* ---- quantizers ------------------------------------------------------------------------- */

/* Four values, of which count exist; the others are fill. */
static ALWAYS_INLINE float32x4_t
load_some(const float *x, int64_t count, float fill)
{
    float four[4] = {fill, fill, fill, fill};
    memcpy(four, x, (size_t)sq_max_i64(0, sq_min_i64(count, 4)) * sizeof *four);
    return vld1q_f32(four);
}

/* NaN and Inf are those whose bits without the sign, as integers, reach Inf's. */
static int
sq_extremes__neon(const float *x, int64_t k, float *min, float *max)
{
    float32x4_t low = vdupq_n_f32(x[0]), high = low;
    uint32x4_t largest = vdupq_n_u32(0);
    for (int64_t i = 0; i < k; i += 4) {
        const float32x4_t v = k - i >= 4 ? vld1q_f32(x + i) : load_some(x + i, k - i, x[0]);
        low = vminq_f32(v, low);
        high = vmaxq_f32(v, high);
        largest = vmaxq_u32(largest, vreinterpretq_u32_f32(vabsq_f32(v)));
    }
    *min = vminvq_f32(low);
    *max = vmaxvq_f32(high);
    return vmaxvq_u32(largest) < 0x7f800000u;
}

/* maxnm and minnm, as fmax and fmin, prefer a number to NaN. */
static ALWAYS_INLINE float32x4_t
clamped(float32x4_t x, float inv_scale, float low, float high)
{
    return vminnmq_f32(vmaxnmq_f32(vmulq_n_f32(x, inv_scale), vdupq_n_f32(low)), vdupq_n_f32(high));
}

static void
sq_quantize_codes__neon(const float *x, int64_t k, float inv_scale, float low, float high,
                        int offset, int8_t *codes)
{
    for (int64_t i = 0; i < k; i += 16) {
        const int64_t count = sq_min_i64(k - i, 16);
        int16x4_t part[4];
        UNROLL
        for (int v = 0; v < 4; v++) {
            const float *from = x + i + 4 * v;
            const int64_t left = count - 4 * v;
            const float32x4_t values =
                count == 16 ? vld1q_f32(from) : load_some(left > 0 ? from : x, left, 0.0f);
            const int32x4_t code = vcvtnq_s32_f32(clamped(values, inv_scale, low, high));
            part[v] = vmovn_s32(vaddq_s32(code, vdupq_n_s32(offset)));
        }
        const int8x16_t bytes = vcombine_s8(vmovn_s16(vcombine_s16(part[0], part[1])),
                                            vmovn_s16(vcombine_s16(part[2], part[3])));
        if (count == 16) {
            vst1q_s8(codes + i, bytes);
        }
        else {
            int8_t tail[16];
            vst1q_s8(tail, bytes);
            memcpy(codes + i, tail, (size_t)count);
        }
    }
}

/* Eight float64 lanes by index mod 8, two in a vector. */
struct lanes {
    float64x2_t pair[4];
};

/* Adds the squares of four values to lanes 4 half .. 4 half + 3; exact products, so that FMA and
 * two roundings agree. */
static ALWAYS_INLINE void
add_squares(struct lanes *sum, const int half, float32x4_t x)
{
    const float64x2_t low = vcvt_f64_f32(vget_low_f32(x)), high = vcvt_high_f64_f32(x);
    sum->pair[2 * half] = vfmaq_f64(sum->pair[2 * half], low, low);
    sum->pair[2 * half + 1] = vfmaq_f64(sum->pair[2 * half + 1], high, high);
}

/* ((0+4)+(2+6)) + ((1+5)+(3+7)) */
static ALWAYS_INLINE double
sum_of_lanes(const struct lanes *sum)
{
    const float64x2_t two =
        vaddq_f64(vaddq_f64(sum->pair[0], sum->pair[2]), vaddq_f64(sum->pair[1], sum->pair[3]));
    return vgetq_lane_f64(two, 0) + vgetq_lane_f64(two, 1);
}

static ALWAYS_INLINE struct lanes
no_lanes(void)
{
    const float64x2_t zero = vdupq_n_f64(0.0);
    return (struct lanes){{zero, zero, zero, zero}};
}

/* What rounding x with a step loses. 0 loses nothing, so that missing elements add nothing. */
static ALWAYS_INLINE float32x4_t
error_of(float32x4_t x, const struct sq_step *s, float inv_scale)
{
    const float32x4_t code = vrndnq_f32(clamped(x, inv_scale, s->low, s->high));
    return vsubq_f32(x, vmulq_n_f32(code, s->scale));
}

static void
sq_quantize_errors__neon(const float *x, int64_t k, const struct sq_step *steps, int count,
                         double *errors)
{
    for (int c = 0; c < count; c++) {
        const struct sq_step step = steps[c];
        const float inv_scale = 1.0f / step.scale;
        struct lanes sum = no_lanes();
        int64_t i = 0;
        for (; i + 8 <= k; i += 8) {
            add_squares(&sum, 0, error_of(vld1q_f32(x + i), &step, inv_scale));
            add_squares(&sum, 1, error_of(vld1q_f32(x + i + 4), &step, inv_scale));
        }
        for (int half = 0; i < k; i += 4, half++) {
            const float32x4_t some = load_some(x + i, k - i, 0.0f);
            add_squares(&sum, half, error_of(some, &step, inv_scale));
        }
        errors[c] = sum_of_lanes(&sum);
    }
}

/* ---- rows ------------------------------------------------------------------------------- */

static void
sq_rms_norm_row__neon(const float *x, const float *weight, int64_t n, float eps, float *y)
{
    struct lanes sum = no_lanes();
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) {
        add_squares(&sum, 0, vld1q_f32(x + i));
        add_squares(&sum, 1, vld1q_f32(x + i + 4));
    }
    for (int half = 0; i < n; i += 4, half++) {
        add_squares(&sum, half, load_some(x + i, n - i, 0.0f));
    }
    const float inv_rms = (float)(1.0 / sqrt(sum_of_lanes(&sum) / (double)n + eps));
    for (i = 0; i + 4 <= n; i += 4) {
        const float32x4_t scaled = vmulq_n_f32(vld1q_f32(x + i), inv_rms);
        vst1q_f32(y + i, vmulq_f32(scaled, vld1q_f32(weight + i)));
    }
    for (; i < n; i++) {
        y[i] = x[i] * inv_rms * weight[i];
    }
}

const struct sq_kernels sq_kernels_neon = {
    .name = "neon",
    .steps = {"sdot neon", "sdot neon", "fma neon"},
    .required_features = SQ_CPU_NEON_DOT,
    .mr = MR,
    .nr = NR,
    .row_block_bytes = 1 << 18,
    .pack_panel = sq_pack_panel_8x16__neon,
    .gemm_a4w4 = sq_gemm_a8w4_f32_8x16__neon,
    .gemm_a8w4 = sq_gemm_a8w4_f32_8x16__neon,
    .gemm_a16w4 = sq_gemm_a16w4_f32_8x16__neon,
    .pack_panel_w8 = sq_pack_panel_w8_8x16__neon,
    .gemm_a8w8 = sq_gemm_a8w8_f32_8x16__neon,
    .gemm_a16w8 = sq_gemm_a16w8_f32_8x16__neon,
    .thin_block = THIN_BLOCK,
    .widen_panel = sq_widen_panel__neon,
    .gptq_columns = sq_gptq_columns__neon,
    .sylvester = sq_sylvester__neon,
    .sum_pairs = sq_sum_pairs__neon,
    .rotate_pairs = sq_rotate_pairs__neon,
    .gemm_f32 = sq_gemm_f32_8x16__neon,
    .extremes = sq_extremes__neon,
    .quantize_codes = sq_quantize_codes__neon,
    .quantize_errors = sq_quantize_errors__neon,
    .rms_norm_row = sq_rms_norm_row__neon,
};
