/* SPDX-License-Identifier: Apache-2.0 */
/* Rows of codes on x86, in the tiles of kernels_x86_template.h, which comes first.
 *
 * NR rows lie apart in memory. A piece of them, PIECE_BLOCKS blocks long, is turned into the order
 * of a panel of 8 bits in the first-level cache: vectors of 4 k of LANES outputs, unsigned. Then it
 * meets all tokens. One token with long rows needs no pieces: it goes along the rows, at the speed
 * of memory.
 */
#include "kernels/code_rows.h"

enum {
    PIECE_BLOCKS = 16,
    BLOCK_STEPS = SQ_ROW_BLOCK / 4, /* vectors of 4 k in a block */
    UNIT_DWORDS = 8,                /* dwords of a row that are turned at once */
    UNIT_BYTES = UNIT_DWORDS * 4,
    TILE_VECS = 2,
    VEC_BYTES = TILE_BITS / 8,
    ROW_VECS_ALL = NR / LANES
};

struct row_piece {
    _Alignas(SQ_ALIGN_BYTES) uint8_t codes[PIECE_BLOCKS * BLOCK_STEPS][NR * 4];
    _Alignas(SQ_ALIGN_BYTES) float scales[PIECE_BLOCKS][NR];
};

/* Eight dwords of LANES rows, turned: lane r of vector d is dword d of row r. Before, vector i is
 * row i; of 512 bits it is rows i and i + 4 for i < 4, and rows i + 4 and i + 8 for the others. */
static ALWAYS_INLINE void
turn_dwords(vec_i v[UNIT_DWORDS])
{
    vec_i pairs[UNIT_DWORDS], fours[UNIT_DWORDS];
    UNROLL
    for (int i = 0; i < UNIT_DWORDS; i += 2) {
        pairs[i] = VEC(unpacklo_epi32)(v[i], v[i + 1]);
        pairs[i + 1] = VEC(unpackhi_epi32)(v[i], v[i + 1]);
    }
    UNROLL
    for (int i = 0; i < UNIT_DWORDS; i += 4) {
        UNROLL
        for (int high = 0; high < 2; high++) {
            fours[i + 2 * high] = VEC(unpacklo_epi64)(pairs[i + high], pairs[i + 2 + high]);
            fours[i + 2 * high + 1] = VEC(unpackhi_epi64)(pairs[i + high], pairs[i + 2 + high]);
        }
    }
    UNROLL
    for (int i = 0; i < UNIT_DWORDS / 2; i++) {
#if TILE_BITS == 256
        v[i] = _mm256_permute2x128_si256(fours[i], fours[i + 4], 0x20);
        v[i + 4] = _mm256_permute2x128_si256(fours[i], fours[i + 4], 0x31);
#else
        v[i] = _mm512_shuffle_i32x4(fours[i], fours[i + 4], 0x88);
        v[i + 4] = _mm512_shuffle_i32x4(fours[i], fours[i + 4], 0xdd);
#endif
    }
}

/* LANES rows of one stride, which are turned together: the first of every four. */
struct row_group {
    const uint8_t *fours[LANES / 4];
    int64_t stride;
};

static ALWAYS_INLINE struct row_group
row_group(const void *first, int64_t stride)
{
    struct row_group group = {.stride = stride};
    UNROLL
    for (int i = 0; i < LANES / 4; i++) {
        group.fours[i] = (const uint8_t *)first + 4 * i * stride;
        __asm__("" : "+r"(group.fours[i])); /* else the optimizer finds a register for every row */
    }
    return group;
}

static ALWAYS_INLINE const uint8_t *
row_of(const struct row_group *group, int r)
{
    return group->fours[r / 4] + r % 4 * group->stride;
}

static ALWAYS_INLINE __m256i
load_eight(const uint8_t *from)
{
    return _mm256_loadu_si256((const __m256i *)(const void *)from);
}

/* Eight bfloat16 as float32. */
static ALWAYS_INLINE __m256i
load_eight_scales(const uint8_t *from)
{
    const __m128i halves = _mm_loadu_si128((const __m128i *)(const void *)from);
    return _mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16);
}

/* UNIT_DWORDS dwords, or as many scales, of the group's rows from `byte` on, turned. */
static ALWAYS_INLINE void
turn_unit(const struct row_group *group, int64_t byte, const int scales, vec_i v[UNIT_DWORDS])
{
#define LOAD_ROW(r) \
    (scales ? load_eight_scales(row_of(group, r) + byte) : load_eight(row_of(group, r) + byte))
    UNROLL
    for (int i = 0; i < UNIT_DWORDS; i++) {
#if TILE_BITS == 256
        v[i] = LOAD_ROW(i);
#else
        const int first = i < 4 ? i : i + 4;
        v[i] = _mm512_inserti64x4(_mm512_castsi256_si512(LOAD_ROW(first)), LOAD_ROW(first + 4), 1);
#endif
    }
#undef LOAD_ROW
    turn_dwords(v);
}

/* Asks for as many lines as a unit has, one behind the other: what the NR rows after these have
 * comes in the order of memory, whatever the order of their use is. */
static ALWAYS_INLINE void
prefetch_unit(const uint8_t **ahead)
{
    ask_lines(*ahead, LANES * UNIT_BYTES);
    *ahead += LANES * UNIT_BYTES;
}

/* The 8 vectors of a block out of its turned dwords: code_rows.h says where the bits are. */
static ALWAYS_INLINE void
spread_block(const vec_i *raw, const int bits, uint8_t *to)
{
    enum { LOW = SQ_ROW_BLOCK / 2 / 4 }; /* dwords of low bits */
    UNROLL
    for (int q = 0; q < BLOCK_STEPS; q++) {
        const vec_i low = q < LOW ? raw[q] : VEC(srli_epi16)(raw[q - LOW], 4);
        vec_i codes = VEC_AND(low, VEC(set1_epi8)(15));
        if (bits == 6) { /* bits 2 (q / 2) and above of dword q % 2, to bit 4 */
            const vec_i high = raw[LOW + q % 2];
            codes = VEC_OR(codes, VEC_AND(shifted(high, 4 - q / 2 * 2), VEC(set1_epi8)(0x30)));
        }
        VEC_STORE(to + q * NR * 4, codes);
    }
}

/* Vectors v of the piece's codes <- `bytes` bytes of the group's rows from `begin` on, which are
 * `blocks` blocks. The last unit may reach behind them. */
static ALWAYS_INLINE void
load_codes_of_rows(const struct row_group *group, int64_t begin, int64_t bytes, int64_t blocks,
                   const int bits, int v, const uint8_t **ahead, struct row_piece *piece)
{
    enum { BLOCK_DWORDS_MAX = 6 };
    vec_i raw[PIECE_BLOCKS * BLOCK_DWORDS_MAX];
    for (int64_t done = 0; done < bytes; done += UNIT_BYTES) {
        vec_i unit[UNIT_DWORDS];
        if (ahead) {
            prefetch_unit(ahead);
        }
        turn_unit(group, begin + done, 0, unit);
        UNROLL
        for (int d = 0; d < UNIT_DWORDS; d++) {
            if (bits == 8) {
                VEC_STORE(piece->codes[done / 4 + d] + v * VEC_BYTES,
                          VEC_XOR(unit[d], VEC(set1_epi8)((char)0x80)));
            }
            else {
                raw[done / 4 + d] = unit[d];
            }
        }
    }
    for (int64_t b = 0; bits < 8 && b < blocks; b++) {
        spread_block(raw + b * bits, bits, piece->codes[b * BLOCK_STEPS] + v * VEC_BYTES);
    }
}

/* Blocks first .. first + blocks - 1 of NR rows, whose codes and scales lie at w's. Up to a unit
 * behind the piece is read. */
static ALWAYS_INLINE void
load_piece(const struct sq_code_rows *w, int64_t first, int64_t blocks, const int bits,
           const uint8_t **ahead, struct row_piece *piece)
{
    const int64_t stride = sq_code_row_bytes(bits, w->k), scales = sq_code_row_scales(w->k);
    const int64_t begin = first * (SQ_ROW_BLOCK * bits / 8);
    const int64_t bytes = sq_min_i64(stride - begin, blocks * (SQ_ROW_BLOCK * bits / 8));
    for (int v = 0; v < ROW_VECS_ALL; v++) {
        const struct row_group codes = row_group(w->codes + v * LANES * stride, stride);
        load_codes_of_rows(&codes, begin, bytes, blocks, bits, v, ahead, piece);
        const struct row_group halves = row_group(w->scales + v * LANES * scales, 2 * scales);
        for (int64_t b = 0; b < blocks; b += UNIT_DWORDS) {
            vec_i unit[UNIT_DWORDS];
            turn_unit(&halves, 2 * (first + b), 1, unit);
            UNROLL
            for (int i = 0; i < UNIT_DWORDS; i++) {
                VEC_STORE(piece->scales[b + i] + v * LANES, unit[i]);
            }
        }
    }
}

/* The same where the table ends: behind the rows, NR or fewer, there may be no memory. */
static ALWAYS_INLINE void
load_last_piece(const struct sq_code_rows *w, int64_t rows, int64_t first, int64_t blocks,
                const int bits, struct row_piece *piece)
{
    const int64_t stride = sq_code_row_bytes(bits, w->k), scales = sq_code_row_scales(w->k);
    const int64_t begin = first * (SQ_ROW_BLOCK * bits / 8);
    const int64_t bytes = sq_min_i64(stride - begin, blocks * (SQ_ROW_BLOCK * bits / 8));
    uint8_t codes[NR * PIECE_BLOCKS * SQ_ROW_BLOCK + UNIT_BYTES] = {0};
    uint16_t halves[NR * PIECE_BLOCKS + UNIT_DWORDS] = {0};
    const uint8_t *ahead = codes;
    const struct sq_code_rows copy = {
        .bits = bits, .k = blocks * SQ_ROW_BLOCK, .codes = codes, .scales = halves};
    for (int64_t r = 0; r < rows; r++) {
        memcpy(codes + r * sq_code_row_bytes(bits, copy.k), w->codes + r * stride + begin,
               (size_t)bytes);
        memcpy(halves + r * blocks, w->scales + r * scales + first,
               (size_t)blocks * sizeof *halves);
    }
    load_piece(&copy, 0, blocks, bits, &ahead, piece);
}

struct rows_args {
    int64_t m; /* rows of x */
    const struct sq_token_rows *x;
    const struct row_piece *piece;
    int64_t first, blocks;
    float (*totals)[NR];  /* of m rows */
    struct sq_asks *next; /* the NR rows behind these, for each block to ask for a bit of them */
};

/* acc += a block's 8 steps, from where a stands. Codes of 6 bits and less may be summed two steps
 * at a time in 16 bits: 4 * 63 * 127 < 2^15. */
static ALWAYS_INLINE void
multiply_row_block(const int rows, const struct code_rows *a, const uint8_t *w, const int is_narrow,
                   vec_i acc[TILE_MR][VECS_MAX])
{
    UNROLL
    for (int step = 0; step < BLOCK_STEPS; step += 2) {
        vec_i codes[2][VECS_MAX];
        UNROLL
        for (int i = 0; i < 2; i++) {
            UNROLL
            for (int v = 0; v < TILE_VECS; v++) {
                codes[i][v] = VEC_LOAD(w + (step + i) * NR * 4 + v * VEC_BYTES);
            }
        }
        multiply_steps(rows, TILE_VECS, a, step, codes, is_narrow, acc);
    }
}

/* Rows of x times TILE_VECS vectors of outputs from sub-panel sub on. */
static ALWAYS_INLINE void
rows_tile(const struct rows_args *args, int64_t row, const int rows, const int vecs, int64_t sub,
          const int is_narrow)
{
    const struct sq_token_rows *x = args->x;
    const int64_t ld = x->ld * SQ_ROW_BLOCK;
    struct code_rows a = code_rows_at(x->codes + row * ld + args->first * SQ_ROW_BLOCK, ld, rows);
    float(*totals)[NR] = args->totals + row;
    (void)vecs;
    for (int64_t b = 0; b < args->blocks; b++) {
        const int64_t block = row * x->ld + args->first + b;
        ask_more(args->next);
        vec_i acc[TILE_MR][VECS_MAX];
        __asm__ volatile("" : "+r"(totals) : : "memory"); /* else totals take the sums' registers */
        UNROLL
        for (int r = 0; r < rows; r++) {
            UNROLL
            for (int v = 0; v < TILE_VECS; v++) {
                acc[r][v] = VEC(set1_epi32)(x->offsets[block + r * x->ld]);
            }
        }
        multiply_row_block(rows, &a, args->piece->codes[b * BLOCK_STEPS] + sub * SUB * 4, is_narrow,
                           acc);
        advance(&a, rows, SQ_ROW_BLOCK / BLOCK_K);
        UNROLL
        for (int v = 0; v < TILE_VECS; v++) {
            const vec_f w_scale = VEC(load_ps)(args->piece->scales[b] + sub * SUB + v * LANES);
            UNROLL
            for (int r = 0; r < rows; r++) {
                float *total = totals[r] + sub * SUB + v * LANES;
                const vec_f scale =
                    VEC(mul_ps)(w_scale, VEC(set1_ps)(x->scales[block + r * x->ld]));
                VEC(store_ps)(total, add_scaled(VEC(load_ps)(total), scale, acc[r][v]));
            }
        }
    }
}

static ALWAYS_INLINE void
rows_tile_row(const struct rows_args *args, int64_t row, const int is_narrow)
{
    for (int64_t s = 0; s < SUBS; s += TILE_VECS * LANES / SUB) {
        rows_tile(args, row, 1, TILE_VECS, s, is_narrow);
    }
}

static __attribute__((noinline)) void
rows_tiles_wide(const struct rows_args *args)
{
    FOR_TILES(rows_tile, 0)
}

static __attribute__((noinline)) void
rows_tiles_narrow(const struct rows_args *args)
{
    FOR_TILES(rows_tile, 1)
}

static ALWAYS_INLINE void
gemm_rows_of(const struct sq_code_rows *w, int64_t n, const struct sq_token_rows *x, int64_t m,
             float *y, int64_t ld_y, const int bits)
{
    _Alignas(SQ_ALIGN_BYTES) float totals[SQ_ROW_TOKENS][NR];
    struct row_piece piece;
    struct rows_args args = {.m = m * x->parts, .x = x, .piece = &piece, .totals = totals};
    const int64_t row_bytes = sq_code_row_bytes(bits, w->k);
    const int64_t row_scales = sq_code_row_scales(w->k);
    /* Few tokens leave no time: load_piece() asks for it all. */
    const int64_t tiles = sq_ceil_div(args.m, TILE_MR) * (NR / (TILE_VECS * LANES));
    const int64_t step = args.m > TILE_MR ? sq_ceil_div(NR * row_bytes, tiles * x->blocks) : 0;
    struct sq_code_rows rest = *w;
    for (int64_t j = 0; j < n; j += NR) {
        const int is_inside = (rest.rows - NR) * row_bytes >= UNIT_BYTES &&
                              (rest.rows - NR) * row_scales >= UNIT_DWORDS;
        const uint8_t *ahead = rest.codes + NR * row_bytes;
        struct sq_asks next = {.from = ahead, .step = step};
        args.next = &next;
        memset(totals, 0, (size_t)args.m * sizeof *totals);
        for (args.first = 0; args.first < x->blocks; args.first += PIECE_BLOCKS) {
            args.blocks = sq_min_i64(PIECE_BLOCKS, x->blocks - args.first);
            if (is_inside) {
                load_piece(&rest, args.first, args.blocks, bits, step ? NULL : &ahead, &piece);
            }
            else {
                load_last_piece(&rest, sq_min_i64(NR, rest.rows), args.first, args.blocks, bits,
                                &piece);
            }
            (bits == 8 ? rows_tiles_wide : rows_tiles_narrow)(&args);
        }
        const int64_t columns = sq_min_i64(NR, n - j);
        for (int64_t i = 0; i < m; i++) {
            float *token = totals[i * x->parts];
            for (int part = 1; part < x->parts; part++) {
                for (int c = 0; c < NR; c++) {
                    token[c] += totals[i * x->parts + part][c];
                }
            }
            memcpy(y + i * ld_y + j, token, (size_t)columns * sizeof *y);
        }
        rest.codes += NR * row_bytes;
        rest.scales += NR * row_scales;
        rest.rows -= NR;
    }
}

/* ---- few tokens ------------------------------------------------------------------------- */

/* One token reads every code once. It goes along the rows, as memory lies: from memory long rows
 * are read a fifth faster than by pieces, for which NR rows are as many streams at once. */
enum {
    ALONG_TOKENS = 2,
    ALONG_LEAST = 16, /* blocks */
    ALONG_ROWS = LANES,
    ALONG_BLOCKS = 128,
    ALONG_AHEAD = 4096 /* bytes */,
    EIGHT = 8
};

/* The codes are unsigned, those of 8 bits too where the CPU multiplies them; else these have their
 * sign, and IS_SIGNED says so. */
#ifdef TILE_DOT8
#define IS_SIGNED(bits) 0
#else
#define IS_SIGNED(bits) ((bits) == 8)
#endif

#if TILE_BITS == 512
/* Two blocks of codes, the first in the lower half. Those of 4 and 6 bits have 16 bytes of nibbles
 * a block, the inputs of its second half in the upper ones. Behind them a block of 6 bits has eight
 * bytes of upper bits, two of which belong to each quarter of its inputs. */
static ALWAYS_INLINE __m512i
load_two_blocks(const uint8_t *w, const int bits)
{
    if (bits == 8) {
        return _mm512_xor_si512(_mm512_loadu_si512(w), _mm512_set1_epi8((char)0x80));
    }
    const __m512i shifts = _mm512_setr_epi64(0, 0, 4, 4, 0, 0, 4, 4);
    const __m512i nibble = _mm512_set1_epi8(15);
    if (bits == 4) {
        const __m512i all = _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 1, 0, 1, 2, 3, 2, 3),
                                                     _mm512_castsi256_si512(load_eight(w)));
        return _mm512_and_si512(_mm512_srlv_epi64(all, shifts), nibble);
    }
    const __m512i all = _mm512_inserti32x4(
        _mm512_castsi256_si512(load_eight(w)), /* a masked load is many times slower */
        _mm_loadu_si128((const __m128i *)(const void *)(w + UNIT_BYTES)), 2);
    const __m512i bytes = _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 1, 0, 1, 3, 4, 3, 4), all);
    const __m512i low = _mm512_and_si512(_mm512_srlv_epi64(bytes, shifts), nibble);
    const __m512i upper = _mm512_permutexvar_epi64(_mm512_setr_epi64(2, 2, 2, 2, 5, 5, 5, 5), all);
    const __m512i turned = _mm512_rolv_epi64(upper, _mm512_setr_epi64(4, 2, 0, 62, 4, 2, 0, 62));
    return _mm512_or_si512(low, _mm512_and_si512(turned, _mm512_set1_epi8(0x30)));
}

/* For every pair of lanes of a and b, the sums of neighbours: those of a, then those of b. */
static ALWAYS_INLINE __m512i
add_neighbours(__m512i a, __m512i b)
{
    const __m512 x = _mm512_castsi512_ps(a), y = _mm512_castsi512_ps(b);
    return _mm512_add_epi32(_mm512_castps_si512(_mm512_shuffle_ps(x, y, 0x88)),
                            _mm512_castps_si512(_mm512_shuffle_ps(x, y, 0xdd)));
}

/* The products of `count` blocks of codes at w with x, an even number, summed block by block, and
 * zeros up to eight. */
static ALWAYS_INLINE __m256i
multiply_blocks(const uint8_t *w, const int8_t *x, const int bits, const int count)
{
    enum { PAIRS = EIGHT / 2, PAIR_CODES = 2 * SQ_ROW_BLOCK };
    __m512i dots[PAIRS];
    UNROLL
    for (int i = 0; i < PAIRS; i++) {
        if (2 * i >= count) {
            dots[i] = _mm512_setzero_si512();
            continue;
        }
        const __m512i codes = load_two_blocks(w + i * PAIR_CODES * bits / 8, bits);
        dots[i] = TILE_DOT(_mm512_setzero_si512(), codes, _mm512_load_si512(x + i * PAIR_CODES));
    }
    const __m512i fours =
        add_neighbours(add_neighbours(dots[0], dots[1]), add_neighbours(dots[2], dots[3]));
    const __m512i sums =
        _mm512_add_epi32(fours, _mm512_shuffle_i32x4(fours, fours, _MM_SHUFFLE(2, 3, 0, 1)));
    const __m512i order = _mm512_castsi256_si512(_mm256_setr_epi32(0, 8, 1, 9, 2, 10, 3, 11));
    return _mm512_castsi512_si256(_mm512_permutexvar_epi32(order, sums));
}
#else
/* The low four bits of the 32 inputs of a block of 4- or 6-bit codes: the second half of them lies
 * in the upper halves of the bytes. */
static ALWAYS_INLINE __m256i
load_nibbles(const uint8_t *block)
{
    const __m256i bytes =
        _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)(const void *)block));
    return _mm256_and_si256(_mm256_srlv_epi64(bytes, _mm256_set_epi64x(4, 4, 0, 0)),
                            _mm256_set1_epi8(15));
}

/* The upper two bits of the 32 inputs of a block of 6-bit codes, where they belong in a code. */
static ALWAYS_INLINE __m256i
load_upper_bits(const uint8_t *block)
{
    int64_t bytes;
    memcpy(&bytes, block + SQ_ROW_BLOCK / 2, sizeof bytes);
    const __m256i all = _mm256_set1_epi64x(bytes);
    const __m256i up = _mm256_sllv_epi64(all, _mm256_set_epi64x(64, 0, 2, 4)); /* 64: nothing */
    const __m256i down = _mm256_srlv_epi64(all, _mm256_set_epi64x(2, 64, 64, 64));
    return _mm256_and_si256(_mm256_or_si256(up, down), _mm256_set1_epi8(0x30));
}

/* Sums of four products of a block of codes at w and of x. */
static ALWAYS_INLINE __m256i
multiply_one_block(const uint8_t *w, const int8_t *x, const int bits)
{
    const __m256i a = _mm256_load_si256((const __m256i *)(const void *)x);
    __m256i codes;
    if (bits == 8) {
        codes = load_eight(w);
    }
    else {
        codes = load_nibbles(w);
        codes = bits == 6 ? _mm256_or_si256(codes, load_upper_bits(w)) : codes;
    }
#ifdef TILE_DOT8
    codes = bits == 8 ? _mm256_xor_si256(codes, _mm256_set1_epi8((char)0x80)) : codes;
    return TILE_DOT_256(_mm256_setzero_si256(), codes, a);
#else
    const __m256i ones = _mm256_set1_epi16(1);
    if (IS_SIGNED(bits)) { /* a pair is at most 2 * 128 * 127 */
        const __m256i pairs =
            _mm256_maddubs_epi16(_mm256_abs_epi8(codes), _mm256_sign_epi8(a, codes));
        return _mm256_madd_epi16(pairs, ones);
    }
    return _mm256_madd_epi16(_mm256_maddubs_epi16(codes, a), ones);
#endif
}

/* The sums of eight vectors. */
static ALWAYS_INLINE __m256i
sum_eight(const __m256i v[EIGHT])
{
    const __m256i a =
        _mm256_hadd_epi32(_mm256_hadd_epi32(v[0], v[1]), _mm256_hadd_epi32(v[2], v[3]));
    const __m256i b =
        _mm256_hadd_epi32(_mm256_hadd_epi32(v[4], v[5]), _mm256_hadd_epi32(v[6], v[7]));
    return _mm256_add_epi32(_mm256_permute2x128_si256(a, b, 0x20),
                            _mm256_permute2x128_si256(a, b, 0x31));
}

/* The products of `count` blocks of codes at w with x, summed block by block, and zeros up to
 * eight. */
static ALWAYS_INLINE __m256i
multiply_blocks(const uint8_t *w, const int8_t *x, const int bits, const int count)
{
    __m256i dots[EIGHT];
    UNROLL
    for (int i = 0; i < EIGHT; i++) {
        if (i >= count) {
            dots[i] = _mm256_setzero_si256();
            continue;
        }
        dots[i] = multiply_one_block(w + i * SQ_ROW_BLOCK * bits / 8, x + i * SQ_ROW_BLOCK, bits);
    }
    return sum_eight(dots);
}
#endif

/* Codes and scales of the last blocks of a table, fewer than eight, with zeros up to eight. */
struct row_tail {
    uint8_t codes[EIGHT * SQ_ROW_BLOCK];
    uint16_t scales[EIGHT];
};

static ALWAYS_INLINE void
copy_tail(const uint8_t *codes, int64_t bytes, const uint16_t *scales, int64_t count,
          struct row_tail *tail)
{
    memset(tail, 0, sizeof *tail);
    memcpy(tail->codes, codes, (size_t)sq_min_i64(bytes, sizeof tail->codes));
    memcpy(tail->scales, scales, (size_t)sq_min_i64(count, EIGHT) * sizeof *scales);
}

/* products [blocks], and what fills the last eight of them: what row r's blocks from number `first`
 * on add to the total of row `row` of x. The last eight may reach into the next row, whose codes
 * meet zeros. */
static ALWAYS_INLINE void
multiply_row(const struct sq_code_rows *w, int64_t r, const struct sq_token_rows *x, int64_t row,
             int64_t first, int64_t blocks, const int bits, float *products)
{
    const int64_t eight_bytes = EIGHT * SQ_ROW_BLOCK * bits / 8, at = row * x->ld + first;
    const int64_t row_bytes = sq_code_row_bytes(bits, w->k), row_scales = sq_code_row_scales(w->k);
    const uint8_t *codes = w->codes + r * row_bytes + first / EIGHT * eight_bytes;
    const uint16_t *w_scales = w->scales + r * row_scales + first;
    int64_t bytes = (w->rows - r) * row_bytes - first / EIGHT * eight_bytes; /* up to the end */
    int64_t scales = (w->rows - r) * row_scales - first;
    struct row_tail tail;
    for (int64_t b = 0; b < blocks; b += EIGHT) {
        const int8_t *a = x->codes + (at + b) * SQ_ROW_BLOCK;
        ask_lines(codes + ALONG_AHEAD, EIGHT * SQ_ROW_BLOCK * bits / 8);
        if (bytes < eight_bytes || scales < EIGHT) {
            copy_tail(codes, bytes, w_scales, scales, &tail);
            codes = tail.codes;
            w_scales = tail.scales;
        }
        __m256i sums = blocks - b > 2 ? multiply_blocks(codes, a, bits, EIGHT)
                                      : multiply_blocks(codes, a, bits, 2);
        if (!IS_SIGNED(bits)) {
            sums = _mm256_add_epi32(
                sums, _mm256_load_si256((const __m256i *)(const void *)(x->offsets + at + b)));
        }
        const __m256 w_scale = _mm256_castsi256_ps(load_eight_scales((const uint8_t *)w_scales));
        const __m256 scale = _mm256_mul_ps(w_scale, _mm256_load_ps(x->scales + at + b));
        _mm256_store_ps(products + b, _mm256_mul_ps(scale, _mm256_cvtepi32_ps(sums)));
        codes += eight_bytes;
        w_scales += EIGHT;
        bytes -= eight_bytes;
        scales -= EIGHT;
    }
}

/* totals [rows] += the sums over `blocks` blocks, in their order. */
static ALWAYS_INLINE void
sum_products(float products[ALONG_ROWS][ALONG_BLOCKS], int64_t blocks, float *totals)
{
    const struct row_group group = row_group(products, sizeof products[0]);
    vec_f sums = VEC(loadu_ps)(totals);
    for (int64_t b = 0; b < blocks; b += UNIT_DWORDS) {
        vec_i unit[UNIT_DWORDS];
        turn_unit(&group, b * (int64_t)sizeof(float), 0, unit);
        const int64_t count = sq_min_i64(UNIT_DWORDS, blocks - b);
        for (int64_t d = 0; d < count; d++) {
            sums = VEC(add_ps)(sums, VEC_AS_FLOAT(unit[d]));
        }
    }
    VEC(storeu_ps)(totals, sums);
}

static ALWAYS_INLINE void
along_rows(const struct sq_code_rows *w, int64_t n, const struct sq_token_rows *x, int64_t m,
           float *y, int64_t ld_y, const int bits)
{
    _Alignas(SQ_ALIGN_BYTES) float products[ALONG_ROWS][ALONG_BLOCKS];
    for (int64_t j = 0; j < n; j += ALONG_ROWS) {
        const int64_t rows = sq_min_i64(ALONG_ROWS, n - j);
        float totals[SQ_ROW_PARTS][ALONG_ROWS] = {{0.0f}};
        for (int64_t first = 0; first < x->blocks; first += ALONG_BLOCKS) {
            const int64_t blocks = sq_min_i64(ALONG_BLOCKS, x->blocks - first);
            for (int64_t row = 0; row < m * x->parts; row++) {
                for (int64_t r = 0; r < rows; r++) {
                    multiply_row(w, j + r, x, row, first, blocks, bits, products[r]);
                }
                sum_products(products, blocks, totals[row]);
            }
        }
        for (int64_t i = 0; i < m; i++) {
            for (int64_t r = 0; r < rows; r++) {
                y[i * ld_y + j + r] = totals[i * x->parts][r];
                for (int part = 1; part < x->parts; part++) {
                    y[i * ld_y + j + r] += totals[i * x->parts + part][r];
                }
            }
        }
    }
}

static ALWAYS_INLINE void
rows_of_bits(const struct sq_code_rows *w, int64_t n, const struct sq_token_rows *x, int64_t m,
             float *y, int64_t ld_y, const int bits)
{
    if ((m == 1 || m * x->parts <= ALONG_TOKENS) && x->blocks >= ALONG_LEAST) {
        along_rows(w, n, x, m, y, ld_y, bits);
    }
    else {
        gemm_rows_of(w, n, x, m, y, ld_y, bits);
    }
}

static void
gemm_rows(const struct sq_code_rows *w, int64_t n, const struct sq_token_rows *x, int64_t m,
          float *y, int64_t ld_y)
{
    switch (w->bits) {
        case 8:
            rows_of_bits(w, n, x, m, y, ld_y, 8);
            break;
        case 6:
            rows_of_bits(w, n, x, m, y, ld_y, 6);
            break;
        default:
            rows_of_bits(w, n, x, m, y, ld_y, 4);
    }
}
