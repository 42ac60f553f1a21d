/* SPDX-License-Identifier: Apache-2.0 */
/* AMX: products of codes as int8 tiles, on AVX2's panels; few rows, groups that are no multiple of
 * a tile and everything else are AVX-512's.
 *
 * A vector of a panel (8 k of 16 outputs) unpacks to two rows of a weight tile, 4 k of 16 outputs
 * each, so 16 such rows are 64 k. TDPBSUD multiplies signed activation codes by unsigned code + 8,
 * and the + 8 is taken back per group as on the other tables: the integers are equal, and the
 * floats follow in the same order.
 *
 * Order of the work, on a core with 48 KiB of L1 and 2 MiB of L2 (Sapphire Rapids):
 *  - A slab of SLAB_K x 32 outputs is unpacked once and then meets up to ROWS_MAX rows. Unpacking
 *    writes 512 vectors, at one store a cycle half of what 32 rows cost in products (32 steps of
 * two tiles x 16 cycles for each 16 rows): for each 32 rows again it would take half as long as the
 *    products, for 256 rows it is 6 % of them.
 *  - The slab, 32 KiB, stays in L1. A step of 64 k loads 2 tiles of it and 2 of activations for 4
 *    products, 64 cycles: 32 lines of activations from L2, half of what L2 delivers in that time.
 *    With both from L2 the loads would be the bound.
 *  - Between slabs a block's sums wait in memory: 4 loads and 4 stores of a tile for 64 products.
 *  - row_block_bytes of activations stay in L2 while the panels pass, beside a panel, the outputs
 *    and the buffers below: 384 rows of 4096 inputs, 128 of 11008. */
#define TILE_BITS 512
#define TILE_MR 12
#define TILE_DOT _mm512_dpbusd_epi32
#include "kernels/kernels_x86_template.h"

#include "core/sq_cpu.h"

/* ---- tiles ------------------------------------------------------------------------------ */

/* Inline assembly, since gcc 12's intrinsics tell the optimizer too little: _tile_loadconfig names
 * 8 of the 64 bytes it reads, and _tile_loadd none. Tiles are numbers 0 to 7, written out. */
#ifdef SQ_AMX_EMULATED
#include "kernels/amx_emulated.h"
#define REQUIRED_FEATURES SQ_CPU_AVX512_VNNI
#define TILE_LOADCONFIG(config) amx_load_config(config)
#define TILE_RELEASE() amx_release()
#define TILE_ZERO(t) amx_zero(t)
#define TILE_LOAD(t, from, stride_bytes) amx_load(t, from, stride_bytes)
#define TILE_STORE(t, to, stride_bytes) amx_store(t, to, stride_bytes)
#define TILE_DPBSUD(sums, codes, weights) amx_dpbsud(sums, codes, weights)
#else
#define REQUIRED_FEATURES SQ_CPU_AMX_INT8
#define TILE_LOADCONFIG(config) __asm__ volatile("ldtilecfg %0" ::"m"(*(config)) : "memory")
#define TILE_RELEASE() __asm__ volatile("tilerelease" ::: "memory")
#define TILE_ZERO(t) __asm__ volatile("tilezero %%tmm" #t ::: "memory")
#define TILE_LOAD(t, from, stride_bytes)                                                       \
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #t ::"r"(from), "r"((int64_t)(stride_bytes)) \
                     : "memory")
#define TILE_STORE(t, to, stride_bytes)                                                          \
    __asm__ volatile("tilestored %%tmm" #t ", (%0,%1,1)" ::"r"(to), "r"((int64_t)(stride_bytes)) \
                     : "memory")
#define TILE_DPBSUD(sums, codes, weights) \
    __asm__ volatile("tdpbsud %%tmm" #weights ", %%tmm" #codes ", %%tmm" #sums ::: "memory")
#endif

enum {
    TILE_ROWS = 16,
    TILE_K = 64,
    TILE_BYTES = TILE_ROWS * TILE_K,
    BLOCK_ROWS = 2 * TILE_ROWS,
    STEP_BYTES = SUBS * TILE_BYTES, /* weights of 64 k */
    SLAB_K = 1024,
    ROWS_MAX = 256,
    /* For each 64 k of 32 outputs AVX-512 takes 16 cycles a row (two vpdpbusd of 64 bytes a cycle);
     * tiles take about 40 to unpack, 32 to load and 2 a row, and the call has a configuration and
     * buffers to pay. */
    ROWS_MIN = 8
};
_Static_assert(SUBS == 2 && SUB == (int)TILE_ROWS, "2 x 2 tiles of sums");
_Static_assert(SUB_BLOCK_BYTES == (int)TILE_K, "a vector of the panel is two rows of a tile");
_Static_assert(SLAB_K % TILE_K == 0 && TILE_K % SQ_K_ALIGN == 0, "whole tiles but for the last");

/* Sums in tiles 0 .. 3 ([2][2]), activations in 4 and 5, weights in 6 and 7. */
struct tile_config {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
};
_Static_assert(sizeof(struct tile_config) == 64, "as ldtilecfg reads it");

/* Tiles for 1 to BLOCK_ROWS rows of activations. Their contents become zero. */
static void
configure_tiles(int64_t rows)
{
    const uint8_t first = (uint8_t)sq_min_i64(rows, TILE_ROWS), second = (uint8_t)(rows - first);
    const uint16_t second_bytes = second ? TILE_K : 0;
    const struct tile_config config = {
        .palette = 1,
        .rows = {first, first, second, second, first, second, TILE_ROWS, TILE_ROWS},
        .row_bytes = {TILE_K, TILE_K, second_bytes, second_bytes, TILE_K, second_bytes, TILE_K,
                      TILE_K},
    };
    TILE_LOADCONFIG(&config);
}

/* ---- a block of rows -------------------------------------------------------------------- */

struct buffers {
    _Alignas(64) uint8_t slab[SLAB_K * NR]; /* [SLAB_K / 64][SUBS][16][64]: weights + 8 */
    int32_t sums[ROWS_MAX][NR];             /* of the group so far, + 8 still in them */
    float totals[ROWS_MAX][NR];             /* of the groups so far */
    int8_t tail[BLOCK_ROWS][TILE_K];        /* the last 32 codes of rows, and zeros */
};

/* Inputs begin .. end - 1 of the panel; a last half tile is filled up with zeros. */
static void
unpack_slab(const struct sq_panel_args *args, int64_t begin, int64_t end, uint8_t *slab)
{
    enum { BLOCKS = TILE_K / BLOCK_K }; /* of a tile */
    const int64_t sub_bytes = args->k / BLOCK_K * SUB_BLOCK_BYTES;
    const int64_t blocks = (end - begin) / BLOCK_K, filled = sq_round_up(blocks, BLOCKS);
    const __m512i nibble = _mm512_set1_epi8(15);
    for (int64_t s = 0; s < SUBS; s++) {
        const uint8_t *from = args->panel + s * sub_bytes + begin / BLOCK_K * SUB_BLOCK_BYTES;
        for (int64_t b = 0; b < filled; b++) {
            uint8_t *to = slab + (b / BLOCKS * SUBS + s) * TILE_BYTES + b % BLOCKS * 2 * TILE_K;
            __m512i raw = _mm512_setzero_si512();
            if (b < blocks) {
                raw = _mm512_load_si512(from + b * SUB_BLOCK_BYTES);
            }
            _mm512_store_si512(to, _mm512_and_si512(raw, nibble));
            _mm512_store_si512(to + TILE_K, _mm512_and_si512(_mm512_srli_epi16(raw, 4), nibble));
        }
    }
}

/* Sums += one step of 64 k. */
static ALWAYS_INLINE void
multiply_step(const int two, const int8_t *a, int64_t ld_a, const uint8_t *w)
{
    TILE_LOAD(6, w, TILE_K);
    TILE_LOAD(4, a, ld_a);
    TILE_LOAD(7, w + TILE_BYTES, TILE_K);
    TILE_DPBSUD(0, 4, 6);
    TILE_DPBSUD(1, 4, 7);
    if (two) {
        TILE_LOAD(5, a + TILE_ROWS * ld_a, ld_a);
        TILE_DPBSUD(2, 5, 6);
        TILE_DPBSUD(3, 5, 7);
    }
}

/* sums [rows][NR] <- or += codes a [rows][ld_a] times `count` inputs of the slab at w; two: more
 * than TILE_ROWS rows. */
static ALWAYS_INLINE void
multiply_tiles(const int two, const int8_t *a, int64_t ld_a, int64_t rows, int64_t count,
               const uint8_t *w, int add, int8_t tail[BLOCK_ROWS][TILE_K], int32_t sums[][NR])
{
    enum { LD = NR * sizeof(int32_t) };
    if (add) {
        TILE_LOAD(0, sums[0], LD);
        TILE_LOAD(1, sums[0] + SUB, LD);
        if (two) {
            TILE_LOAD(2, sums[TILE_ROWS], LD);
            TILE_LOAD(3, sums[TILE_ROWS] + SUB, LD);
        }
    }
    else {
        TILE_ZERO(0);
        TILE_ZERO(1);
        if (two) {
            TILE_ZERO(2);
            TILE_ZERO(3);
        }
    }
    int64_t done = 0;
    for (; done + TILE_K <= count; done += TILE_K) {
        multiply_step(two, a + done, ld_a, w);
        w += STEP_BYTES;
    }
    if (done < count) { /* another row's codes, or nothing, lie behind the last 32 */
        for (int64_t r = 0; r < rows; r++) {
            memcpy(tail[r], a + r * ld_a + done, SQ_K_ALIGN);
            memset(tail[r] + SQ_K_ALIGN, 0, TILE_K - SQ_K_ALIGN);
        }
        multiply_step(two, tail[0], TILE_K, w);
    }
    TILE_STORE(0, sums[0], LD);
    TILE_STORE(1, sums[0] + SUB, LD);
    if (two) {
        TILE_STORE(2, sums[TILE_ROWS], LD);
        TILE_STORE(3, sums[TILE_ROWS] + SUB, LD);
    }
}

/* totals [rows][NR] += w_scale * (sums - 8 * the group's sum of codes). */
static void
add_group(const struct sq_panel_args *args, int64_t row, int64_t rows, int64_t group,
          int32_t sums[][NR], float totals[][NR])
{
    const float *scales = args->w_scales + group * NR;
    const __m512 low = _mm512_loadu_ps(scales), high = _mm512_loadu_ps(scales + SUB);
    for (int64_t r = 0; r < rows; r++) {
        const int32_t *a_sums =
            args->a_sums + (row + r) * args->ld_sums + group * (args->g / SQ_K_ALIGN);
        const __m512i offset = _mm512_set1_epi32(8 * (a_sums[args->g / SQ_K_ALIGN] - a_sums[0]));
        const __m512i sum0 = _mm512_sub_epi32(_mm512_load_si512(sums[r]), offset);
        const __m512i sum1 = _mm512_sub_epi32(_mm512_load_si512(sums[r] + SUB), offset);
        const __m512 add0 = _mm512_mul_ps(low, _mm512_cvtepi32_ps(sum0));
        const __m512 add1 = _mm512_mul_ps(high, _mm512_cvtepi32_ps(sum1));
        _mm512_store_ps(totals[r], _mm512_add_ps(_mm512_load_ps(totals[r]), add0));
        _mm512_store_ps(totals[r] + SUB, _mm512_add_ps(_mm512_load_ps(totals[r] + SUB), add1));
    }
}

/* Rows row .. row + rows - 1 (BLOCK_ROWS at most, as configured), number `first` and on of the
 * buffers, times the slab's inputs begin .. end - 1, group by group. */
static void
multiply_block_rows(const struct sq_panel_args *args, int64_t row, int64_t rows, int64_t first,
                    int64_t begin, int64_t end, struct buffers *buffers)
{
    const int8_t *a = (const int8_t *)args->a + row * args->ld_a;
    int32_t(*sums)[NR] = buffers->sums + first;
    for (int64_t stop, k = begin; k < end; k = stop) {
        const int64_t group = k / args->g, last = (group + 1) * args->g;
        const uint8_t *w = buffers->slab + (k - begin) * NR;
        const int add = k > group * args->g;
        stop = sq_min_i64(end, last);
        if (rows > TILE_ROWS) {
            multiply_tiles(1, a + k, args->ld_a, rows, stop - k, w, add, buffers->tail, sums);
        }
        else {
            multiply_tiles(0, a + k, args->ld_a, rows, stop - k, w, add, buffers->tail, sums);
        }
        if (stop == last) {
            add_group(args, row, rows, group, sums, buffers->totals + first);
        }
    }
}

/* y <- or += a_scale * totals. */
static void
store_rows(const struct sq_panel_args *args, int64_t row, int64_t rows, float totals[][NR])
{
    for (int64_t r = 0; r < rows; r++) {
        const __m512 scale = _mm512_set1_ps(args->a_scales[row + r]);
        for (int64_t j = 0; j < NR; j += SUB) {
            float *y = args->y + (row + r) * args->ld_y + j;
            __m512 value = _mm512_mul_ps(scale, _mm512_load_ps(totals[r] + j));
            if (args->accumulate) {
                value = _mm512_add_ps(_mm512_loadu_ps(y), value);
            }
            _mm512_storeu_ps(y, value);
        }
    }
}

/* Rows row .. row + rows - 1, ROWS_MAX at most: slab by slab, in each of them block by block. */
static void
multiply_rows(const struct sq_panel_args *args, int64_t row, int64_t rows, struct buffers *buffers)
{
    memset(buffers->totals, 0, (size_t)rows * sizeof buffers->totals[0]);
    int64_t configured = 0;
    for (int64_t begin = 0; begin < args->k; begin += SLAB_K) {
        const int64_t end = sq_min_i64(args->k, begin + SLAB_K);
        unpack_slab(args, begin, end, buffers->slab);
        for (int64_t r = 0; r < rows; r += BLOCK_ROWS) {
            const int64_t count = sq_min_i64(BLOCK_ROWS, rows - r);
            if (count != configured) {
                configure_tiles(count);
                configured = count;
            }
            multiply_block_rows(args, row + r, count, r, begin, end, buffers);
        }
    }
    store_rows(args, row, rows, buffers->totals);
}

static void
sq_gemm_a8w4_f32_32x32__amx(const struct sq_panel_args *args)
{
    if (args->m < ROWS_MIN || (args->g < args->k && args->g % TILE_K)) {
        sq_kernels_avx512vnni.gemm_a8w4(args);
        return;
    }
    struct buffers buffers;
    for (int64_t row = 0; row < args->m; row += ROWS_MAX) {
        multiply_rows(args, row, sq_min_i64(ROWS_MAX, args->m - row), &buffers);
    }
    TILE_RELEASE(); /* a core with live tiles sleeps less deeply and switches threads more slowly */
}

const struct sq_kernels sq_kernels_amx = {
    .name = "amx",
    .required_features = REQUIRED_FEATURES,
    .steps = {"tdpbsud", "tdpbsud", NULL},
    .base = &sq_kernels_avx512vnni,
    .mr = BLOCK_ROWS,
    .row_block_bytes = 3 << 19,
    .gemm_a4w4 = sq_gemm_a8w4_f32_32x32__amx,
    .gemm_a8w4 = sq_gemm_a8w4_f32_32x32__amx,
};
