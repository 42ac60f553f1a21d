/* SPDX-License-Identifier: Apache-2.0 */
/* Packed weights on x86: the panel order that all x86 tables share, and the tiles for one vector
 * width.
 *
 * A file defines these and then includes this one:
 *   TILE_BITS        256 or 512: the vectors
 *   TILE_MR          rows of a tile; with 2 vectors of sums a row they must fit the registers
 *   TILE_DOT(s,u,a)  s + the dot products of 4 unsigned by 4 signed bytes, 32-bit (vpdpbusd);
 *                    undefined: 16-bit sums of vpmaddubsw, widened before they can overflow
 *   TILE_DOT_256     the same, for tiles of 256 bits that have TILE_DOT
 *   TILE_GEMM        defined: gemm_f32 and gemm_half too
 * Legal: 256, 4, none (AVX2) | 256, 4 .. 6, VEX vpdpbusd (AVX-VNNI) | 512, 12, EVEX vpdpbusd.
 *
 * A panel of 4 bits is SUBS sub-panels of 16 outputs, each [k / 8][16] dwords; a dword holds 8 k of
 * one output, k 0..3 in the low nibbles of its bytes and k 4..7 in the high ones, all as code + 8.
 * So v & 0x0f.. and (v >> 4) & 0x0f.. are unsigned bytes in k order and the activation codes,
 * signed, are broadcast 4 k at a time as they stand. The + 8 is taken back once per group:
 * sum (w + 8) a - 8 sum a. A panel of 8 bits has those bytes, as code + 128, in the same order:
 * sub-panels of [k / 4][16] dwords. Of 5 and 6 bits it is that panel made thin (thin_panels.h): 32
 * k of a sub-panel are a block there, whose 8 vectors of 4 k each come out of few vectors by
 * shifts. The functions below that take `bits` are inlined with any of these.
 */
#include <immintrin.h>
#include <string.h>

#include "core/sq_internal.h"
#include "kernels/sq_kernels.h"
#include "kernels/thin_panels.h"

enum {
    SUB = 16, /* outputs of a sub-panel */
    SUBS = 2, /* sub-panels of a panel */
    NR = SUB * SUBS,
    BLOCK_K = 8,                   /* k of a dword: two steps of 4 */
    THIN_BLOCK = SUB * SQ_K_ALIGN, /* of a thin panel */
    SUB_BLOCK_BYTES = SUB * 4,     /* with 4 bits */
    LANES = TILE_BITS / 32,        /* outputs of a vector */
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
#define VEC_OR _mm256_or_si256
#define VEC_XOR _mm256_xor_si256
#define VEC_ZERO _mm256_setzero_si256
#define VEC_AS_FLOAT _mm256_castsi256_ps
#define VEC_LOAD(p) _mm256_load_si256((const __m256i *)(p))
#define VEC_STORE(p, x) _mm256_store_si256((__m256i *)(void *)(p), x)
/* Integer sums may be reassociated by the compiler, which then keeps products instead of sums in
 * registers and spills (gcc 12: 1.5x slower). An empty instruction that may change x forbids it. */
#define KEEP_ORDER(x) __asm__("" : "+x"(x))
#else
typedef __m512i vec_i;
typedef __m512 vec_f;
#define VEC(name) _mm512_##name
#define VEC_AND _mm512_and_si512
#define VEC_OR _mm512_or_si512
#define VEC_XOR _mm512_xor_si512
#define VEC_ZERO _mm512_setzero_si512
#define VEC_AS_FLOAT _mm512_castsi512_ps
#define VEC_LOAD(p) _mm512_load_si512(p)
#define VEC_STORE(p, x) _mm512_store_si512(p, x)
#define KEEP_ORDER(x) __asm__("" : "+v"(x))
#endif

/* ---- panels ----------------------------------------------------------------------------- */

/* Vector v of a block that starts at w, sub-panels being sub_bytes apart. */
static ALWAYS_INLINE vec_i
load_block(const uint8_t *w, int64_t sub_bytes, int v)
{
    return VEC_LOAD(w + v / VECS_OF_SUB * sub_bytes + v % VECS_OF_SUB * (TILE_BITS / 8));
}

/* y [LANES] of a row from column on <- value, times the row's scale or not, or added to y. */
static ALWAYS_INLINE void
store_vector(const struct sq_panel_args *args, int64_t row, int64_t column, const float *row_scales,
             vec_f value)
{
    float *y = args->y + row * args->ld_y + column;
    if (row_scales) {
        value = VEC(mul_ps)(VEC(set1_ps)(row_scales[row]), value);
    }
    VEC(storeu_ps)(y, args->accumulate ? VEC(add_ps)(VEC(loadu_ps)(y), value) : value);
}

/* Asks for the lines of a tile's row, which two vectors are. */
static ALWAYS_INLINE void
ask_to_write(const float *y)
{
    __asm__ volatile("prefetchw %0" : : "m"(*y));
    __asm__ volatile("prefetchw %0" : : "m"(y[LANES]));
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

/* ---- weights x codes -------------------------------------------------------------------- */

#ifdef TILE_DOT
#define TILE_DOT8 TILE_DOT
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
/* The 32-bit sums hold all of k: 15 * 128 * 2^20 < 2^31, 255 * 128 * 2^16 < 2^31. */
_Static_assert((int64_t)15 * 128 * SQ_PACKED_K_MAX <= INT32_MAX, "32-bit sums over all of k");
_Static_assert((int64_t)255 * 128 * SQ_PACKED_K_MAX_W8 <= INT32_MAX, "and of 8-bit weights");
#define BLOCKS_W8 SQ_PACKED_K_MAX_W8

/* In place of `bits`: codes of 5 or 6 bits, each in a byte. */
#define IN_BYTES(bits) (8 + (bits))
#define CODE_BITS(bits) ((bits) > 8 ? (bits)-8 : (bits))
/* Bytes of a block of 8 k of a sub-panel. */
#define BLOCK_BYTES(bits) (SUB * ((bits) > 8 ? 8 : (bits)))
/* What was added to the codes. */
#define CODE_OFFSET(bits) (1 << (CODE_BITS(bits) - 1))
#define IS_THIN(bits) ((bits) == 5 || (bits) == 6)
/* Whether they have 5 or 6 bits, thin or in bytes. */
#define IS_NARROW(bits) IS_THIN(CODE_BITS(bits))

static ALWAYS_INLINE vec_i
broadcast_codes(const int8_t *a)
{
    int32_t four;
    memcpy(&four, a, sizeof four);
    return VEC(set1_epi32)(four);
}

/* Bytes of 4 k, half 0 or 1 of the block at w: unsigned, in k order. */
static ALWAYS_INLINE vec_i
load_codes(const uint8_t *w, int64_t sub_bytes, int v, const int half, const int bits)
{
    if (bits == 8) {
        return load_block(w + half * SUB * 4, sub_bytes, v);
    }
    const vec_i raw = load_block(w, sub_bytes, v);
    return VEC_AND(half ? VEC(srli_epi16)(raw, 4) : raw, VEC(set1_epi8)(15));
}

/* Rows of codes: the first of every three rows. The other two are one and two strides behind it,
 * which an address can say without a register more. */
enum { THREES = (TILE_MR + 2) / 3 };
struct code_rows {
    const int8_t *first[THREES];
    int64_t ld;
};

static ALWAYS_INLINE struct code_rows
code_rows_at(const int8_t *first, int64_t ld, const int rows)
{
    struct code_rows a = {.ld = ld};
    UNROLL
    for (int i = 0; i < (rows + 2) / 3; i++) {
        a.first[i] = first + 3 * i * ld;
        __asm__("" : "+r"(a.first[i])); /* else the optimizer finds a register for every row */
    }
    return a;
}

static ALWAYS_INLINE struct code_rows
code_rows(const struct sq_panel_args *args, int64_t row, const int rows)
{
    return code_rows_at((const int8_t *)args->a + row * args->ld_a, args->ld_a, rows);
}

static ALWAYS_INLINE void
advance(struct code_rows *a, const int rows, const int blocks)
{
    UNROLL
    for (int i = 0; i < (rows + 2) / 3; i++) {
        a->first[i] += blocks * BLOCK_K;
    }
}

/* Codes 4 step .. 4 step + 3 of row r, in every dword. */
static ALWAYS_INLINE vec_i
broadcast_row(const struct code_rows *a, const int r, const int step)
{
    return broadcast_codes(a->first[r / 3] + r % 3 * a->ld + step * 4);
}

#ifdef TILE_DOT8
/* acc += 4 k of `rows` rows, number `step` from where a stands; codes are the weights'. */
static ALWAYS_INLINE void
multiply_bytes(const int rows, const int vecs, const struct code_rows *a, const int step,
               const vec_i codes[VECS_MAX], vec_i acc[TILE_MR][VECS_MAX])
{
    UNROLL
    for (int r = 0; r < rows; r++) {
        const vec_i four = broadcast_row(a, r, step);
        UNROLL
        for (int v = 0; v < vecs; v++) {
            acc[r][v] = TILE_DOT8(acc[r][v], codes[v], four);
            KEEP_ORDER(acc[r][v]);
        }
    }
}
#else
/* The same where a pair of 8-bit products exceeds 16 bits: bytes 0, 2 and 1, 3 of each dword are
 * widened, the weights' with zeros and the activations' with their sign; a pair of those products
 * is at most 2 * 255 * 128 < 2^31. */
static ALWAYS_INLINE void
multiply_bytes(const int rows, const int vecs, const struct code_rows *a, const int step,
               const vec_i codes[VECS_MAX], vec_i acc[TILE_MR][VECS_MAX])
{
    UNROLL
    for (int odd = 0; odd < 2; odd++) {
        vec_i pair[VECS_MAX];
        UNROLL
        for (int v = 0; v < vecs; v++) {
            pair[v] = odd ? VEC(srli_epi16)(codes[v], 8) : VEC_AND(codes[v], VEC(set1_epi16)(255));
        }
        UNROLL
        for (int r = 0; r < rows; r++) {
            const vec_i four = broadcast_row(a, r, step);
            const vec_i two = VEC(srai_epi16)(odd ? four : VEC(slli_epi16)(four, 8), 8);
            UNROLL
            for (int v = 0; v < vecs; v++) {
                acc[r][v] = VEC(add_epi32)(acc[r][v], VEC(madd_epi16)(pair[v], two));
                KEEP_ORDER(acc[r][v]);
            }
        }
    }
}
#endif

/* acc += the products of one block of 8 k, number `block` of a and the one at w: of 4 bits the low
 * nibbles, then the high ones. */
static ALWAYS_INLINE void
multiply_block(const int rows, const int vecs, const struct code_rows *a, const int block,
               const uint8_t *w, int64_t sub_bytes, const int bits, vec_i acc[TILE_MR][VECS_MAX])
{
    UNROLL
    for (int half = 0; half < 2; half++) {
        vec_i codes[VECS_MAX];
        UNROLL
        for (int v = 0; v < vecs; v++) {
            codes[v] = load_codes(w, sub_bytes, v, half, bits);
        }
        if (bits == 8) {
            multiply_bytes(rows, vecs, a, 2 * block + half, codes, acc);
            continue;
        }
        UNROLL
        for (int r = 0; r < rows; r++) {
            const vec_i four = broadcast_row(a, r, 2 * block + half);
            UNROLL
            for (int v = 0; v < vecs; v++) {
                acc[r][v] = TILE_DOT(acc[r][v], codes[v], four);
                KEEP_ORDER(acc[r][v]);
            }
        }
    }
}

/* The 16-bit lanes of x, `up` bits higher, or lower where it is below 0. */
static ALWAYS_INLINE vec_i
shifted(vec_i x, const int up)
{
    return up > 0   ? VEC(slli_epi16)(x, up > 0 ? up : 0)
           : up < 0 ? VEC(srli_epi16)(x, up < 0 ? -up : 0)
                    : x;
}

/* Bytes of 4 k, number step of the run at w of a thin panel: vector `step` of the block that
 * thin_panels.h describes. */
static ALWAYS_INLINE vec_i
load_thin(const uint8_t *w, int64_t sub_bytes, int v, const int step, const int bits)
{
    enum { LINE = SUB * 4, LOW_LINES = SQ_K_ALIGN / 4 / 2 };
    const int lines = bits - 4, shift = 4 - step / lines * lines; /* of the upper bits */
    const vec_i low = load_block(w + step % LOW_LINES * LINE, sub_bytes, v);
    const vec_i high = load_block(w + (LOW_LINES + step % lines) * LINE, sub_bytes, v);
    return VEC_OR(VEC_AND(step / LOW_LINES ? VEC(srli_epi16)(low, 4) : low, VEC(set1_epi8)(15)),
                  VEC_AND(shifted(high, shift), VEC(set1_epi8)((1 << bits) - 16)));
}

/* acc += 8 k, codes of steps first and first + 1 of a. is_narrow: they have 6 bits at most, so that
 * sums of 16 bits hold two steps: 4 * 63 * 128 < 2^15. */
static ALWAYS_INLINE void
multiply_steps(const int rows, const int vecs, const struct code_rows *a, const int first,
               vec_i codes[2][VECS_MAX], const int is_narrow, vec_i acc[TILE_MR][VECS_MAX])
{
#ifdef TILE_DOT8
    const int in_bytes = 1;
    (void)is_narrow;
#else
    const int in_bytes = !is_narrow;
#endif
    UNROLL
    for (int i = 0; in_bytes && i < 2; i++) {
        multiply_bytes(rows, vecs, a, first + i, codes[i], acc);
    }
#ifndef TILE_DOT8
    UNROLL
    for (int r = 0; is_narrow && r < rows; r++) {
        const vec_i one = broadcast_row(a, r, first), two = broadcast_row(a, r, first + 1);
        UNROLL
        for (int v = 0; v < vecs; v++) {
            const vec_i sum = VEC(maddubs_epi16)(codes[0][v], one);
            acc[r][v] = WIDEN(acc[r][v], TILE_DOT(sum, codes[1][v], two));
            KEEP_ORDER(acc[r][v]);
        }
    }
#endif
}

/* acc += 8 k, steps 2 pair and 2 pair + 1 of the run at w and of a: codes of 5 or 6 bits, thin or
 * in bytes. */
static ALWAYS_INLINE void
multiply_pair(const int rows, const int vecs, const struct code_rows *a, const int pair,
              const uint8_t *w, int64_t sub_bytes, const int bits, vec_i acc[TILE_MR][VECS_MAX])
{
    vec_i codes[2][VECS_MAX];
    UNROLL
    for (int i = 0; i < 2; i++) {
        const int step = 2 * pair + i;
        UNROLL
        for (int v = 0; v < vecs; v++) {
            codes[i][v] = IS_THIN(bits) ? load_thin(w, sub_bytes, v, step, bits)
                                        : load_block(w + step * SUB * 4, sub_bytes, v);
        }
    }
    multiply_steps(rows, vecs, a, 2 * pair, codes, 1, acc);
}

/* Blocks that sums take without a branch. Groups, k and pieces are multiples of it. */
enum { RUN_BLOCKS = SQ_K_ALIGN / BLOCK_K };

/* acc += the products of one run, where a and w stand. */
static ALWAYS_INLINE void
multiply_run(const int rows, const int vecs, const struct code_rows *a, const uint8_t *w,
             int64_t sub_bytes, const int bits, vec_i acc[TILE_MR][VECS_MAX])
{
    UNROLL
    for (int i = 0; i < RUN_BLOCKS; i++) {
        if (IS_NARROW(bits)) {
            multiply_pair(rows, vecs, a, i, w, sub_bytes, bits, acc);
        }
        else {
            multiply_block(rows, vecs, a, i, w + i * BLOCK_BYTES(bits), sub_bytes, bits, acc);
        }
    }
}

/* Whether sums of 4-bit weights are of 16 bits. */
#ifdef TILE_DOT8
#define NARROW_SUMS(bits) 0
#else
#define NARROW_SUMS(bits) ((bits) == 4)
#endif

/* Groups whose offsets are computed at once. */
enum { OFFSET_GROUPS = 64 };

/* offset [r][i]: what the sums of row r's group number i from input `begin` on start at. It takes
 * back what was added to the weights' codes. */
static ALWAYS_INLINE void
fill_offsets(const struct sq_panel_args *args, int64_t row, const int rows, int64_t begin,
             const int bits, int32_t offset[TILE_MR][OFFSET_GROUPS])
{
    const int64_t count = sq_min_i64(OFFSET_GROUPS, (args->k - begin) / args->g);
    const int64_t step = args->g / SQ_K_ALIGN;
    for (int64_t r = 0; r < rows; r++) {
        const int32_t *sums = args->a_sums + (row + r) * args->ld_sums + begin / SQ_K_ALIGN;
        if (step == 1) { /* in vectors */
            for (int64_t i = 0; i < count; i++) {
                offset[r][i] = CODE_OFFSET(bits) * (sums[i] - sums[i + 1]);
            }
        }
        else {
            for (int64_t i = 0; i < count; i++) {
                offset[r][i] = CODE_OFFSET(bits) * (sums[i * step] - sums[(i + 1) * step]);
            }
        }
    }
}

/* total + scale * sum. */
static ALWAYS_INLINE vec_f
add_scaled(vec_f total, vec_f scale, vec_i sum)
{
    return VEC(add_ps)(total, VEC(mul_ps)(scale, VEC(cvtepi32_ps)(sum)));
}

/* What a tile keeps in memory, where it costs loads and stores and no registers. */
struct tile_memory {
    vec_f total[TILE_MR][2]; /* of the groups so far */
    vec_i wide[TILE_MR][2];  /* of the group so far, where sums are of 16 bits */
    int32_t offset[TILE_MR][OFFSET_GROUPS];
    int asks;            /* memory for what comes in the panel, as the first to read it */
    struct sq_asks next; /* the tile's share of args->next */
};

static ALWAYS_INLINE struct sq_asks
share_of_next(const struct sq_panel_args *args, int64_t row, int64_t sub)
{
    const int64_t tiles = sq_ceil_div(args->m, TILE_MR) * SUBS, runs = args->k / SQ_K_ALIGN;
    const int64_t share = 2 * LANES / SUB * args->next_bytes / tiles;
    const int64_t begin = (row / TILE_MR * SUBS + sub) * args->next_bytes / tiles;
    return (struct sq_asks){args->next, begin, begin, sq_ceil_div(share, runs)};
}

/* The products of `blocks` blocks from *a and *w on, which move on. They are added to the tile's
 * sums of its group, which are new when `first`, and at the `last` they go to its totals. */
static ALWAYS_INLINE void
sum_piece(const int rows, struct code_rows *a, const uint8_t **w, int64_t sub_bytes, int64_t blocks,
          const int bits, int first, int last, const float *scales, const int32_t *offset,
          struct tile_memory *tile)
{
    vec_i acc[TILE_MR][VECS_MAX];
    UNROLL
    for (int r = 0; r < rows; r++) {
        UNROLL
        for (int v = 0; v < 2; v++) {
            acc[r][v] = NARROW_SUMS(bits) ? VEC_ZERO() : VEC(set1_epi32)(offset[r * OFFSET_GROUPS]);
        }
    }
    const int subs = tile->asks ? 2 * LANES / SUB : 0;
    for (int64_t b = 0; b < blocks; b += RUN_BLOCKS) {
        for (int v = 0; v < subs; v++) {
            ask_lines(*w + v * sub_bytes + SQ_PANEL_AHEAD, RUN_BLOCKS * BLOCK_BYTES(bits));
        }
        if (tile->next.step) {
            ask_more(&tile->next);
        }
        multiply_run(rows, 2, a, *w, sub_bytes, bits, acc);
        advance(a, rows, RUN_BLOCKS);
        *w += RUN_BLOCKS * BLOCK_BYTES(bits);
    }
    UNROLL
    for (int v = 0; v < 2; v++) {
        const vec_f scale = VEC(loadu_ps)(scales + LANES * v);
        UNROLL
        for (int r = 0; r < rows; r++) {
            vec_i sum = acc[r][v];
            if (NARROW_SUMS(bits)) {
                sum = WIDEN(first ? VEC(set1_epi32)(offset[r * OFFSET_GROUPS]) : tile->wide[r][v],
                            sum);
                if (!last) {
                    tile->wide[r][v] = sum;
                    continue;
                }
            }
            tile->total[r][v] = add_scaled(tile->total[r][v], scale, sum);
        }
    }
}

/* One group of a tile. */
static ALWAYS_INLINE void
sum_group(const struct sq_panel_args *args, const int rows, struct code_rows *a, const uint8_t **w,
          const int bits, int64_t blocks, int64_t blocks_max, const float *scales,
          const int32_t *offset, struct tile_memory *tile)
{
    const int64_t sub_bytes = args->k / BLOCK_K * BLOCK_BYTES(bits);
    if (!NARROW_SUMS(bits) || blocks <= blocks_max) {
        sum_piece(rows, a, w, sub_bytes, blocks, bits, 1, 1, scales, offset, tile);
        return;
    }
    for (int64_t done = 0; done < blocks; done += blocks_max) {
        const int64_t piece = sq_min_i64(blocks - done, blocks_max);
        sum_piece(rows, a, w, sub_bytes, piece, bits, done == 0, done + piece == blocks, scales,
                  offset, tile);
    }
}

/* Rows x two vectors of outputs from sub-panel sub on. blocks_max: blocks that sums of 16 bits
 * hold. */
static ALWAYS_INLINE void
tile_body(const struct sq_panel_args *args, int64_t row, const int rows, int64_t sub,
          const int bits, int64_t blocks, int64_t blocks_max)
{
    const int64_t sub_bytes = args->k / BLOCK_K * BLOCK_BYTES(bits);
    const uint8_t *w = args->panel + sub * sub_bytes;
    const float *scales = args->w_scales + sub * SUB;
    struct code_rows a = code_rows(args, row, rows);
    struct tile_memory memory, *tile = &memory;
    tile->asks = row == 0 && !args->next_bytes;
    tile->next = share_of_next(args, row, sub);
    UNROLL
    for (int r = 0; r < rows; r++) {
        ask_to_write(args->y + (row + r) * args->ld_y + sub * SUB);
        tile->total[r][0] = tile->total[r][1] = VEC(setzero_ps)();
    }
    int64_t number = 0;
    for (int64_t begin = 0; begin < args->k; begin += args->g) {
        if (number % OFFSET_GROUPS == 0) {
            fill_offsets(args, row, rows, begin, bits, tile->offset);
        }
        __asm__ volatile("" : "+r"(tile) : : "memory"); /* else totals take the sums' registers */
        sum_group(args, rows, &a, &w, bits, blocks, blocks_max, scales,
                  tile->offset[0] + number % OFFSET_GROUPS, tile);
        scales += NR;
        number++;
    }
    UNROLL
    for (int r = 0; r < rows; r++) {
        UNROLL
        for (int v = 0; v < 2; v++) {
            store_vector(args, row + r, sub * SUB + LANES * v, args->a_scales, tile->total[r][v]);
        }
    }
}

/* Whole tiles are functions of their own: beside the others, gcc 12 spills the sums of the
 * innermost loop. Where a group is one or two runs, no branch depends on its length. */
#define WHOLE_TILE(name, bits, blocks)                                                        \
    static __attribute__((noinline)) void name(const struct sq_panel_args *args, int64_t row, \
                                               int64_t sub, int64_t blocks_max)               \
    {                                                                                         \
        tile_body(args, row, TILE_MR, sub, bits, blocks, blocks_max);                         \
    }
WHOLE_TILE(whole_tile_4, 4, args->g / BLOCK_K)
WHOLE_TILE(whole_tile_4_g32, 4, RUN_BLOCKS)
WHOLE_TILE(whole_tile_4_g64, 4, 2 * RUN_BLOCKS)
WHOLE_TILE(whole_tile_5, 5, args->g / BLOCK_K)
WHOLE_TILE(whole_tile_6, 6, args->g / BLOCK_K)
WHOLE_TILE(whole_tile_8, 8, args->g / BLOCK_K)
#ifndef TILE_DOT8
WHOLE_TILE(whole_tile_5_in_bytes, IN_BYTES(5), args->g / BLOCK_K)
WHOLE_TILE(whole_tile_6_in_bytes, IN_BYTES(6), args->g / BLOCK_K)
#endif

/* Rows x two vectors (vecs, which FOR_TILES names, is 2). */
static ALWAYS_INLINE void
tile_codes(const struct sq_panel_args *args, int64_t row, const int rows, const int vecs,
           int64_t sub, const int bits, const int blocks_max)
{
    (void)vecs;
    const int64_t blocks = args->g / BLOCK_K;
    if (rows < TILE_MR) {
        tile_body(args, row, rows, sub, bits, blocks, blocks_max);
    }
#ifndef TILE_DOT8
    else if (bits == IN_BYTES(5)) {
        whole_tile_5_in_bytes(args, row, sub, blocks_max);
    }
    else if (bits == IN_BYTES(6)) {
        whole_tile_6_in_bytes(args, row, sub, blocks_max);
    }
#endif
    else if (bits == 8) {
        whole_tile_8(args, row, sub, blocks_max);
    }
    else if (bits == 6) {
        whole_tile_6(args, row, sub, blocks_max);
    }
    else if (bits == 5) {
        whole_tile_5(args, row, sub, blocks_max);
    }
    else if (blocks == RUN_BLOCKS) {
        whole_tile_4_g32(args, row, sub, blocks_max);
    }
    else if (blocks == 2 * RUN_BLOCKS) {
        whole_tile_4_g64(args, row, sub, blocks_max);
    }
    else {
        whole_tile_4(args, row, sub, blocks_max);
    }
}

/* wide += the products of `blocks` blocks of one row, in so many chains. */
static ALWAYS_INLINE void
sum_chains(const int chains, struct code_rows *a, const uint8_t **w, int64_t sub_bytes,
           int64_t blocks, const int bits, vec_i wide[VECS_OF_SUB])
{
    vec_i acc[CHAINS_MAX][TILE_MR][VECS_MAX];
    UNROLL
    for (int c = 0; c < chains; c++) {
        UNROLL
        for (int v = 0; v < VECS_OF_SUB; v++) {
            acc[c][0][v] = VEC_ZERO();
        }
    }
    int64_t b = 0;
    for (; IS_NARROW(bits) && b < blocks; b += RUN_BLOCKS) {
        ask_lines(*w + SQ_PANEL_AHEAD, RUN_BLOCKS * BLOCK_BYTES(bits));
        UNROLL
        for (int i = 0; i < RUN_BLOCKS; i++) {
            multiply_pair(1, VECS_OF_SUB, a, i, *w, sub_bytes, bits, acc[i % chains]);
        }
        advance(a, 1, RUN_BLOCKS);
        *w += RUN_BLOCKS * BLOCK_BYTES(bits);
    }
    for (; b + chains <= blocks; b += chains) {
        ask_lines(*w + SQ_PANEL_AHEAD, chains * BLOCK_BYTES(bits));
        UNROLL
        for (int c = 0; c < chains; c++) {
            multiply_block(1, VECS_OF_SUB, a, 0, *w, sub_bytes, bits, acc[c]);
            advance(a, 1, 1);
            *w += BLOCK_BYTES(bits);
        }
    }
    for (; b < blocks; b++) {
        multiply_block(1, VECS_OF_SUB, a, 0, *w, sub_bytes, bits, acc[0]);
        advance(a, 1, 1);
        *w += BLOCK_BYTES(bits);
    }
    UNROLL
    for (int c = 0; c < chains; c++) {
        UNROLL
        for (int v = 0; v < VECS_OF_SUB; v++) {
            wide[v] = NARROW_SUMS(bits) ? WIDEN(wide[v], acc[c][0][v])
                                        : VEC(add_epi32)(wide[v], acc[c][0][v]);
        }
    }
}

/* One row of a sub-panel. Its `chains` sums take the blocks of k in turn, a block left over goes
 * to the first of them. More chains than two are for 32-bit sums. */
static ALWAYS_INLINE void
tile_chains(const struct sq_panel_args *args, int64_t row, int64_t sub, const int chains,
            const int bits, const int blocks_max)
{
    enum { VECS = VECS_OF_SUB };
    const int64_t sub_bytes = args->k / BLOCK_K * BLOCK_BYTES(bits);
    const uint8_t *w = args->panel + sub * sub_bytes;
    const float *scales = args->w_scales + sub * SUB;
    struct code_rows a = code_rows(args, row, 1);
    vec_f total[VECS];
    UNROLL
    for (int v = 0; v < VECS; v++) {
        total[v] = VEC(setzero_ps)();
    }
    for (int64_t begin = 0; begin < args->k; begin += args->g) {
        const int32_t *sums = args->a_sums + row * args->ld_sums + begin / SQ_K_ALIGN;
        const vec_i offset =
            VEC(set1_epi32)(CODE_OFFSET(bits) * (sums[0] - sums[args->g / SQ_K_ALIGN]));
        vec_i wide[VECS];
        UNROLL
        for (int v = 0; v < VECS; v++) {
            wide[v] = offset;
        }
        for (int64_t left = args->g / BLOCK_K; left > 0;) {
            const int64_t blocks = sq_min_i64(left, (int64_t)chains * blocks_max);
            sum_chains(chains, &a, &w, sub_bytes, blocks, bits, wide);
            left -= blocks;
        }
        UNROLL
        for (int v = 0; v < VECS; v++) {
            total[v] = add_scaled(total[v], VEC(loadu_ps)(scales + LANES * v), wide[v]);
        }
        scales += NR;
    }
    UNROLL
    for (int v = 0; v < VECS; v++) {
        store_vector(args, row, sub * SUB + LANES * v, args->a_scales, total[v]);
    }
}

/* One row is bound by reading weights: sub-panel after sub-panel, so that they are one stream from
 * the first panel to the last, with enough chains to hide the latency of their sums. */
static ALWAYS_INLINE void
tile_codes_row(const struct sq_panel_args *args, int64_t row, const int bits, const int blocks_max)
{
    for (int64_t s = 0; s < SUBS; s++) {
        tile_chains(args, row, s, CHAINS_MAX, bits, blocks_max);
    }
}

/* ---- weights x float32 ------------------------------------------------------------------ */

/* acc += the products of k number j of a block. With the offset of its codes XORed a code is two's
 * complement, and two shifts extend its sign: from position 8 (j % 4) + 4 (j / 4) of 4 bits, 8 (j %
 * 4) of 8. */
static ALWAYS_INLINE void
multiply_value(const int rows, const int vecs, const int j, const int bits, const float *a,
               int64_t ld_a, const vec_i raw[VECS_MAX], vec_f acc[TILE_MR][VECS_MAX])
{
    const int position = 8 * (j % 4) + (bits == 4 ? 4 * (j / 4) : 0), up = 32 - bits - position;
    vec_f weight[VECS_MAX];
    UNROLL
    for (int v = 0; v < vecs; v++) {
        const vec_i code = VEC(srai_epi32)(VEC(slli_epi32)(raw[v], up), 32 - bits);
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
            int64_t sub, const int bits)
{
    enum { RAW_K = 4 }; /* k of a vector of bytes; 8 of a vector of nibbles */
    const int64_t sub_bytes = args->k / BLOCK_K * BLOCK_BYTES(bits);
    const vec_i sign = VEC(set1_epi8)((char)(bits == 4 ? 0x88 : 0x80));
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
            for (int j = 0; j < BLOCK_K; j++) {
                if (j % (bits == 4 ? BLOCK_K : RAW_K) == 0) {
                    UNROLL
                    for (int v = 0; v < vecs; v++) {
                        raw[v] = VEC_XOR(load_block(w + j / RAW_K * SUB * 4, sub_bytes, v), sign);
                    }
                }
                multiply_value(rows, vecs, j, bits, a, args->ld_a, raw, acc);
            }
            a += BLOCK_K;
            w += BLOCK_BYTES(bits);
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
    UNROLL
    for (int r = 0; r < rows; r++) {
        UNROLL
        for (int v = 0; v < vecs; v++) {
            store_vector(args, row + r, sub * SUB + LANES * v, NULL, total[r][v]);
        }
    }
}

/* One row takes the whole panel at once: a chain over k cannot be cut, so there must be many. */
static ALWAYS_INLINE void
tile_values_row(const struct sq_panel_args *args, int64_t row, const int bits)
{
    tile_values(args, row, 1, VECS_MAX, 0, bits);
}

#ifdef TILE_GEMM
#include "kernels/kernels_x86_gemm_template.h"
#endif
