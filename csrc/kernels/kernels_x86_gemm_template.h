/* SPDX-License-Identifier: Apache-2.0 */
/* The part of kernels_x86_template.h, which includes it, for tables with TILE_GEMM: float32
 * products and products with 16-bit floats. Its parameters and macros are that file's. */

/* ---- float32 gemm ----------------------------------------------------------------------- */

enum {
    MR_F32 = TILE_BITS == 256 ? 6 : 12, /* rows of a tile: 12 or 24 accumulators */
    NR_F32 = 2 * LANES,                 /* its columns */
    GEMM_KC = 256,
    GEMM_COPY_ROWS = 4 * MR_F32,
    STREAM_ROWS = 8,
    ROW_VECS = 64 / LANES, /* 64 columns */
    NARROW = 256
};

#if TILE_BITS == 256
typedef __m256i vec_mask;

/* Lanes 0 .. count - 1, count may be beyond either end. */
static ALWAYS_INLINE vec_mask
lane_mask(int64_t count)
{
    const __m256i index = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_cmpgt_epi32(_mm256_set1_epi32((int32_t)sq_max_i64(0, sq_min_i64(count, 8))),
                              index);
}

static ALWAYS_INLINE vec_f
load_lanes(const float *from, vec_mask mask)
{
    return _mm256_maskload_ps(from, mask);
}

static ALWAYS_INLINE void
store_lanes(float *to, vec_mask mask, vec_f x)
{
    _mm256_maskstore_ps(to, mask, x);
}
#else
typedef __mmask16 vec_mask;

static ALWAYS_INLINE vec_mask
lane_mask(int64_t count)
{
    return (vec_mask)((1u << sq_max_i64(0, sq_min_i64(count, 16))) - 1);
}

static ALWAYS_INLINE vec_f
load_lanes(const float *from, vec_mask mask)
{
    return _mm512_maskz_loadu_ps(mask, from);
}

static ALWAYS_INLINE void
store_lanes(float *to, vec_mask mask, vec_f x)
{
    _mm512_mask_storeu_ps(to, mask, x);
}
#endif

/* Columns of one strip, as the tiles see it: b is readable for NR_F32 columns whatever columns is.
 */
struct strip {
    int64_t columns, k;
    const float *a, *b;
    float *c;
    int64_t ld_a, ld_b, ld_c;
    int first;
};

/* Rows i .. i + rows - 1 of c (masked when tail) continue their chains over k. */
static ALWAYS_INLINE void
tile_f32(const struct strip *s, int64_t i, const int rows, const int tail)
{
    const float *a = s->a + i * s->ld_a, *b = s->b;
    float *c = s->c + i * s->ld_c;
    vec_f acc[MR_F32][2];
    UNROLL
    for (int r = 0; r < rows; r++) {
        UNROLL
        for (int v = 0; v < 2; v++) {
            const float *from = c + r * s->ld_c + LANES * v;
            acc[r][v] = s->first ? VEC(setzero_ps)()
                        : tail   ? load_lanes(from, lane_mask(s->columns - LANES * v))
                                 : VEC(loadu_ps)(from);
        }
    }
    for (int64_t p = 0; p < s->k; p++, b += s->ld_b) {
        const vec_f row[2] = {VEC(loadu_ps)(b), VEC(loadu_ps)(b + LANES)};
        UNROLL
        for (int r = 0; r < rows; r++) {
            const vec_f value = VEC(set1_ps)(a[r * s->ld_a + p]);
            UNROLL
            for (int v = 0; v < 2; v++) {
                acc[r][v] = VEC(fmadd_ps)(value, row[v], acc[r][v]);
            }
        }
    }
    UNROLL
    for (int r = 0; r < rows; r++) {
        UNROLL
        for (int v = 0; v < 2; v++) {
            float *to = c + r * s->ld_c + LANES * v;
            if (tail) {
                store_lanes(to, lane_mask(s->columns - LANES * v), acc[r][v]);
            }
            else {
                VEC(storeu_ps)(to, acc[r][v]);
            }
        }
    }
}

static void
strip_f32(const struct strip *s, int64_t m)
{
#define TILE_ROWS(rows)              \
    case rows:                       \
        if (s->columns >= NR_F32) {  \
            tile_f32(s, i, rows, 0); \
        }                            \
        else {                       \
            tile_f32(s, i, rows, 1); \
        }                            \
        break;
    for (int64_t i = 0; i < m; i += MR_F32) {
        switch (sq_min_i64(MR_F32, m - i)) {
            TILE_ROWS(1)
            TILE_ROWS(2)
            TILE_ROWS(3)
            TILE_ROWS(4)
            TILE_ROWS(5)
            TILE_ROWS(6)
#if TILE_BITS == 512
            TILE_ROWS(7)
            TILE_ROWS(8)
            TILE_ROWS(9)
            TILE_ROWS(10)
            TILE_ROWS(11)
            TILE_ROWS(12)
#endif
        }
    }
#undef TILE_ROWS
}

/* The chains of one row's columns, a multiple of LANES, go on over count rows of b. They wait in c.
 */
static ALWAYS_INLINE void
continue_row_f32(const int count, int64_t columns, const float *a, const float *b, int64_t ld_b,
                 float *c)
{
    vec_f value[STREAM_ROWS];
    UNROLL
    for (int q = 0; q < count; q++) {
        value[q] = VEC(set1_ps)(a[q]);
    }
    for (int64_t j = 0; j < columns; j += LANES) {
        vec_f acc = VEC(loadu_ps)(c + j);
        UNROLL
        for (int q = 0; q < count; q++) {
            acc = VEC(fmadd_ps)(value[q], VEC(loadu_ps)(b + q * ld_b + j), acc);
        }
        VEC(storeu_ps)(c + j, acc);
    }
}

/* One row times ROW_VECS vectors of columns of b: the chains stay in registers. */
static ALWAYS_INLINE void
narrow_row_f32(int64_t k, const float *a, const float *b, int64_t ld_b, float *c)
{
    vec_f acc[ROW_VECS];
    UNROLL
    for (int v = 0; v < ROW_VECS; v++) {
        acc[v] = VEC(setzero_ps)();
    }
    for (int64_t p = 0; p < k; p++) {
        const vec_f value = VEC(set1_ps)(a[p]);
        UNROLL
        for (int v = 0; v < ROW_VECS; v++) {
            acc[v] = VEC(fmadd_ps)(value, VEC(loadu_ps)(b + p * ld_b + LANES * v), acc[v]);
        }
    }
    UNROLL
    for (int v = 0; v < ROW_VECS; v++) {
        VEC(storeu_ps)(c + LANES * v, acc[v]);
    }
}

/* One row. A narrow b, such as a page of the KV cache, goes in strips of registers; a wide one is
 * streamed STREAM_ROWS rows at a time. Returns the number of columns done. */
static int64_t
row_f32(int64_t n, int64_t k, const float *a, const float *b, int64_t ld_b, float *c)
{
    const int64_t columns = n / LANES * LANES;
    int64_t j = 0;
    for (; columns <= NARROW && j + LANES * ROW_VECS <= columns; j += LANES * ROW_VECS) {
        narrow_row_f32(k, a, b + j, ld_b, c + j);
    }
    memset(c + j, 0, (size_t)(columns - j) * sizeof *c);
    int64_t p = 0;
    for (; p + STREAM_ROWS <= k && j < columns; p += STREAM_ROWS) {
        continue_row_f32(STREAM_ROWS, columns - j, a + p, b + p * ld_b + j, ld_b, c + j);
    }
    for (; p < k && j < columns; p++) {
        continue_row_f32(1, columns - j, a + p, b + p * ld_b + j, ld_b, c + j);
    }
    return columns;
}

/* Strips of NR_F32 columns times tiles of MR_F32 rows. A strip is copied to the stack when it is
 * the tail (to read no column past n) or when enough rows use it (long strides of b fall on few
 * cache sets). The chain over k is cut at GEMM_KC through c, which loses nothing: a stored float32
 * is what it was. */
static void
gemm_f32(int64_t m, int64_t n, int64_t k, const float *a, int64_t ld_a, const float *b,
         int64_t ld_b, float *c, int64_t ld_c)
{
    _Alignas(SQ_ALIGN_BYTES) float copy[GEMM_KC * NR_F32];
    int64_t j = m == 1 ? row_f32(n, k, a, b, ld_b, c) : 0;
    for (; j < n; j += NR_F32) {
        struct strip s = {.columns = sq_min_i64(n - j, NR_F32),
                          .c = c + j,
                          .ld_c = ld_c,
                          .ld_a = ld_a,
                          .ld_b = ld_b,
                          .first = 1};
        for (int64_t p = 0; p < k || s.first; p += GEMM_KC) {
            s.k = sq_min_i64(k - p, GEMM_KC);
            s.a = a + p;
            s.b = b + p * ld_b + j;
            if (s.columns < NR_F32 || m >= GEMM_COPY_ROWS) {
                for (int64_t q = 0; q < s.k; q++) {
                    float *to = copy + q * NR_F32;
                    for (int64_t v = 0; v < NR_F32; v += LANES) {
                        VEC(store_ps)
                        (to + v, load_lanes(s.b + q * ld_b + v, lane_mask(s.columns - v)));
                    }
                }
                s.b = copy;
                s.ld_b = NR_F32;
            }
            strip_f32(&s, m);
            s.ld_b = ld_b;
            s.first = 0;
        }
    }
}

/* ---- float32 x narrow weights ----------------------------------------------------------- */

/* What a weight is widened from. F32: it was widened before. */
enum narrow { NARROW_F32, NARROW_F16, NARROW_BF16 };

/* Of w and of x: 12 or 24 accumulators, and each widened weight meets all tokens of a tile. */
enum { HALF_ROWS = 4, HALF_TOKENS = TILE_BITS == 256 ? 3 : 6 };

/* LANES 16-bit floats, of which count exist; the others are 0. */
static ALWAYS_INLINE vec_f
load_widened_halves(const uint16_t *from, int64_t count, const int is_bf16)
{
    uint16_t tail[LANES] = {0};
    if (count < LANES) {
        memcpy(tail, from, (size_t)count * sizeof *from);
        from = tail;
    }
#if TILE_BITS == 256
    const __m128i v = _mm_loadu_si128((const __m128i *)from);
    return is_bf16 ? _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(v), 16))
                   : _mm256_cvtph_ps(v);
#else
    const __m256i v = _mm256_loadu_si256((const __m256i *)from);
    return is_bf16 ? _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16))
                   : _mm512_cvtph_ps(v);
#endif
}

/* Lanes in halves, the upper onto the lower: the same order on every call. */
static ALWAYS_INLINE float
sum_lanes(vec_f x)
{
#if TILE_BITS == 512
    const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
#else
    const __m256 eight = x;
#endif
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}

struct narrow_args {
    int64_t k;
    const float *x;
    const void *w; /* [rows][row_bytes] */
    int64_t row_bytes;
    float *y;
    int64_t ld_x, ld_y;
};

/* Row r's weights from input p on, of which count exist. */
static ALWAYS_INLINE vec_f
load_widened(const struct narrow_args *s, int r, int64_t p, int64_t count, const enum narrow kind)
{
    const void *row = (const uint8_t *)s->w + r * s->row_bytes;
    if (kind == NARROW_F32) { /* zeros lie behind the last */
        return VEC(loadu_ps)((const float *)row + p);
    }
    return load_widened_halves((const uint16_t *)row + p, count, kind == NARROW_BF16);
}

/* acc += the products of count values from input p on, LANES at most. */
static ALWAYS_INLINE void
multiply_narrow(const struct narrow_args *s, int64_t p, int64_t count, const int tokens,
                const int rows, const enum narrow kind, vec_f acc[HALF_TOKENS][HALF_ROWS])
{
    vec_f value[HALF_TOKENS];
    UNROLL
    for (int t = 0; t < tokens; t++) {
        value[t] = load_lanes(s->x + t * s->ld_x + p, lane_mask(count));
    }
    UNROLL
    for (int r = 0; r < rows; r++) {
        const vec_f weight = load_widened(s, r, p, count, kind);
        UNROLL
        for (int t = 0; t < tokens; t++) {
            acc[t][r] = VEC(fmadd_ps)(value[t], weight, acc[t][r]);
        }
    }
}

/* Asks for the line of input p in the rows of the tile after the next. HALF_ROWS short streams at
 * once are more than the CPU foresees: from memory, one token took up to 3 times as long. */
static ALWAYS_INLINE void
prefetch_rows(const struct narrow_args *s, int64_t p, const int rows)
{
    enum { LINE_BYTES = 64, STEP_BYTES = LANES * 2 };
    const int64_t byte = p * 2;
    if (byte % LINE_BYTES < STEP_BYTES) { /* the first step of a line */
        const char *next = (const char *)s->w + 2 * rows * s->row_bytes + byte;
        UNROLL
        for (int r = 0; r < rows; r++) {
            _mm_prefetch(next + r * s->row_bytes, _MM_HINT_T1);
        }
    }
}

/* y [tokens][rows]; lane l sums the products of k = l, l + LANES, ... */
static ALWAYS_INLINE void
tile_narrow(const struct narrow_args *s, const int tokens, const int rows, const enum narrow kind)
{
    vec_f acc[HALF_TOKENS][HALF_ROWS];
    UNROLL
    for (int t = 0; t < tokens; t++) {
        UNROLL
        for (int r = 0; r < rows; r++) {
            acc[t][r] = VEC(setzero_ps)();
        }
    }
    int64_t p = 0;
    for (; p + LANES <= s->k; p += LANES) {
        if (kind != NARROW_F32) {
            prefetch_rows(s, p, rows);
        }
        multiply_narrow(s, p, LANES, tokens, rows, kind, acc);
    }
    if (p < s->k) {
        multiply_narrow(s, p, s->k - p, tokens, rows, kind, acc);
    }
    UNROLL
    for (int t = 0; t < tokens; t++) {
        UNROLL
        for (int r = 0; r < rows; r++) {
            s->y[t * s->ld_y + r] = sum_lanes(acc[t][r]);
        }
    }
}

#define TOKENS_CASE(tokens)                       \
    case tokens:                                  \
        tile_narrow(&s, tokens, HALF_ROWS, kind); \
        break;

/* HALF_ROWS outputs of all tokens. */
static ALWAYS_INLINE void
rows_narrow(struct narrow_args s, int64_t m, const enum narrow kind)
{
    for (int64_t i = 0; i < m; i += HALF_TOKENS) {
        switch (sq_min_i64(HALF_TOKENS, m - i)) {
            TOKENS_CASE(1)
            TOKENS_CASE(2)
            TOKENS_CASE(3)
#if TILE_BITS == 512
            TOKENS_CASE(4)
            TOKENS_CASE(5)
            TOKENS_CASE(6)
#endif
        }
        s.x += HALF_TOKENS * s.ld_x;
        s.y += HALF_TOKENS * s.ld_y;
    }
}
#undef TOKENS_CASE

/* Inputs of rows that are widened before many tokens meet them: 96 KiB of stack. */
enum { WIDE_K = 6144 };

/* HALF_ROWS rows of s to wide [HALF_ROWS][WIDE_K], zeros up to a whole vector behind k. */
static ALWAYS_INLINE void
widen_rows(const struct narrow_args *s, float *wide, const enum narrow kind)
{
    for (int r = 0; r < HALF_ROWS; r++) {
        for (int64_t p = 0; p < s->k; p += LANES) {
            const int64_t count = sq_min_i64(LANES, s->k - p);
            VEC(storeu_ps)(wide + r * WIDE_K + p, load_widened(s, r, p, count, kind));
        }
    }
}

/* Rows of w outside, so that they stay in the cache while all tokens meet them. When these are
 * several tiles, HALF_ROWS rows are widened once for all. */
static ALWAYS_INLINE void
gemm_narrow(struct narrow_args s, int64_t m, int64_t n, const enum narrow kind)
{
    _Alignas(SQ_ALIGN_BYTES) float wide[HALF_ROWS * WIDE_K];
    const int widens = m > 2 * HALF_TOKENS && s.k <= WIDE_K;
    int64_t j = 0;
    for (int64_t rows = HALF_ROWS; j < n; j += rows) {
        if (n - j >= HALF_ROWS && widens) {
            struct narrow_args widened = s;
            widen_rows(&s, wide, kind);
            widened.w = wide;
            widened.row_bytes = WIDE_K * (int64_t)sizeof *wide;
            rows_narrow(widened, m, NARROW_F32);
        }
        else if (n - j >= HALF_ROWS) {
            rows_narrow(s, m, kind);
        }
        else {
            rows = 1;
            for (int64_t i = 0; i < m; i++) {
                struct narrow_args one = s;
                one.x += i * s.ld_x;
                one.y += i * s.ld_y;
                tile_narrow(&one, 1, 1, kind);
            }
        }
        s.w = (const uint8_t *)s.w + rows * s.row_bytes;
        s.y += rows;
    }
}

/* ---- float32 x pages of 16-bit floats --------------------------------------------------- */

enum { PAGE_ROWS = 4, PAGE_VECS = TILE_BITS == 256 ? 2 : 4, PAGE_AHEAD = 16 };

/* c [rows][vecs * LANES] for row `row` on and column `column` on: the chains of gemm_f32, with b
 * widened in registers. */
static ALWAYS_INLINE void
tile_page(const struct sq_page_args *s, int64_t row, int64_t column, const int rows, const int vecs,
          const int is_bf16)
{
    const float *a = s->a + row * s->ld_a;
    const uint16_t *b = s->b + column;
    /* The strips ask for the next page in the order of memory: its lines come one by one. */
    const uint16_t *next = s->next ? s->next + column * s->k : b + PAGE_AHEAD * s->ld_b;
    const int64_t step = s->next ? vecs * LANES : s->ld_b;
    float *c = s->c + row * s->ld_c + column;
    vec_f acc[PAGE_ROWS][PAGE_VECS];
    UNROLL
    for (int r = 0; r < rows; r++) {
        UNROLL
        for (int v = 0; v < vecs; v++) {
            acc[r][v] = VEC(setzero_ps)();
        }
    }
    for (int64_t p = 0; p < s->k; p++, b += s->ld_b, next += step) {
        vec_f wide[PAGE_VECS];
        UNROLL
        for (int v = 0; v < vecs; v++) {
            wide[v] = load_widened_halves(b + LANES * v, LANES, is_bf16);
            if (v * LANES % 32 == 0) { /* a line of memory */
                _mm_prefetch((const char *)(next + LANES * v), _MM_HINT_T0);
            }
        }
        UNROLL
        for (int r = 0; r < rows; r++) {
            const vec_f value = VEC(set1_ps)(a[r * s->ld_a + p]);
            UNROLL
            for (int v = 0; v < vecs; v++) {
                acc[r][v] = VEC(fmadd_ps)(value, wide[v], acc[r][v]);
            }
        }
    }
    UNROLL
    for (int r = 0; r < rows; r++) {
        UNROLL
        for (int v = 0; v < vecs; v++) {
            VEC(storeu_ps)(c + r * s->ld_c + LANES * v, acc[r][v]);
        }
    }
}

static ALWAYS_INLINE void
strip_page(const struct sq_page_args *s, int64_t row, const int rows, const int is_bf16)
{
    int64_t j = 0;
    for (; j + PAGE_VECS * LANES <= s->n; j += PAGE_VECS * LANES) {
        tile_page(s, row, j, rows, PAGE_VECS, is_bf16);
    }
    for (; j < s->n; j += LANES) {
        tile_page(s, row, j, rows, 1, is_bf16);
    }
}

static ALWAYS_INLINE void
gemm_page(const struct sq_page_args *s, const int is_bf16)
{
    for (int64_t i = 0; i < s->m; i += PAGE_ROWS) {
        switch (sq_min_i64(PAGE_ROWS, s->m - i)) {
            case 1:
                strip_page(s, i, 1, is_bf16);
                break;
            case 2:
                strip_page(s, i, 2, is_bf16);
                break;
            case 3:
                strip_page(s, i, 3, is_bf16);
                break;
            default:
                strip_page(s, i, 4, is_bf16);
        }
    }
}

static void
gemm_half(int is_bf16, int64_t m, int64_t n, int64_t k, const float *x, int64_t ld_x,
          const uint16_t *w, float *y, int64_t ld_y)
{
    const struct narrow_args s = {.k = k,
                                  .x = x,
                                  .w = w,
                                  .row_bytes = k * (int64_t)sizeof *w,
                                  .y = y,
                                  .ld_x = ld_x,
                                  .ld_y = ld_y};
    if (is_bf16) {
        gemm_narrow(s, m, n, NARROW_BF16);
    }
    else {
        gemm_narrow(s, m, n, NARROW_F16);
    }
}
