/* SPDX-License-Identifier: Apache-2.0 */
/* Checks the kernel tables of this machine without Python: packed products, gemm_f32, the quantizer
 * rows and rms_norm_row, against references written down here from the contracts in sq_kernels.h,
 * every buffer next to a page that may not be touched. For machines that exist only in an emulator;
 * the Python tests do more. Usage: check_tables TABLE, the table that must be the active one. */
#include <math.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "core/sq_internal.h"
#include "kernels/sq_kernels.h"
#include "core/sq_threads.h"

static long passed, failed;

#define CHECK(ok, ...)                     \
    do {                                   \
        if (ok) {                          \
            passed++;                      \
        }                                  \
        else if (++failed <= 20) {         \
            printf("FAILED " __VA_ARGS__); \
            printf("\n");                  \
        }                                  \
    } while (0)

/* ---- memory and numbers ----------------------------------------------------------------- */

enum { SLOTS = 10, SLOT_BYTES = 1 << 23 };
static char *slots[SLOTS];
static int at_end; /* buffers end at the page behind them, or begin at the one before */

static int
map_slots(void)
{
    const size_t page = (size_t)sysconf(_SC_PAGESIZE);
    for (int i = 0; i < SLOTS; i++) {
        char *memory = mmap(NULL, SLOT_BYTES + 2 * page, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (memory == MAP_FAILED || mprotect(memory, page, PROT_NONE) ||
            mprotect(memory + page + SLOT_BYTES, page, PROT_NONE)) {
            return 0;
        }
        slots[i] = memory + page;
    }
    return 1;
}

/* Bytes of slot i, at one of its ends, that hold NaN as floats and no small number as integers. */
static void *
guarded(int i, int64_t bytes)
{
    if (bytes > SLOT_BYTES) {
        printf("%lld bytes: a slot has %d\n", (long long)bytes, SLOT_BYTES);
        _exit(2);
    }
    char *p = at_end ? slots[i] + SLOT_BYTES - bytes : slots[i];
    return memset(p, 0xff, (size_t)bytes);
}

static float *
guarded_floats(int i, int64_t count)
{
    return guarded(i, count * (int64_t)sizeof(float));
}

static uint64_t state = 0x9e3779b97f4a7c15u;

/* xorshift64* */
static uint32_t
random_bits(void)
{
    state ^= state >> 12;
    state ^= state << 25;
    state ^= state >> 27;
    return (uint32_t)(state * 0x2545f4914f6cdd1du >> 32);
}

/* Between -1 and 1, with all the bits of a float32. */
static float
random_float(void)
{
    return (float)((int32_t)random_bits() | 1) * 0x1p-31f;
}

static void
fill_floats(float *x, int64_t count)
{
    for (int64_t i = 0; i < count; i++) {
        x[i] = random_float();
    }
}

static int
same_bytes(const void *a, const void *b, int64_t bytes)
{
    return memcmp(a, b, (size_t)bytes) == 0;
}

/* Equal as numbers (0 == -0), none of them NaN. */
static int
same_floats(const float *a, const float *b, int64_t count)
{
    for (int64_t i = 0; i < count; i++) {
        if (!(a[i] == b[i])) {
            return 0;
        }
    }
    return 1;
}

/* ---- packed rows ------------------------------------------------------------------------ */

enum weights { RANDOM, EXTREMES, LOWEST, WEIGHTS };

static void
fill_words(int32_t *words, int64_t count, enum weights kind)
{
    for (int64_t i = 0; i < count; i++) {
        uint32_t word = random_bits();
        if (kind == EXTREMES) { /* nibbles 0 and 15: codes -8 and 7 */
            word = (word & 0x11111111u) * 15;
        }
        words[i] = kind == LOWEST ? 0 : (int32_t)word;
    }
}

static void
fill_codes(int8_t *codes, int64_t count, int bits, enum weights kind)
{
    const int half = 1 << (bits - 1);
    for (int64_t i = 0; i < count; i++) {
        const int any = (int)(random_bits() % (unsigned)(2 * half)) - half;
        codes[i] = (int8_t)(kind == RANDOM ? any : kind == LOWEST || any < 0 ? -half : half - 1);
    }
}

static int
code_of(const int32_t *words, int64_t index)
{
    return (int)((uint32_t)words[index / 8] >> (4 * (index % 8)) & 15) - 8;
}

/* Output j of one row of codes or values, as sq_kernels.h defines it. weights: words of w_bits 4,
 * codes of 8. scales [k / g][ld_scales] */
static float
expected_output(const struct sq_panel_args *args, const void *weights, int w_bits, int64_t row,
                int64_t j, int bits)
{
    float total = 0.0f;
    for (int64_t begin = 0; begin < args->k; begin += args->g) {
        int64_t sum = 0;
        float chain = 0.0f;
        for (int64_t k = begin; k < begin + args->g; k++) {
            const int64_t index = j * args->k + k;
            const int code =
                w_bits == 8 ? ((const int8_t *)weights)[index] : code_of(weights, index);
            if (bits == 16) {
                chain = fmaf(((const float *)args->a)[row * args->ld_a + k], (float)code, chain);
            }
            else {
                sum += ((const int8_t *)args->a)[row * args->ld_a + k] * code;
            }
        }
        const float scale = args->w_scales[begin / args->g * args->ld_y + j];
        const float product = scale * (bits == 16 ? chain : (float)sum);
        total += product;
    }
    return bits == 16 ? total : args->a_scales[row] * total;
}

/* The sums before each block of SQ_K_ALIGN codes. */
static void
fill_sums(const int8_t *codes, int64_t k, int32_t *sums)
{
    sums[0] = 0;
    for (int64_t i = 0; i < k; i++) {
        const int32_t before = i % SQ_K_ALIGN ? sums[i / SQ_K_ALIGN + 1] : sums[i / SQ_K_ALIGN];
        sums[i / SQ_K_ALIGN + 1] = before + codes[i];
    }
}

/* The kernel of activations and weights of so many bits. */
static sq_panel_kernel
kernel_of(const struct sq_kernels *t, int bits, int w_bits)
{
    if (w_bits == 8) {
        return bits == 16 ? t->gemm_a16w8 : t->gemm_a8w8;
    }
    return bits == 4 ? t->gemm_a4w4 : bits == 8 ? t->gemm_a8w4 : t->gemm_a16w4;
}

/* One panel kernel on m rows of k inputs, all buffers guarded. */
static void
check_panel(const struct sq_kernels *t, int bits, int w_bits, int64_t m, int64_t k, int64_t g,
            int accumulate, enum weights kind)
{
    const int64_t nr = t->nr, blocks = k / SQ_K_ALIGN + 1;
    void *weights = guarded(0, nr * k * w_bits / 8);
    uint8_t *panel = guarded(1, nr * k * w_bits / 8);
    float *w_scales = guarded_floats(2, k / g * nr), *y = guarded_floats(3, m * nr);
    float *a_scales = guarded_floats(4, m), *want = guarded_floats(5, m * nr);
    int32_t *sums = guarded(6, m * blocks * (int64_t)sizeof *sums);
    void *a = guarded(7, m * k * (bits == 16 ? (int64_t)sizeof(float) : 1));
    if (w_bits == 8) {
        fill_codes(weights, nr * k, 8, kind);
    }
    else {
        fill_words(weights, nr * k / 8, kind);
    }
    fill_floats(w_scales, k / g * nr);
    fill_floats(a_scales, m);
    fill_floats(y, m * nr);
    for (int64_t i = 0; i < m; i++) {
        if (bits == 16) {
            fill_floats((float *)a + i * k, k);
        }
        else {
            fill_codes((int8_t *)a + i * k, k, bits, kind);
            fill_sums((int8_t *)a + i * k, k, sums + i * blocks);
        }
    }
    const struct sq_panel_args args = {.m = m,
                                       .k = k,
                                       .g = g,
                                       .a = a,
                                       .ld_a = k,
                                       .a_scales = a_scales,
                                       .a_sums = sums,
                                       .ld_sums = blocks,
                                       .panel = panel,
                                       .next = panel,
                                       .next_bytes = m % 2 * k * nr * w_bits / 8,
                                       .w_scales = w_scales,
                                       .y = y,
                                       .ld_y = nr,
                                       .accumulate = accumulate};
    for (int64_t i = 0; i < m * nr; i++) {
        const float value = expected_output(&args, weights, w_bits, i / nr, i % nr, bits);
        want[i] = accumulate ? y[i] + value : value;
    }
    if (w_bits == 8) {
        t->pack_panel_w8(weights, k, panel);
    }
    else {
        t->pack_panel(weights, k, panel);
    }
    kernel_of(t, bits, w_bits)(&args);
    CHECK(same_floats(y, want, m * nr), "%s a%dw%d panel: m %d k %d g %d accumulate %d weights %d",
          t->name, bits, w_bits, (int)m, (int)k, (int)g, accumulate, (int)kind);
}

static void
check_panels(const struct sq_kernels *t, int bits, int w_bits)
{
    static const int64_t lengths[][2] = {{32, 32},   {64, 32},  {64, 64},    {96, 96},  {256, 128},
                                         {544, 544}, {544, 32}, {1088, 544}, {576, 576}};
    for (size_t i = 0; i < sizeof lengths / sizeof lengths[0]; i++) {
        for (int64_t m = 1; m <= 33; m++) {
            check_panel(t, bits, w_bits, m, lengths[i][0], lengths[i][1], (int)(m + (int64_t)i) % 2,
                        bits == 16 ? RANDOM : (enum weights)(m % WEIGHTS));
        }
    }
    /* The longest group: sums at the ends of 32 bits. */
    for (int kind = RANDOM; bits != 16 && kind < WEIGHTS; kind++) {
        const int64_t k = w_bits == 8 ? SQ_PACKED_K_MAX_W8
                                      : SQ_PACKED_K_MAX * (int64_t)16 / (t->nr > 16 ? t->nr : 16);
        check_panel(t, bits, w_bits, 3, k, k, 0, (enum weights)kind);
    }
}

/* ---- linears ---------------------------------------------------------------------------- */

struct shape {
    int64_t m, n, k, g, high;
};

/* y [m][n] of x through one table, into a guarded slot; NULL after an error. */
static float *
linear(const struct sq_kernels *t, int slot, int bits, int w_bits, const struct shape *s,
       const int32_t *words, const float *scales, const float *x, struct sq_activations *a)
{
    sq_packed_t *w = NULL;
    float *y = guarded_floats(slot, s->m * s->n);
    const size_t bytes = sq_activations_workspace_bytes(bits, s->m, s->k);
    /* 64 bytes aligned at either end */
    void *memory = guarded(slot + 1, (int64_t)sq_align_bytes(bytes));
    int status = sq_packed_create(t, words, scales, s->n, s->k, s->g, s->high, w_bits, &w);
    if (!status) {
        status =
            sq_activations_prepare(t, bits, 0.9f, s->high, NULL, x, s->m, s->k, NULL, memory, a);
    }
    if (!status) {
        status = sq_linear_packed(w, a, y, s->n);
    }
    sq_packed_destroy(w);
    return status ? NULL : y;
}

/* A table against the generic one: equal for codes, within the bound of a float32 chain, (2 k + 2)
 * eps sum |x w|, otherwise. */
static void
check_linear(const struct sq_kernels *t, int bits, int w_bits, const struct shape *s)
{
    const int64_t words_row = sq_packed_words(w_bits, s->k), groups = s->g ? s->k / s->g : 1;
    int32_t *words = guarded(0, s->n * words_row * 4);
    float *scales = guarded_floats(1, s->n * groups), *x = guarded_floats(2, s->m * s->k);
    fill_words(words, s->n * words_row, s->m % 2 ? RANDOM : EXTREMES);
    fill_floats(scales, s->n * groups);
    fill_floats(x, s->m * s->k);
    struct sq_activations a, b;
    const float *y = linear(t, 3, bits, w_bits, s, words, scales, x, &a);
    const float *z = linear(&sq_kernels_generic, 5, bits, w_bits, s, words, scales, x, &b);
    int8_t *codes = guarded(7, s->n * s->k);
    int same = y && z && !sq_unpack_codes(w_bits, words, s->n, s->k, codes);
    if (same && bits != 16) {
        same = same_bytes(y, z, s->m * s->n * 4) && same_bytes(a.codes, b.codes, s->m * a.ld) &&
               same_bytes(a.scales, b.scales, s->m * (s->high ? 8 : 4)) &&
               same_bytes(a.sums, b.sums, s->m * (a.ld / SQ_K_ALIGN + 1) * 4);
    }
    for (int64_t i = 0; same && bits == 16 && i < s->m * s->n; i++) {
        const int64_t row = i / s->n, j = i % s->n;
        double size = 0.0;
        for (int64_t k = 0; k < s->k; k++) {
            const float scale = scales[j * groups + (s->g ? k / s->g : 0)];
            size += fabs((double)x[row * s->k + k] * scale * codes[j * s->k + k]);
        }
        same = fabs((double)y[i] - z[i]) <= (double)(4 * s->k + 4) * 0x1p-24 * size;
    }
    CHECK(same, "%s a%dw%d linear: m %d n %d k %d g %d high %d", t->name, bits, w_bits, (int)s->m,
          (int)s->n, (int)s->k, (int)s->g, (int)s->high);
}

static void
check_linears(const struct sq_kernels *t)
{
    static const struct shape inputs[] = {
        /* k, g and high; m and n are below */
        {0, 0, 1, 0, 0},     {0, 0, 31, 0, 0},    {0, 0, 33, 0, 0},     {0, 0, 129, 0, 0},
        {0, 0, 64, 32, 0},   {0, 0, 256, 128, 0}, {0, 0, 1088, 544, 0}, {0, 0, 100, 0, 32},
        {0, 0, 192, 64, 64}, {0, 0, 577, 0, 64}};
    static const int64_t outputs[] = {1, 7, 15, 16, 17, 31, 32, 33, 48, 63, 64, 65};
    static const int all_bits[] = {4, 8, 16}, weight_bits[] = {5, 6, 8};
    for (size_t i = 0; i < sizeof inputs / sizeof inputs[0]; i++) {
        for (size_t j = 0; j < sizeof outputs / sizeof outputs[0]; j++) {
            struct shape s = inputs[i];
            s.n = outputs[j];
            s.m = 1 + (int64_t)(i * 12 + j * 5) % 33;
            for (int b = 0; b < (s.high ? 1 : 3); b++) { /* high inputs beside 4 bits only */
                check_linear(t, all_bits[b], 4, &s);
                check_linear(t, all_bits[b], weight_bits[(i + j) % 3], &s);
            }
        }
    }
    /* More rows than a block of them, more work than one thread keeps. */
    const struct shape large = {75, 41, 4096, 128, 0};
    check_linear(t, 4, 4, &large);
    check_linear(t, 8, 8, &large);
}

/* ---- other rows ------------------------------------------------------------------------- */

static void
check_gemm_f32(const struct sq_kernels *t, int64_t m, int64_t n, int64_t k)
{
    const int64_t ld_a = k + m % 3, ld_b = n + k % 3, ld_c = n + m % 2;
    const int64_t size_a = (m - 1) * ld_a + k, size_b = k ? (k - 1) * ld_b + n : 0;
    const int64_t size_c = (m - 1) * ld_c + n;
    float *a = guarded_floats(0, size_a), *b = guarded_floats(1, size_b);
    float *c = guarded_floats(2, size_c), *want = guarded_floats(3, size_c);
    fill_floats(a, size_a);
    fill_floats(b, size_b);
    fill_floats(c, size_c);
    memcpy(want, c, (size_t)size_c * sizeof *c); /* what lies between the rows stays */
    for (int64_t i = 0; i < m; i++) {
        for (int64_t j = 0; j < n; j++) {
            float chain = 0.0f;
            for (int64_t p = 0; p < k; p++) {
                chain = fmaf(a[i * ld_a + p], b[p * ld_b + j], chain);
            }
            want[i * ld_c + j] = chain;
        }
    }
    t->gemm_f32(m, n, k, a, ld_a, b, ld_b, c, ld_c);
    CHECK(same_floats(c, want, size_c), "%s gemm_f32: m %d n %d k %d", t->name, (int)m, (int)n,
          (int)k);
}

static void
check_gemms(const struct sq_kernels *t)
{
    static const int64_t inner[] = {0, 1, 3, 4, 8, 13, 257};
    for (int64_t m = 1; m <= 33; m++) {
        for (int64_t n = 1; n <= 65; n += 1 + n % 4) {
            check_gemm_f32(t, m, n, inner[(m * 5 + n) % 7]);
        }
    }
    check_gemm_f32(t, 64, 16, 512);
    check_gemm_f32(t, 65, 33, 513);
    check_gemm_f32(t, 150, 100, 300);
}

static void
check_extremes(const struct sq_kernels *t, int64_t k)
{
    float *x = guarded_floats(0, k), low, high, want_low = INFINITY, want_high = -INFINITY;
    fill_floats(x, k);
    for (int64_t i = 0; i < k; i++) {
        want_low = fminf(want_low, x[i]);
        want_high = fmaxf(want_high, x[i]);
    }
    const int finite = t->extremes(x, k, &low, &high);
    CHECK(finite && low == want_low && high == want_high, "%s extremes: k %d", t->name, (int)k);
    for (int64_t i = 0; i < k; i++) {
        static const float bad[] = {INFINITY, -INFINITY, NAN};
        const float kept = x[i];
        x[i] = bad[i % 3];
        CHECK(!t->extremes(x, k, &low, &high), "%s extremes: k %d, not finite at %d", t->name,
              (int)k, (int)i);
        x[i] = kept;
    }
}

/* Every table takes the generic one's code for x: ties to even, clamped, Inf included. */
static void
check_quantize_codes(const struct sq_kernels *t, int64_t k)
{
    static const struct {
        float inv_scale, low, high;
        int offset;
    } grids[] = {{1.0f, -8, 7, 0},      {3.7f, -128, 127, 0}, {40.0f, -3, 12, 3},
                 {99.0f, -255, 0, 255}, {0x1p126f, -8, 7, 0}, {0x1p-126f, 0, 255, 0}};
    float *x = guarded_floats(0, k);
    int8_t *codes = guarded(1, k), *want = guarded(2, k);
    for (size_t i = 0; i < sizeof grids / sizeof grids[0]; i++) {
        for (int64_t j = 0; j < k; j++) { /* halves, then large and small values */
            x[j] = j % 2 ? (float)(random_bits() % 40) * 0.5f - 10.0f
                         : ldexpf(random_float(), (int)(random_bits() % 60) - 30);
        }
        sq_kernels_generic.quantize_codes(x, k, grids[i].inv_scale, grids[i].low, grids[i].high,
                                          grids[i].offset, want);
        t->quantize_codes(x, k, grids[i].inv_scale, grids[i].low, grids[i].high, grids[i].offset,
                          codes);
        CHECK(same_bytes(codes, want, k), "%s quantize_codes: k %d, grid %d", t->name, (int)k,
              (int)i);
    }
}

static void
check_sums_of_squares(const struct sq_kernels *t, int64_t k)
{
    enum { STEPS = 7 };
    struct sq_step steps[STEPS];
    double errors[STEPS], want[STEPS];
    float *x = guarded_floats(0, k), *weight = guarded_floats(1, k);
    float *y = guarded_floats(2, k), *z = guarded_floats(3, k);
    fill_floats(x, k);
    fill_floats(weight, k);
    for (int c = 0; c < STEPS; c++) {
        steps[c] = (struct sq_step){fabsf(random_float()) * 0.3f, -8.0f, 7.0f};
    }
    sq_kernels_generic.quantize_errors(x, k, steps, STEPS, want);
    t->quantize_errors(x, k, steps, STEPS, errors);
    CHECK(same_bytes(errors, want, sizeof want), "%s quantize_errors: k %d", t->name, (int)k);
    sq_kernels_generic.rms_norm_row(x, weight, k, 1e-5f, z);
    t->rms_norm_row(x, weight, k, 1e-5f, y);
    CHECK(same_bytes(y, z, k * 4), "%s rms_norm_row: n %d", t->name, (int)k);
    t->rms_norm_row(x, weight, k, 1e-5f, x);
    CHECK(same_bytes(x, z, k * 4), "%s rms_norm_row in place: n %d", t->name, (int)k);
}

/* ---- all tables ------------------------------------------------------------------------- */

static void
check_table(const struct sq_kernels *t)
{
    static const int all_bits[] = {4, 8, 16};
    const int fused = strcmp(t->name, "generic") != 0; /* its chains are plain */
    for (at_end = 0; at_end < 2; at_end++) {
        for (int b = 0; b < 2 + fused; b++) {
            check_panels(t, all_bits[b], 4);
            if (all_bits[b] != 4) {
                check_panels(t, all_bits[b], 8);
            }
        }
        for (int64_t k = 1; k <= 70; k++) {
            check_extremes(t, k);
            check_quantize_codes(t, k);
            check_sums_of_squares(t, k);
        }
        if (fused) {
            check_linears(t);
            check_gemms(t);
        }
    }
}

int
main(int argc, char **argv)
{
    if (argc != 2 || sq_kernels_init(NULL) || !map_slots()) {
        printf("usage: check_tables TABLE\n");
        return 2;
    }
    sq_set_num_threads(2);
    for (const struct sq_kernels *const *t = sq_kernels_compiled(); *t; t++) {
        const long before = passed;
        if (sq_kernels_runnable(*t)) {
            check_table(*t);
            printf("%s: runnable, %ld passed\n", (*t)->name, passed - before);
        }
        else {
            printf("%s: not runnable\n", (*t)->name);
        }
    }
    const char *active = sq_kernels_active()->name;
    CHECK(!strcmp(active, argv[1]), "active table: expected %s, found %s", argv[1], active);
    printf("%s active; %ld passed, %ld failed\n", active, passed, failed);
    return failed != 0;
}
