/* SPDX-License-Identifier: Apache-2.0 */
/* Packed int4 on x86: the panel order that all x86 tables share, and the tiles for one vector
 * width.
 *
 * A file defines these and then includes this one:
 *   TILE_BITS        256 or 512: the vectors
 *   TILE_MR          rows of a tile; with 2 vectors of sums a row they must fit the registers
 *   TILE_DOT(s,u,a)  s + the dot products of 4 unsigned by 4 signed bytes, 32-bit (vpdpbusd);
 *                    undefined: 16-bit sums of vpmaddubsw, widened before they can overflow
 *   TILE_GEMM        defined: gemm_f32 and gemm_half too
 * Legal: 256, 4, none (AVX2) | 256, 4 .. 6, VEX vpdpbusd (AVX-VNNI) | 512, 12, EVEX vpdpbusd.
 *
 * A panel is SUBS sub-panels of 16 outputs, each [k / 8][16] dwords; a dword holds 8 k of one
 * output, k 0..3 in the low nibbles of its bytes and k 4..7 in the high ones, all as code + 8. So
 * v & 0x0f.. and (v >> 4) & 0x0f.. are unsigned bytes in k order and the activation codes, signed,
 * are broadcast 4 k at a time as they stand. The + 8 is taken back once per group:
 * sum (w + 8) a - 8 sum a. */
#include <immintrin.h>
#include <string.h>

#include "core/sq_internal.h"
#include "kernels/sq_kernels.h"

enum {
    SUB = 16, /* outputs of a sub-panel */
    SUBS = 2, /* sub-panels of a panel */
    NR = SUB * SUBS,
    BLOCK_K = 8, /* k of a dword: two steps of 4 */
    SUB_BLOCK_BYTES = SUB * 4,
    LANES = TILE_BITS / 32, /* outputs of a vector */
    VECS_OF_SUB = SUB / LANES,
    VECS_MAX = TILE_BITS == 256 ? 4 : 2,  /* the whole panel */
    CHAINS_MAX = TILE_BITS == 256 ? 2 : 4 /* of one row's sub-panel */
};
_Static_assert(NR <= SQ_NR_MAX, "the tail panel's buffer");
_Static_assert(NR *SQ_K_ALIGN / 2 % SQ_ALIGN_BYTES == 0,
               "the panel behind 8-bit inputs is aligned");

#if TILE_BITS == 256
typedef __m256i vec_i;
typedef __m256 vec_f;
#define VEC(name) _mm256_##name
#define VEC_AND _mm256_and_si256
#define VEC_XOR _mm256_xor_si256
#define VEC_ZERO _mm256_setzero_si256
#define VEC_LOAD(p) _mm256_load_si256((const __m256i *)(p))
/* Integer sums may be reassociated by the compiler, which then keeps products instead of sums in
 * registers and spills (gcc 12: 1.5x slower). An empty instruction that may change x forbids it. */
#define KEEP_ORDER(x) __asm__("" : "+x"(x))
#else
typedef __m512i vec_i;
typedef __m512 vec_f;
#define VEC(name) _mm512_##name
#define VEC_AND _mm512_and_si512
#define VEC_XOR _mm512_xor_si512
#define VEC_ZERO _mm512_setzero_si512
#define VEC_LOAD(p) _mm512_load_si512(p)
#define KEEP_ORDER(x) __asm__("" : "+v"(x))
#endif

/* ---- panels ----------------------------------------------------------------------------- */

/* Vector v of a block that starts at w, sub-panels being sub_bytes apart. */
static ALWAYS_INLINE vec_i
load_block(const uint8_t *w, int64_t sub_bytes, int v)
{
    return VEC_LOAD(w + v / VECS_OF_SUB * sub_bytes + v % VECS_OF_SUB * (TILE_BITS / 8));
}

/* y [rows][LANES vecs] of sub-panel sub <- values, times a scale per row or not, or added to y. */
static ALWAYS_INLINE void
store_tile(const struct sq_panel_args *args, int64_t row, const int rows, const int vecs,
           int64_t sub, const float *row_scales, vec_f values[TILE_MR][VECS_MAX])
{
    UNROLL
    for (int r = 0; r < rows; r++) {
        UNROLL
        for (int v = 0; v < vecs; v++) {
            float *y = args->y + (row + r) * args->ld_y + sub * SUB + LANES * v;
            vec_f value = values[r][v];
            if (row_scales) {
                value = VEC(mul_ps)(VEC(set1_ps)(row_scales[row + r]), value);
            }
            VEC(storeu_ps)(y, args->accumulate ? VEC(add_ps)(VEC(loadu_ps)(y), value) : value);
        }
    }
}

/* Rows times as many sub-panels as two vectors hold; for one row TILE_row knows better. tile is
 * (args, row, rows, vecs, sub, ...). */
#define TILE_CASE(tile, rows, ...)                            \
    case rows:                                                \
        for (int64_t s = 0; s < SUBS; s += 2 * LANES / SUB) { \
            tile(args, row, rows, 2, s, ##__VA_ARGS__);       \
        }                                                     \
        break;
#define FOR_TILES(tile, ...)                               \
    for (int64_t row = 0; row < args->m; row += TILE_MR) { \
        switch (sq_min_i64(TILE_MR, args->m - row)) {      \
            case 1:                                        \
                tile##_row(args, row, ##__VA_ARGS__);      \
                break;                                     \
                TILE_CASES(tile, ##__VA_ARGS__)            \
        }                                                  \
    }
#define TILE_CASES_4(tile, ...)       \
    TILE_CASE(tile, 2, ##__VA_ARGS__) \
    TILE_CASE(tile, 3, ##__VA_ARGS__) \
    TILE_CASE(tile, 4, ##__VA_ARGS__)
#if TILE_MR == 4
#define TILE_CASES TILE_CASES_4
#elif TILE_MR == 6
#define TILE_CASES(tile, ...)         \
    TILE_CASES_4(tile, ##__VA_ARGS__) \
    TILE_CASE(tile, 5, ##__VA_ARGS__) \
    TILE_CASE(tile, 6, ##__VA_ARGS__)
#elif TILE_MR == 12
#define TILE_CASES(tile, ...)          \
    TILE_CASES_4(tile, ##__VA_ARGS__)  \
    TILE_CASE(tile, 5, ##__VA_ARGS__)  \
    TILE_CASE(tile, 6, ##__VA_ARGS__)  \
    TILE_CASE(tile, 7, ##__VA_ARGS__)  \
    TILE_CASE(tile, 8, ##__VA_ARGS__)  \
    TILE_CASE(tile, 9, ##__VA_ARGS__)  \
    TILE_CASE(tile, 10, ##__VA_ARGS__) \
    TILE_CASE(tile, 11, ##__VA_ARGS__) \
    TILE_CASE(tile, 12, ##__VA_ARGS__)
#else
#error "TILE_MR: expected 4, 6 or 12"
#endif

/* ---- int4 x codes ----------------------------------------------------------------------- */

#ifdef TILE_DOT
#define BLOCKS_A4 SQ_PACKED_K_MAX
#define BLOCKS_A8 SQ_PACKED_K_MAX
#define WIDEN(wide, acc) VEC(add_epi32)(wide, acc)
#else
/* Steps of vpmaddubsw whose pair sums fit a signed 16-bit lane.
 * 4-bit activations: a pair is at most 2 * 15 * 8 = 240 in absolute value; 32767 / 240 = 136.5.
 * 8-bit activations: at most 2 * 15 * 128 = 3840; 32767 / 3840 = 8.5. */
#define SQ_ACC16_MAX_STEPS_A4 136
#define SQ_ACC16_MAX_STEPS_A8 8
_Static_assert(SQ_ACC16_MAX_STEPS_A4 * 2 * 15 * 8 <= INT16_MAX &&
                   (SQ_ACC16_MAX_STEPS_A4 + 1) * 2 * 15 * 8 > INT16_MAX,
               "A4: 136 steps, not one more");
_Static_assert(SQ_ACC16_MAX_STEPS_A8 * 2 * 15 * 128 <= INT16_MAX &&
                   (SQ_ACC16_MAX_STEPS_A8 + 1) * 2 * 15 * 128 > INT16_MAX,
               "A8: 8 steps, not one more");
#define BLOCKS_A4 (SQ_ACC16_MAX_STEPS_A4 / 2)
#define BLOCKS_A8 (SQ_ACC16_MAX_STEPS_A8 / 2)
_Static_assert(BLOCKS_A8 *BLOCK_K == SQ_K_ALIGN, "A8 widens once per aligned block of k");
#define TILE_DOT(s, u, a) VEC(add_epi16)(s, VEC(maddubs_epi16)(u, a))
#define WIDEN(wide, acc) VEC(add_epi32)(wide, VEC(madd_epi16)(acc, VEC(set1_epi16)(1)))
#endif
/* The 32-bit sums hold all of k: 15 * 128 * 2^20 < 2^31. */
_Static_assert((int64_t)15 * 128 * SQ_PACKED_K_MAX <= INT32_MAX, "32-bit sums over all of k");

static ALWAYS_INLINE vec_i
broadcast_codes(const int8_t *a)
{
    int32_t four;
    memcpy(&four, a, sizeof four);
    return VEC(set1_epi32)(four);
}

/* acc += the products of one block of 8 k: low nibbles, then high ones. */
static ALWAYS_INLINE void
multiply_block(const int rows, const int vecs, const int8_t *a, int64_t ld_a, const uint8_t *w,
               int64_t sub_bytes, vec_i acc[TILE_MR][VECS_MAX])
{
    const vec_i nibble = VEC(set1_epi8)(15);
    UNROLL
    for (int half = 0; half < 2; half++) {
        vec_i codes[VECS_MAX];
        UNROLL
        for (int v = 0; v < vecs; v++) {
            const vec_i raw = load_block(w, sub_bytes, v);
            codes[v] = VEC_AND(half ? VEC(srli_epi16)(raw, 4) : raw, nibble);
        }
        UNROLL
        for (int r = 0; r < rows; r++) {
            const vec_i four = broadcast_codes(a + r * ld_a + half * 4);
            UNROLL
            for (int v = 0; v < vecs; v++) {
                acc[r][v] = TILE_DOT(acc[r][v], codes[v], four);
                KEEP_ORDER(acc[r][v]);
            }
        }
    }
}

/* out <- the products of `blocks` blocks for a whole tile, at least CALL_BLOCKS. Not inlined:
 * beside what its caller keeps in registers, gcc 12 spills the loop's own sums (a fifth slower). */
enum { CALL_BLOCKS = 16 };
static __attribute__((noinline)) void
sum_blocks(const int8_t *a, int64_t ld_a, const uint8_t *w, int64_t sub_bytes, int64_t blocks,
           vec_i out[TILE_MR][VECS_MAX])
{
    vec_i acc[TILE_MR][VECS_MAX];
    UNROLL
    for (int r = 0; r < TILE_MR; r++) {
        UNROLL
        for (int v = 0; v < 2; v++) {
            acc[r][v] = VEC_ZERO();
        }
    }
    for (int64_t b = 0; b < blocks; b++) {
        multiply_block(TILE_MR, 2, a, ld_a, w, sub_bytes, acc);
        a += BLOCK_K;
        w += SUB_BLOCK_BYTES;
    }
    UNROLL
    for (int r = 0; r < TILE_MR; r++) {
        UNROLL
        for (int v = 0; v < 2; v++) {
            out[r][v] = acc[r][v];
        }
    }
}

/* acc[c] = the sums of every chains-th block of k from the c-th on; a block left over goes to the
 * first of them. a and w move on by what was read. */
static ALWAYS_INLINE void
sum_chains(const int rows, const int vecs, const int chains, const int8_t **a, int64_t ld_a,
           const uint8_t **w, int64_t sub_bytes, int64_t blocks,
           vec_i acc[CHAINS_MAX][TILE_MR][VECS_MAX])
{
    UNROLL
    for (int c = 0; c < chains; c++) {
        UNROLL
        for (int r = 0; r < rows; r++) {
            UNROLL
            for (int v = 0; v < vecs; v++) {
                acc[c][r][v] = VEC_ZERO();
            }
        }
    }
    int64_t b = 0;
    for (; b + chains <= blocks; b += chains) {
        UNROLL
        for (int c = 0; c < chains; c++) {
            multiply_block(rows, vecs, *a, ld_a, *w, sub_bytes, acc[c]);
            *a += BLOCK_K;
            *w += SUB_BLOCK_BYTES;
        }
    }
    for (; b < blocks; b++) {
        multiply_block(rows, vecs, *a, ld_a, *w, sub_bytes, acc[0]);
        *a += BLOCK_K;
        *w += SUB_BLOCK_BYTES;
    }
}

/* One tile of rows x (LANES vecs) outputs. chains: sums that take the blocks of k in turn. More
 * chains than two are for 32-bit sums. blocks_max is the number of blocks of a chain between two
 * widenings. */
static ALWAYS_INLINE void
tile_chains(const struct sq_panel_args *args, int64_t row, const int rows, const int vecs,
            int64_t sub, const int chains, const int blocks_max)
{
    const int64_t sub_bytes = args->k / BLOCK_K * SUB_BLOCK_BYTES;
    const uint8_t *w = args->panel + sub * sub_bytes;
    const int8_t *a = (const int8_t *)args->a + row * args->ld_a;
    vec_f total[TILE_MR][VECS_MAX];
    UNROLL
    for (int r = 0; r < rows; r++) {
        UNROLL
        for (int v = 0; v < vecs; v++) {
            total[r][v] = VEC(setzero_ps)();
        }
    }
    for (int64_t begin = 0; begin < args->k; begin += args->g) {
        vec_i wide[TILE_MR][VECS_MAX];
        UNROLL
        for (int r = 0; r < rows; r++) {
            const int32_t *sums = args->a_sums + (row + r) * args->ld_sums + begin / SQ_K_ALIGN;
            const vec_i offset = VEC(set1_epi32)(-8 * (sums[args->g / SQ_K_ALIGN] - sums[0]));
            UNROLL
            for (int v = 0; v < vecs; v++) {
                wide[r][v] = offset;
            }
        }
        for (int64_t left = args->g / BLOCK_K; left > 0;) {
            const int64_t blocks = sq_min_i64(left, (int64_t)chains * blocks_max);
            vec_i acc[CHAINS_MAX][TILE_MR][VECS_MAX];
            if (rows == TILE_MR && blocks_max > BLOCKS_A8 && blocks >= CALL_BLOCKS) {
                sum_blocks(a, args->ld_a, w, sub_bytes, blocks, acc[0]);
                a += blocks * BLOCK_K;
                w += blocks * SUB_BLOCK_BYTES;
            }
            else {
                sum_chains(rows, vecs, chains, &a, args->ld_a, &w, sub_bytes, blocks, acc);
            }
            UNROLL
            for (int c = 0; c < chains; c++) {
                UNROLL
                for (int r = 0; r < rows; r++) {
                    UNROLL
                    for (int v = 0; v < vecs; v++) {
                        wide[r][v] = WIDEN(wide[r][v], acc[c][r][v]);
                    }
                }
            }
            left -= blocks;
        }
        const float *scales = args->w_scales + begin / args->g * NR + sub * SUB;
        UNROLL
        for (int r = 0; r < rows; r++) {
            UNROLL
            for (int v = 0; v < vecs; v++) {
                const vec_f sum = VEC(cvtepi32_ps)(wide[r][v]);
                total[r][v] =
                    VEC(add_ps)(total[r][v], VEC(mul_ps)(VEC(loadu_ps)(scales + LANES * v), sum));
            }
        }
    }
    store_tile(args, row, rows, vecs, sub, args->a_scales, total);
}

static ALWAYS_INLINE void
tile_codes(const struct sq_panel_args *args, int64_t row, const int rows, const int vecs,
           int64_t sub, const int blocks_max)
{
    tile_chains(args, row, rows, vecs, sub, 1, blocks_max);
}

/* One row is bound by reading weights: sub-panel after sub-panel, so that they are one stream from
 * the first panel to the last, with enough chains to hide the latency of their sums. */
static ALWAYS_INLINE void
tile_codes_row(const struct sq_panel_args *args, int64_t row, const int blocks_max)
{
    for (int64_t s = 0; s < SUBS; s++) {
        tile_chains(args, row, 1, VECS_OF_SUB, s, CHAINS_MAX, blocks_max);
    }
}

/* ---- int4 x float32 --------------------------------------------------------------------- */

/* acc += the products of k number j of a block: nibble position 8 (j % 4) + 4 (j / 4). With code +
 * 8 XORed by 8 the nibble is two's complement, and two shifts extend its sign. */
static ALWAYS_INLINE void
multiply_value(const int rows, const int vecs, const int j, const float *a, int64_t ld_a,
               const vec_i raw[VECS_MAX], vec_f acc[TILE_MR][VECS_MAX])
{
    const int position = 8 * (j % 4) + 4 * (j / 4);
    vec_f weight[VECS_MAX];
    UNROLL
    for (int v = 0; v < vecs; v++) {
        const vec_i code = VEC(srai_epi32)(VEC(slli_epi32)(raw[v], 28 - position), 28);
        weight[v] = VEC(cvtepi32_ps)(code);
    }
    UNROLL
    for (int r = 0; r < rows; r++) {
        const vec_f value = VEC(set1_ps)(a[r * ld_a + j]);
        UNROLL
        for (int v = 0; v < vecs; v++) {
            acc[r][v] = VEC(fmadd_ps)(value, weight[v], acc[r][v]);
        }
    }
}

static ALWAYS_INLINE void
tile_values(const struct sq_panel_args *args, int64_t row, const int rows, const int vecs,
            int64_t sub)
{
    const int64_t sub_bytes = args->k / BLOCK_K * SUB_BLOCK_BYTES;
    const vec_i sign = VEC(set1_epi8)((char)0x88);
    const uint8_t *w = args->panel + sub * sub_bytes;
    const float *a = (const float *)args->a + row * args->ld_a;
    vec_f total[TILE_MR][VECS_MAX];
    UNROLL
    for (int r = 0; r < rows; r++) {
        UNROLL
        for (int v = 0; v < vecs; v++) {
            total[r][v] = VEC(setzero_ps)();
        }
    }
    for (int64_t begin = 0; begin < args->k; begin += args->g) {
        vec_f acc[TILE_MR][VECS_MAX];
        UNROLL
        for (int r = 0; r < rows; r++) {
            UNROLL
            for (int v = 0; v < vecs; v++) {
                acc[r][v] = VEC(setzero_ps)();
            }
        }
        for (int64_t k = 0; k < args->g; k += BLOCK_K) {
            vec_i raw[VECS_MAX];
            UNROLL
            for (int v = 0; v < vecs; v++) {
                raw[v] = VEC_XOR(load_block(w, sub_bytes, v), sign);
            }
            UNROLL
            for (int j = 0; j < BLOCK_K; j++) {
                multiply_value(rows, vecs, j, a, args->ld_a, raw, acc);
            }
            a += BLOCK_K;
            w += SUB_BLOCK_BYTES;
        }
        const float *scales = args->w_scales + begin / args->g * NR + sub * SUB;
        UNROLL
        for (int r = 0; r < rows; r++) {
            UNROLL
            for (int v = 0; v < vecs; v++) {
                total[r][v] = VEC(add_ps)(
                    total[r][v], VEC(mul_ps)(VEC(loadu_ps)(scales + LANES * v), acc[r][v]));
            }
        }
    }
    store_tile(args, row, rows, vecs, sub, NULL, total);
}

/* One row takes the whole panel at once: a chain over k cannot be cut, so there must be many. */
static ALWAYS_INLINE void
tile_values_row(const struct sq_panel_args *args, int64_t row)
{
    tile_values(args, row, 1, VECS_MAX, 0);
}

#ifdef TILE_GEMM
#include "kernels/kernels_x86_gemm_template.h"
#endif
