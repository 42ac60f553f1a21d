/* SPDX-License-Identifier: Apache-2.0 */
/* The kernel table of one instruction set, the list of tables, and the active one.
 *
 * A table is the generic one with rows overwritten, so that no pointer is ever NULL. Microkernels
 * return void: the sq_*.c layer has checked shapes and ranges. */
#ifndef SQ_KERNELS_H
#define SQ_KERNELS_H

#include <stddef.h>
#include <stdint.h>

#include "kernels/code_rows.h"
#include "kernels/column_pairs.h"
#include "kernels/gptq_lanes.h"

/* Arguments of c [m][n] = a [m][k] b [k][n] for b in 16-bit floats. */
struct sq_page_args {
    int is_bf16; /* else float16 */
    int64_t m, n, k, ld_a, ld_b, ld_c;
    const float *a;
    const uint16_t *b;
    float *c;
    const uint16_t *next; /* as large as b, for memory to bring near meanwhile; NULL: unknown */
};

/* Arguments of the packed microkernels: rows of activations against one panel of nr outputs. */
struct sq_panel_args {
    int64_t m;             /* rows, any number from 1 */
    int64_t k;             /* padded to SQ_K_ALIGN */
    int64_t g;             /* group length, a multiple of SQ_K_ALIGN, or k (padded) */
    const void *a;         /* codes int8 or values float, [m][ld_a] */
    int64_t ld_a;          /* elements */
    const float *a_scales; /* [m], unused for float activations, like the sums */
    const int32_t *a_sums; /* [m][ld_sums]: sum of the codes before each block of SQ_K_ALIGN */
    int64_t ld_sums;       /* at least k / SQ_K_ALIGN + 1 */
    const uint8_t *panel;  /* in the table's own order, SQ_ALIGN_BYTES aligned */
    const uint8_t *next;   /* next_bytes that will be read soon: memory may be asked for them */
    int64_t next_bytes;    /* more than 0 only where the panel itself is in a cache */
    const float *w_scales; /* [k / g][nr], zero padded */
    float *y;              /* [m][ld_y], nr columns are written */
    int64_t ld_y;
    int accumulate; /* 1: y += the result, rounded before it is added */
};

/* Codes: y = a_scale * sum over groups, ascending, of w_scale * (float)(exact integer sum),
 * products and sums rounded one by one, so that every table gives the same bits. Values: y = sum
 * over groups of w_scale * (chain of multiply-adds over the group's k, ascending, from zero). */
typedef void (*sq_panel_kernel)(const struct sq_panel_args *args);

/* One candidate of the clip search: codes less zero are in low .. high, low <= 0 <= high. */
struct sq_step {
    float scale, low, high;
};

/* The clip search in integers. Values u are in units of 1 / SQ_FIXED_PEAK of the row's largest, a
 * multiple of 7 * 50, so that clip ratio (50 - i) / 50 has the integer step SQ_FIXED_STEP(i):
 *     code = min(round(|u| / step), u < 0 ? 8 : 7),    error = sum (|u| - step code)^2.
 * The quotient is (|u| inverse + 2^14 >> 15), in 1/256, rounded again by (v + 128) >> 8. An element
 * within 2e-3 steps of a boundary may get either code, at the same error but for that. */
#define SQ_FIXED_PEAK 10150
#define SQ_FIXED_STEP(i) (SQ_FIXED_PEAK / 350 * (50 - (i)))
#define SQ_FIXED_INVERSE(step) (((1 << 23) + (step) / 2) / (step))
/* int32 lanes hold the pair sums of this many elements of 16-bit vectors of 16 lanes. */
#define SQ_FIXED_BLOCK 512
#define SQ_FIXED_ALIGN 16
#define SQ_FIXED_BATCH 4
struct sq_fixed_steps {
    int16_t step[SQ_FIXED_BATCH], inverse[SQ_FIXED_BATCH]; /* falling steps */
};
struct sq_fixed_errors {
    int64_t error[SQ_FIXED_BATCH];
    int64_t clipped; /* sum max(0, |u| - 8 or 7 steps)^2 for the last step */
};

/* A block of the quantized KV cache: rows of n codes without sign to out [rows][n] = scale * code +
 * minimum. A row has its codes in groups of 8 bytes: with 8 bits a group is 8 codes, with 4 bits
 * 16, number j in the low nibble of byte j and number j + 8 in the high one; what lies behind n is
 * read, not used. scales and minima are [rows] when by_row and [n] otherwise, and each was a 16-bit
 * float. A product of 8 and 11 significant bits is exact in float32, so that every table gives the
 * same bits. */
typedef void (*sq_kv_kernel)(const uint8_t *codes, const float *scales, const float *minima,
                             int by_row, int64_t rows, int64_t n, float *out);

struct sq_kernels {
    const char *name;
    uint32_t required_features;
    const struct sq_kernels *base; /* fills the missing rows; NULL: the generic table */
    /* The multiply steps of gemm_a4w4, gemm_a8w4, gemm_a16w4, as sq_peaks.c names them; NULL where
     * the compiler chooses. */
    const char *steps[3];
    int64_t mr, nr; /* tile of the packed microkernels; nr * SQ_K_ALIGN / 2 bytes keep alignment */
    int64_t row_block_bytes; /* activations that one panel meets before the next one does */

    /* words [nr][k / 8], k a multiple of SQ_K_ALIGN, into one panel of nr * k / 2 bytes. */
    void (*pack_panel)(const int32_t *words, int64_t k, uint8_t *panel);
    sq_panel_kernel gemm_a4w4, gemm_a8w4, gemm_a16w4;
    /* The same of bytes: codes [nr][k] of at most 8 bits into one panel of nr * k bytes. Activation
     * codes of 4 bits go through gemm_a8w8 too. */
    void (*pack_panel_w8)(const int8_t *codes, int64_t k, uint8_t *panel);
    sq_panel_kernel gemm_a8w8, gemm_a16w8;
    /* Thin panels (thin_panels.h) of 5 and 6 bits: the bytes of such a panel that a block has, the
     * byte of code 0 in the wide one (the others follow modulo 256), and how to make it wide. */
    int thin_block, w8_zero;
    void (*widen_panel)(int bits, const uint8_t *thin, int64_t bytes, int zero, uint8_t *panel);
    /* Codes against thin panels, for up to thin_rows rows (0: for none); more are faster with a
     * wide panel. */
    int64_t thin_rows;
    sq_panel_kernel gemm_a8w5, gemm_a8w6;
    /* gemm_a8w8 for panels whose codes have 5 and 6 bits, made wide with 2^(bits - 1) as the byte
     * of code 0. NULL where it would gain nothing. */
    sq_panel_kernel gemm_a8w5_in_bytes, gemm_a8w6_in_bytes;

    /* c [m][n] = a [m][k] b [k][n]: every element is one chain of fused (or, in the generic table,
     * plain) multiply-adds over k in ascending order, from zero, whatever m and n are. */
    void (*gemm_f32)(int64_t m, int64_t n, int64_t k, const float *a, int64_t ld_a, const float *b,
                     int64_t ld_b, float *c, int64_t ld_c);

    /* The same for b in 16-bit floats, and n a multiple of 16: for few rows. NULL: there is none.
     */
    void (*gemm_page)(const struct sq_page_args *args);

    /* y [m][n] = x [m][k] w^T for 16-bit w [n][k]: float16, or bfloat16 when is_bf16. For few
     * tokens: w is widened in registers. An element's sum is in a fixed order, whatever m and n
     * are. */
    void (*gemm_half)(int is_bf16, int64_t m, int64_t n, int64_t k, const float *x, int64_t ld_x,
                      const uint16_t *w, float *y, int64_t ld_y);
    /* y [m][n] = x w^T for the first n rows of codes w and m tokens, m * parts <= SQ_ROW_TOKENS. A
     * row of x gives the sum over blocks, ascending, of (w_scale * x_scale) * (float)(exact integer
     * sum), products and sums rounded one by one; a token is the sum of its rows in their order.
     * Equal bits on every table, whatever m and n are. */
    void (*gemm_rows)(const struct sq_code_rows *w, int64_t n, const struct sq_token_rows *x,
                      int64_t m, float *y, int64_t ld_y);

    /* round_gptq_columns of gptq_lanes.h. Equal bytes on every table. */
    void (*gptq_columns)(const struct sq_gptq_columns *columns, struct sq_gptq_lanes *lanes);
    /* sylvester_stages of sylvester.h. Equal bits on every table. */
    void (*sylvester)(float *x, int64_t count, int64_t from, int64_t to, float scale);
    /* sum_pairs and rotate_pairs of column_pairs.h. Equal bits on every table. */
    struct sq_pair_sums (*sum_pairs)(const double *a, const double *b, int64_t rows);
    void (*rotate_pairs)(double *a, double *b, int64_t rows, double c, double s);

    /* Smallest and largest of x [k], k >= 1, a zero of either sign where both are there; 1 is
     * returned if all are finite (else ignore them). */
    int (*extremes)(const float *x, int64_t k, float *min, float *max);
    /* codes [k] <- clamp(rint(x * inv_scale), low, high) + offset, low 8 bits; halves to even. low
     * and high are integers in -255 .. 255. Equal bytes on every table. */
    void (*quantize_codes)(const float *x, int64_t k, float inv_scale, float low, float high,
                           int offset, int8_t *codes);
    /* errors [count] <- squared error of rounding x with each of steps: element i is added to lane
     * i mod 8 in float64, lanes as ((0+4)+(2+6)) + ((1+5)+(3+7)). Equal bits on every table. */
    void (*quantize_errors)(const float *x, int64_t k, const struct sq_step *steps, int count,
                            double *errors);
    /* u [k] <- rint(x * inv_unit), which the caller keeps within 15 bits; zeros are written from k
     * to the next multiple of SQ_FIXED_ALIGN. Equal bytes on every table. */
    void (*fixed_point)(const float *x, int64_t k, float inv_unit, int16_t *u);
    /* Squared errors of rounding u [k], as fixed_point writes it, with each of a batch of steps,
     * and a lower bound for those of all smaller steps. Equal integers on every table. */
    void (*fixed_errors)(const int16_t *u, int64_t k, const struct sq_fixed_steps *steps,
                         struct sq_fixed_errors *errors);
    /* y = (x * (float)(1 / sqrt(mean(x^2) + eps))) * weight; the squares are summed like the errors
     * above. Equal bits on every table. y may be x. */
    void (*rms_norm_row)(const float *x, const float *weight, int64_t n, float eps, float *y);
    /* y [n] = silu(gate) * up; y may be gate or up. */
    void (*silu_mul)(const float *gate, const float *up, int64_t n, float *y);
    /* x [n] <- softmax(scale * x), sums in a fixed order; zeros are written from n to n_padded. */
    void (*softmax_row)(float *x, int64_t n, int64_t n_padded, float scale);
    /* 16-bit to float32; 1 is returned if all are finite. */
    int (*f16_to_f32)(const uint16_t *in, int64_t count, float *out);
    int (*bf16_to_f32)(const uint16_t *in, int64_t count, float *out);
    /* float32 to float16, halves to even; beyond +-65504 becomes that, NaN stays NaN. Equal bits
     * on every table. */
    void (*f32_to_f16)(const float *in, int64_t count, uint16_t *out);
    sq_kv_kernel kv8_to_f32, kv4_to_f32;
};

#define SQ_NR_MAX 64

/* Tables compiled in, best first; NULL-terminated. Valid after sq_kernels_init. */
const struct sq_kernels *const *
sq_kernels_compiled(void);

int
sq_kernels_runnable(const struct sq_kernels *table);

/* Bits of sq_cpu.h that the table requires and this machine lacks. */
uint32_t
sq_kernels_missing_features(const struct sq_kernels *table);

/* Whether the table, or one that it is built on, was named in sq_kernels_init's disabled. */
int
sq_kernels_disabled(const struct sq_kernels *table);

/* Fills the tables and selects the best runnable one that is neither named in disabled (comma
 * separated, or NULL) nor built on one that is. Returns 0, or -1 when disabled holds an unknown
 * name. Call once, before any other use. */
int
sq_kernels_init(const char *disabled);

/* The table in use. */
const struct sq_kernels *
sq_kernels_active(void);

/* Switches the table (tests). 0, or -1 if the name is unknown or cannot run here. */
int
sq_kernels_use(const char *name);

/* Each instruction set's file exports exactly its table. */
extern const struct sq_kernels sq_kernels_generic;
extern const struct sq_kernels sq_kernels_avx2;
extern const struct sq_kernels sq_kernels_avxvnni;
extern const struct sq_kernels sq_kernels_avx512vnni;
extern const struct sq_kernels sq_kernels_amx;
extern const struct sq_kernels sq_kernels_neon;

#endif
