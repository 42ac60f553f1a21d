/* SPDX-License-Identifier: Apache-2.0 */
/* AMX: products of codes as int8 tiles, on AVX2's panels; few rows and everything else are
 * AVX-512's.
 *
 * A vector of a panel (8 k of 16 outputs) unpacks to two rows of a weight tile, 4 k of 16 outputs
 * each, so 16 such rows are 64 k. A panel of bytes has such rows already. The 8 or 128 that a panel
 * adds to codes is taken back here, so that TDPBSSD multiplies signed by signed codes and no sum
 * needs a correction: the integers are those of the other tables, and the floats follow in the same
 * order.
 *
 * Order of the work, on a core with 48 KiB of L1 and 2 MiB of L2 (Sapphire Rapids):
 *  - A slab of SLAB_K x 32 outputs is unpacked once and then meets up to ROWS_MAX rows. Unpacking
 *    writes 512 vectors, at one store a cycle half of what 32 rows cost in products (32 steps of
 *    two tiles x 16 cycles for each 16 rows): for each 32 rows again it would take half as long as
 *    the products, for 256 rows it is 6 % of them.
 *  - The slab, 32 KiB, stays in L1. A step of 64 k loads 2 tiles of it and 2 of activations for 4
 *    products, 64 cycles: 32 lines of activations from L2, half of what L2 delivers in that time.
 *    With both from L2 the loads would be the bound.
 *  - Between slabs a block's sums wait in memory: 4 loads and 4 stores of a tile for 64 products.
 *  - A short group's sums leave the tiles so often that a block of 16 x 16 with its totals in
 *    registers is faster. Measured (Granite Rapids), a product of 64 k takes 18 cycles, its tile
 *    store 14 and the additions to the totals 18, and these hardly overlap.
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
#define TILE_DPBSSD(sums, codes, weights) amx_dpbssd(sums, codes, weights)
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
#define TILE_DPBSSD(sums, codes, weights) \
    __asm__ volatile("tdpbssd %%tmm" #weights ", %%tmm" #codes ", %%tmm" #sums ::: "memory")
#endif

enum {
    TILE_ROWS = 16,
    TILE_K = 64,
    TILE_BYTES = TILE_ROWS * TILE_K,
    BLOCK_ROWS = 2 * TILE_ROWS,
    STEP_BYTES = SUBS * TILE_BYTES, /* weights of 64 k */
    SLAB_K = 1024,
    ROWS_MAX = 256,
    SHORT_GROUP = 256, /* inputs of a group whose sums are added tile by tile */
    /* Rows from which tiles win over AVX-512, beside unpacking, the configuration and the buffers.
     * Measured (Granite Rapids): 1.16 of its time at 12 rows and 0.89 at 16; with groups of 32 to
     * 128, 0.96 to 1.24 at 24 rows and 0.76 to 0.93 at 32. */
    ROWS_MIN = 16,
    SHORT_ROWS_MIN = 32
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

/* Tiles for steps of step_k inputs, 64 or 32, by `first` rows of activations in the first tile and
 * `second` in the second, where 0 leaves it out. Their contents become zero. */
static void
configure_tiles(int64_t first, int64_t second, int64_t step_k)
{
    const uint8_t r = (uint8_t)first, t = (uint8_t)second, deep = (uint8_t)(step_k / 4);
    const uint16_t sums = second ? TILE_K : 0, codes = (uint16_t)step_k;
    const struct tile_config config = {
        .palette = 1,
        .rows = {r, r, t, t, r, t, deep, deep},
        .row_bytes = {TILE_K, TILE_K, sums, sums, codes, second ? codes : 0, TILE_K, TILE_K},
    };
    TILE_LOADCONFIG(&config);
}

/* Inputs of a step: half a tile where groups are no multiple of a whole one. */
static int64_t
step_inputs(const struct sq_panel_args *args)
{
    return args->g == args->k || args->g % TILE_K == 0 ? TILE_K : SQ_K_ALIGN;
}

/* ---- a block of rows -------------------------------------------------------------------- */

struct buffers {
    _Alignas(64) int8_t slab[SLAB_K * NR]; /* [SLAB_K / 64][SUBS][16][64]: codes of weights */
    int32_t sums[ROWS_MAX][NR];            /* of the group so far */
    float totals[ROWS_MAX][NR];            /* of the groups so far */
    int32_t pair[2][TILE_ROWS][SUB];       /* of two short groups */
    int8_t tail[BLOCK_ROWS][TILE_K];       /* the last 32 codes of rows, and zeros */
};

/* Two vectors of signed bytes, 4 k of 16 outputs each, of a panel's block of 8 k. */
static ALWAYS_INLINE void
unpack_block(const uint8_t *from, const int bits, int8_t *to)
{
    const __m512i nibble = _mm512_set1_epi8(15);
    const __m512i offset = _mm512_set1_epi8((char)CODE_OFFSET(bits));
    __m512i first = _mm512_load_si512(from), second;
    if (bits == 8) {
        second = _mm512_load_si512(from + TILE_K);
    }
    else {
        second = _mm512_and_si512(_mm512_srli_epi16(first, 4), nibble);
        first = _mm512_and_si512(first, nibble);
    }
    _mm512_store_si512(to, _mm512_sub_epi8(first, offset));
    _mm512_store_si512(to + TILE_K, _mm512_sub_epi8(second, offset));
}

/* Inputs begin .. end - 1 of the panel; a last half tile is filled up with zeros. */
static ALWAYS_INLINE void
unpack_slab(const struct sq_panel_args *args, int64_t begin, int64_t end, const int bits,
            int8_t *slab)
{
    enum { BLOCKS = TILE_K / BLOCK_K }; /* of a tile */
    const int64_t sub_bytes = args->k / BLOCK_K * BLOCK_BYTES(bits);
    const int64_t blocks = (end - begin) / BLOCK_K, filled = sq_round_up(blocks, BLOCKS);
    for (int64_t s = 0; s < SUBS; s++) {
        const uint8_t *from = args->panel + s * sub_bytes + begin / BLOCK_K * BLOCK_BYTES(bits);
        for (int64_t b = 0; b < filled; b++) {
            int8_t *to = slab + (b / BLOCKS * SUBS + s) * TILE_BYTES + b % BLOCKS * 2 * TILE_K;
            if (b < blocks) {
                unpack_block(from + b * BLOCK_BYTES(bits), bits, to);
            }
            else {
                memset(to, 0, 2 * TILE_K);
            }
        }
    }
}

/* The weights of input k of a slab and on; k is a multiple of 32, half of a tile. */
static ALWAYS_INLINE const int8_t *
slab_at(const int8_t *slab, int64_t k)
{
    return slab + k / TILE_K * STEP_BYTES + k % TILE_K * TILE_ROWS;
}

/* Sums += one step. */
static ALWAYS_INLINE void
multiply_step(const int two, const int8_t *a, int64_t ld_a, const int8_t *w)
{
    TILE_LOAD(6, w, TILE_K);
    TILE_LOAD(4, a, ld_a);
    TILE_LOAD(7, w + TILE_BYTES, TILE_K);
    TILE_DPBSSD(0, 4, 6);
    TILE_DPBSSD(1, 4, 7);
    if (two) {
        TILE_LOAD(5, a + TILE_ROWS * ld_a, ld_a);
        TILE_DPBSSD(2, 5, 6);
        TILE_DPBSSD(3, 5, 7);
    }
}

/* The tiles' sums <- zero, or as they wait in memory [rows][NR]; two: more than TILE_ROWS rows. */
enum { LD_SUMS = NR * sizeof(int32_t) };
static ALWAYS_INLINE void
begin_sums(const int two, int add, int32_t sums[][NR])
{
    if (add) {
        TILE_LOAD(0, sums[0], LD_SUMS);
        TILE_LOAD(1, sums[0] + SUB, LD_SUMS);
        if (two) {
            TILE_LOAD(2, sums[TILE_ROWS], LD_SUMS);
            TILE_LOAD(3, sums[TILE_ROWS] + SUB, LD_SUMS);
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
}

static ALWAYS_INLINE void
store_sums(const int two, int32_t sums[][NR])
{
    TILE_STORE(0, sums[0], LD_SUMS);
    TILE_STORE(1, sums[0] + SUB, LD_SUMS);
    if (two) {
        TILE_STORE(2, sums[TILE_ROWS], LD_SUMS);
        TILE_STORE(3, sums[TILE_ROWS] + SUB, LD_SUMS);
    }
}

/* The tiles' sums += codes a [rows][ld_a] times inputs begin .. end - 1 of the slab, by steps of
 * step_k. */
static ALWAYS_INLINE void
multiply_tiles(const int two, const int8_t *a, int64_t ld_a, int64_t rows, int64_t begin,
               int64_t end, int64_t step_k, const int8_t *slab, int8_t tail[BLOCK_ROWS][TILE_K])
{
    for (; begin + step_k <= end; begin += step_k) {
        multiply_step(two, a + begin, ld_a, slab_at(slab, begin));
    }
    if (begin < end) { /* another row's codes, or nothing, lie behind the last 32 */
        for (int64_t r = 0; r < rows; r++) {
            memcpy(tail[r], a + r * ld_a + begin, SQ_K_ALIGN);
            memset(tail[r] + SQ_K_ALIGN, 0, TILE_K - SQ_K_ALIGN);
        }
        multiply_step(two, tail[0], TILE_K, slab_at(slab, begin));
    }
}

/* total + scale * sum, each rounded by itself. */
static ALWAYS_INLINE __m512
add_scaled_sums(__m512 total, __m512 scale, const int32_t sums[SUB])
{
    const __m512 sum = _mm512_cvtepi32_ps(_mm512_load_si512(sums));
    return _mm512_add_ps(total, _mm512_mul_ps(scale, sum));
}

/* totals [rows][NR] += w_scale * sums. */
static ALWAYS_INLINE void
add_group(const struct sq_panel_args *args, int64_t rows, int64_t group, int32_t sums[][NR],
          float totals[][NR])
{
    const float *scales = args->w_scales + group * NR;
    for (int64_t j = 0; j < NR; j += SUB) {
        const __m512 scale = _mm512_loadu_ps(scales + j);
        for (int64_t r = 0; r < rows; r++) {
            float *total = totals[r] + j;
            _mm512_store_ps(total, add_scaled_sums(_mm512_load_ps(total), scale, sums[r] + j));
        }
    }
}

/* Rows row .. row + rows - 1 (BLOCK_ROWS at most, as configured; two: more than TILE_ROWS), number
 * `first` and on of the buffers, times the slab's inputs begin .. end - 1, group by group. A
 * group's sums are added to the totals while the next group is multiplied: its tiles are given
 * their work first, and the vectors are busy for as long as they take. */
static ALWAYS_INLINE void
multiply_groups(const struct sq_panel_args *args, const int two, int64_t row, int64_t rows,
                int64_t first, int64_t begin, int64_t end, struct buffers *buffers)
{
    const int8_t *a = (const int8_t *)args->a + row * args->ld_a + begin;
    int32_t(*sums)[NR] = buffers->sums + first;
    int64_t waiting = -1; /* the group whose sums are in memory */
    for (int64_t stop, k = begin; k < end; k = stop) {
        const int64_t group = k / args->g, last = (group + 1) * args->g;
        stop = sq_min_i64(end, last);
        begin_sums(two, k > group * args->g, sums);
        multiply_tiles(two, a, args->ld_a, rows, k - begin, stop - begin, step_inputs(args),
                       buffers->slab, buffers->tail);
        if (waiting >= 0) {
            add_group(args, rows, waiting, sums, buffers->totals + first);
        }
        store_sums(two, sums);
        waiting = stop == last ? group : -1;
    }
    if (waiting >= 0) {
        add_group(args, rows, waiting, sums, buffers->totals + first);
    }
}

static ALWAYS_INLINE void
multiply_block_rows(const struct sq_panel_args *args, int64_t row, int64_t rows, int64_t first,
                    int64_t begin, int64_t end, struct buffers *buffers)
{
    if (rows > TILE_ROWS) {
        multiply_groups(args, 1, row, rows, first, begin, end, buffers);
    }
    else {
        multiply_groups(args, 0, row, rows, first, begin, end, buffers);
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
static ALWAYS_INLINE void
multiply_rows(const struct sq_panel_args *args, int64_t row, int64_t rows, const int bits,
              struct buffers *buffers)
{
    memset(buffers->totals, 0, (size_t)rows * sizeof buffers->totals[0]);
    int64_t configured = 0;
    for (int64_t begin = 0; begin < args->k; begin += SLAB_K) {
        const int64_t end = sq_min_i64(args->k, begin + SLAB_K);
        unpack_slab(args, begin, end, bits, buffers->slab);
        for (int64_t r = 0; r < rows; r += BLOCK_ROWS) {
            const int64_t count = sq_min_i64(BLOCK_ROWS, rows - r);
            if (count != configured) {
                configure_tiles(sq_min_i64(count, TILE_ROWS), sq_max_i64(count - TILE_ROWS, 0),
                                step_inputs(args));
                configured = count;
            }
            multiply_block_rows(args, row + r, count, r, begin, end, buffers);
        }
    }
    store_rows(args, row, rows, buffers->totals);
}

/* ---- short groups ----------------------------------------------------------------------- */

/* Tile `sums` <- codes a times the weights of the slab's group number `group`. */
#define MULTIPLY_GROUP(sums, codes, weights, group)                            \
    TILE_ZERO(sums);                                                           \
    for (int64_t step = (group)*steps; step < ((group) + 1) * steps; step++) { \
        TILE_LOAD(weights, slab_at(slab, step *step_k), TILE_K);               \
        TILE_LOAD(codes, a + step * step_k, ld_a);                             \
        TILE_DPBSSD(sums, codes, weights);                                     \
    }

static ALWAYS_INLINE void
add_tile(__m512 total[TILE_ROWS], const float *scales, int32_t sums[TILE_ROWS][SUB])
{
    const __m512 scale = _mm512_loadu_ps(scales);
    UNROLL
    for (int r = 0; r < TILE_ROWS; r++) {
        total[r] = add_scaled_sums(total[r], scale, sums[r]);
    }
}

/* totals [16][NR] += those of a tile of rows a and 16 outputs in the slab's groups, of so many
 * steps of step_k each. They stay in registers. The sums of a group are added while the next one is
 * multiplied, since a load of what a tile store wrote waits until the store has retired. */
static ALWAYS_INLINE void
multiply_column(const int8_t *a, int64_t ld_a, const int8_t *slab, const float *scales,
                int64_t groups, const int64_t steps, const int64_t step_k,
                int32_t sums[2][TILE_ROWS][SUB], float *totals)
{
    __m512 total[TILE_ROWS];
    UNROLL
    for (int r = 0; r < TILE_ROWS; r++) {
        total[r] = _mm512_load_ps(totals + r * NR);
    }
    MULTIPLY_GROUP(0, 4, 6, 0)
    TILE_STORE(0, sums[0][0], TILE_K);
    int64_t i = 1;
    for (; i + 1 < groups; i += 2) {
        MULTIPLY_GROUP(1, 5, 7, i)
        add_tile(total, scales + (i - 1) * NR, sums[0]);
        TILE_STORE(1, sums[1][0], TILE_K);
        MULTIPLY_GROUP(0, 4, 6, i + 1)
        add_tile(total, scales + i * NR, sums[1]);
        TILE_STORE(0, sums[0][0], TILE_K);
    }
    if (i < groups) {
        MULTIPLY_GROUP(1, 5, 7, i)
        add_tile(total, scales + (i - 1) * NR, sums[0]);
        TILE_STORE(1, sums[1][0], TILE_K);
    }
    add_tile(total, scales + (groups - 1) * NR, sums[groups % 2 ? 0 : 1]);
    UNROLL
    for (int r = 0; r < TILE_ROWS; r++) {
        _mm512_store_ps(totals + r * NR, total[r]);
    }
}

/* The same; groups of one step without the loop over them. */
static ALWAYS_INLINE void
multiply_any_column(const struct sq_panel_args *args, const int8_t *a, const int8_t *slab,
                    const float *scales, int64_t groups, struct buffers *buffers, float *totals)
{
    const int64_t ld = args->ld_a, step_k = step_inputs(args);
    if (args->g == TILE_K) {
        multiply_column(a, ld, slab, scales, groups, 1, TILE_K, buffers->pair, totals);
    }
    else if (args->g == SQ_K_ALIGN) {
        multiply_column(a, ld, slab, scales, groups, 1, SQ_K_ALIGN, buffers->pair, totals);
    }
    else {
        multiply_column(a, ld, slab, scales, groups, args->g / step_k, step_k, buffers->pair,
                        totals);
    }
}

/* Rows row .. row + rows - 1 as above, by slabs of whole groups. */
static ALWAYS_INLINE void
multiply_short_groups(const struct sq_panel_args *args, int64_t row, int64_t rows, const int bits,
                      struct buffers *buffers)
{
    const int64_t slab_k = SLAB_K / args->g * args->g;
    memset(buffers->totals, 0, sizeof buffers->totals);
    int64_t configured = 0;
    for (int64_t begin = 0; begin < args->k; begin += slab_k) {
        const int64_t end = sq_min_i64(args->k, begin + slab_k);
        const float *scales = args->w_scales + begin / args->g * NR;
        unpack_slab(args, begin, end, bits, buffers->slab);
        for (int64_t r = 0; r < rows; r += TILE_ROWS) {
            const int8_t *a = (const int8_t *)args->a + (row + r) * args->ld_a + begin;
            const int64_t count = sq_min_i64(TILE_ROWS, rows - r);
            if (count != configured) {
                configure_tiles(count, count, step_inputs(args));
                configured = count;
            }
            for (int64_t s = 0; s < SUBS; s++) {
                multiply_any_column(args, a, buffers->slab + s * TILE_BYTES, scales + s * SUB,
                                    (end - begin) / args->g, buffers, buffers->totals[r] + s * SUB);
            }
        }
    }
    store_rows(args, row, rows, buffers->totals);
}

static int
has_short_groups(const struct sq_panel_args *args)
{
    return args->g < args->k && args->g <= SHORT_GROUP;
}

static ALWAYS_INLINE void
gemm_tiles(const struct sq_panel_args *args, const int bits)
{
    const int is_short = has_short_groups(args);
    struct buffers buffers;
    if (is_short) { /* rows that tiles do not store are added, too, and dropped */
        memset(buffers.pair, 0, sizeof buffers.pair);
    }
    for (int64_t row = 0; row < args->m; row += ROWS_MAX) {
        const int64_t rows = sq_min_i64(ROWS_MAX, args->m - row);
        if (is_short) {
            multiply_short_groups(args, row, rows, bits, &buffers);
        }
        else {
            multiply_rows(args, row, rows, bits, &buffers);
        }
    }
    TILE_RELEASE(); /* a core with live tiles sleeps less deeply and switches threads more slowly */
}

static int
suits_tiles(const struct sq_panel_args *args)
{
    return args->m >= (has_short_groups(args) ? SHORT_ROWS_MIN : ROWS_MIN);
}

static void
sq_gemm_a8w4_f32_32x32__amx(const struct sq_panel_args *args)
{
    if (suits_tiles(args)) {
        gemm_tiles(args, 4);
    }
    else {
        sq_kernels_avx512vnni.gemm_a8w4(args);
    }
}

static void
sq_gemm_a8w8_f32_32x32__amx(const struct sq_panel_args *args)
{
    if (suits_tiles(args)) {
        gemm_tiles(args, 8);
    }
    else {
        sq_kernels_avx512vnni.gemm_a8w8(args);
    }
}

const struct sq_kernels sq_kernels_amx = {
    .name = "amx",
    .required_features = REQUIRED_FEATURES,
    .steps = {"tdpbsud", "tdpbsud", NULL}, /* as fast as tdpbssd */
    .base = &sq_kernels_avx512vnni,
    .mr = BLOCK_ROWS,
    .row_block_bytes = 3 << 19,
    .gemm_a4w4 = sq_gemm_a8w4_f32_32x32__amx,
    .gemm_a8w4 = sq_gemm_a8w4_f32_32x32__amx,
    .gemm_a8w8 = sq_gemm_a8w8_f32_32x32__amx,
};
