/* SPDX-License-Identifier: Apache-2.0 */
/* Words of the file to the panels of one kernel table. */
#include "quantize/sq_quantize.h"

#include <stdatomic.h>
#include <string.h>

#include "core/sq_huge.h"
#include "core/sq_internal.h"
#include "core/sq_threads.h"
#include "kernels/sq_kernels.h"
#include "kernels/thin_panels.h"

enum { NIBBLES = 8, PANELS_PER_CHUNK = 4 };    /* of a word */
static const uint32_t zero_word = 0x88888888u; /* eight times code 0, stored as code + 8 */
_Static_assert(SQ_K_ALIGN % NIBBLES == 0, "padded rows are whole words");

/* ---- panels ----------------------------------------------------------------------------- */

struct panels_job {
    const int32_t *words; /* [n][sq_packed_words] */
    const float *scales;  /* [n][groups] */
    const sq_packed_t *w;
    uint8_t *panels;
    float *panel_scales;
    atomic_int no_memory;
};

/* Words of panel p with 4 bits from `first` on, padded: outputs past n and k past the end read as
 * code 0, whatever the file holds in its tail nibbles. padded [nr][count]. */
static void
pad_words(const struct panels_job *job, int64_t p, int64_t first, int64_t count, int32_t *padded)
{
    const sq_packed_t *w = job->w;
    const int64_t words = sq_packed_words(4, w->k), last = w->k % NIBBLES;
    for (int64_t j = 0; j < w->kernels->nr; j++) {
        const int64_t row = p * w->kernels->nr + j;
        int32_t *to = padded + j * count;
        const int64_t filled = row < w->n ? sq_min_i64(words - first, count) : 0;
        if (filled) {
            memcpy(to, job->words + row * words + first, (size_t)filled * sizeof *to);
            if (last && first + filled == words) {
                const uint32_t keep = ((uint32_t)1 << (4 * last)) - 1;
                const uint32_t word = (uint32_t)to[filled - 1];
                to[filled - 1] = (int32_t)((word & keep) | (zero_word & ~keep));
            }
        }
        for (int64_t i = filled; i < count; i++) {
            to[i] = (int32_t)zero_word;
        }
    }
}

/* Panel p of the inputs begin .. end - 1 of 4 bits; padded [nr][k_padded / 8]. */
static void
fill_w4(const struct panels_job *job, int64_t p, int64_t begin, int64_t end, int32_t *padded,
        uint8_t *panel)
{
    const sq_packed_t *w = job->w;
    const int64_t first = p * w->kernels->nr, last = first + w->kernels->nr;
    if (begin == 0 && end == w->k && last <= w->n) { /* the words are the padded ones */
        w->kernels->pack_panel(job->words + first * (w->k / NIBBLES), w->k, panel);
        return;
    }
    pad_words(job, p, begin / NIBBLES, (end - begin) / NIBBLES, padded);
    w->kernels->pack_panel(padded, end - begin, panel);
}

/* Buffers of a thread: padded [nr][k_padded] in 4 or 8 bits, a row of codes [k], and where panels
 * are thin a wide one. */
struct panel_buffers {
    void *padded;
    int8_t *row;
    uint8_t *wide;
};

static int
take_buffers(const sq_packed_t *w, struct panel_buffers *b)
{
    const size_t codes = (size_t)(w->kernels->nr * w->k_padded);
    const int wide = is_thin(w->panel_bits);
    *b = (struct panel_buffers){.padded = sq_alloc(codes),
                                .row = sq_alloc((size_t)w->k),
                                .wide = wide ? sq_alloc(codes) : NULL};
    return b->padded && b->row && (!wide || b->wide);
}

static void
free_buffers(const struct panel_buffers *b)
{
    free(b->padded);
    free(b->row);
    free(b->wide);
}

static ALWAYS_INLINE uint64_t
codes_at(const uint8_t *panel, uint64_t flip, uint64_t bias)
{
    return (word_at(panel, 0) ^ flip) - bias; /* the bytes do not borrow: each holds its bias */
}

/* A wide panel of codes of 5 or 6 bits to the thin one, eight bytes at a time: the way back of
 * widen_blocks. */
static ALWAYS_INLINE void
thin_blocks(const uint8_t *restrict panel, int64_t bytes, int zero, uint8_t *restrict thin,
            const int block, const int bits)
{
    enum { WORD = sizeof(uint64_t) };
    const int upper = bits - 4, planes = 8 / upper, low = block / 2, width = block / planes;
    const uint64_t flip = SQ_EACH_BYTE(128 ^ zero), nibble = SQ_EACH_BYTE(15);
    const uint64_t bias = SQ_EACH_BYTE(128 - (1 << (bits - 1)));
    const uint64_t mask = SQ_EACH_BYTE((1 << upper) - 1);
    for (int64_t b = 0; b < bytes; b += block, panel += block, thin += low + width) {
        for (int i = 0; i < low; i += WORD) {
            const uint64_t first = codes_at(panel + i, flip, bias) & nibble;
            const uint64_t out = first | (codes_at(panel + low + i, flip, bias) & nibble) << 4;
            memcpy(thin + i, &out, WORD);
        }
        for (int i = 0; i < width; i += WORD) {
            uint64_t out = 0;
            UNROLL
            for (int e = 0; e < planes; e++) {
                const uint64_t codes = codes_at(panel + e * width + i, flip, bias);
                out |= (codes >> 4 & mask) << (e * upper);
            }
            memcpy(thin + low + i, &out, WORD);
        }
    }
}

/* The same of more than 4 bits, by way of codes. */
static void
fill_w8(const struct panels_job *job, int64_t p, int64_t begin, int64_t end,
        const struct panel_buffers *b, uint8_t *panel)
{
    const sq_packed_t *w = job->w;
    const int64_t words = sq_packed_words(w->bits, w->k), count = end - begin;
    int8_t *padded = b->padded;
    memset(padded, 0, (size_t)(w->kernels->nr * count));
    for (int64_t j = 0; j < w->kernels->nr && p * w->kernels->nr + j < w->n; j++) {
        sq_unpack_row(w->bits, job->words + (p * w->kernels->nr + j) * words, w->k, b->row);
        memcpy(padded + j * count, b->row + begin, (size_t)(sq_min_i64(end, w->k) - begin));
    }
    if (!is_thin(w->panel_bits)) {
        w->kernels->pack_panel_w8(padded, count, panel);
        return;
    }
    const int64_t bytes = w->kernels->nr * count;
    w->kernels->pack_panel_w8(padded, count, b->wide);
    if (w->panel_bits == 5) {
        thin_blocks(b->wide, bytes, w->kernels->w8_zero, panel, w->kernels->thin_block, 5);
    }
    else {
        thin_blocks(b->wide, bytes, w->kernels->w8_zero, panel, w->kernels->thin_block, 6);
    }
}

static void
fill_panels(void *context, int64_t begin, int64_t end, int thread)
{
    struct panels_job *job = context;
    const sq_packed_t *w = job->w;
    const int64_t nr = w->kernels->nr;
    struct panel_buffers buffers;
    (void)thread;
    if (!take_buffers(w, &buffers)) {
        free_buffers(&buffers);
        atomic_store(&job->no_memory, 1);
        return;
    }
    for (int64_t p = begin; p < end; p++) {
        uint8_t *panel = job->panels + p * w->panel_stride_bytes;
        /* the 8-bit inputs have a panel of their own, so that another kernel can read it */
        const int64_t bounds[] = {0, w->int8_inputs, w->k_padded};
        for (int i = w->int8_inputs ? 0 : 1; i < 2; i++) {
            uint8_t *to = panel + bounds[i] * nr * w->panel_bits / 8;
            if (w->panel_bits == 4) {
                fill_w4(job, p, bounds[i], bounds[i + 1], buffers.padded, to);
            }
            else {
                fill_w8(job, p, bounds[i], bounds[i + 1], &buffers, to);
            }
        }
        for (int64_t g = 0; g < w->groups; g++) {
            for (int64_t j = 0; j < nr; j++) {
                const int64_t row = p * nr + j;
                job->panel_scales[(p * w->groups + g) * nr + j] =
                    row < w->n ? job->scales[row * w->groups + g] : 0.0f;
            }
        }
    }
    free_buffers(&buffers);
}

int64_t
sq_packed_k_max(int bits)
{
    return bits == 4 ? SQ_PACKED_K_MAX : SQ_PACKED_K_MAX_W8;
}

/* Sizes of w from n, k, g, bits and the table. */
static sq_status
set_sizes(sq_packed_t *w, int64_t n, int64_t k, int64_t g, int64_t int8_inputs, int bits)
{
    if (n < 1 || k < 1 || g < 0 || (g && (g % SQ_K_ALIGN || k % g)) || int8_inputs < 0 ||
        int8_inputs >= k || int8_inputs % (g ? g : SQ_K_ALIGN)) {
        return SQ_ERR_SHAPE;
    }
    if (!sq_weight_bits_valid(bits) || k > sq_packed_k_max(bits)) {
        return SQ_ERR_RANGE;
    }
    w->bits = bits;
    w->panel_bits = bits;
    w->n = n;
    w->k = k;
    w->g = g;
    w->int8_inputs = int8_inputs;
    w->k_padded = sq_round_up(k, SQ_K_ALIGN);
    w->group_length = g ? g : w->k_padded;
    w->groups = w->k_padded / w->group_length;
    w->n_panels = sq_ceil_div(n, w->kernels->nr);
    w->panel_bytes = w->kernels->nr * w->k_padded * w->panel_bits / 8;
    w->panel_stride_bytes = (int64_t)sq_align_bytes((size_t)w->panel_bytes);
    int64_t bytes;
    if (!sq_product(w->n_panels, w->panel_stride_bytes, &bytes) ||
        !sq_product(bytes, (int64_t)sizeof(float), &bytes)) { /* scales are fewer than bytes */
        return SQ_ERR_RANGE;
    }
    return SQ_OK;
}

static size_t
panels_bytes(const sq_packed_t *w)
{
    return (size_t)(w->n_panels * w->panel_stride_bytes);
}

static size_t
scales_bytes(const sq_packed_t *w)
{
    return (size_t)(w->n_panels * w->groups * w->kernels->nr) * sizeof(float);
}

sq_status
sq_packed_create(const struct sq_kernels *kernels, const int32_t *words, const float *scales,
                 int64_t n, int64_t k, int64_t g, int64_t int8_inputs, int bits, sq_packed_t **out)
{
    if (!kernels || !words || !scales || !out) {
        return SQ_ERR_NULL;
    }
    *out = NULL;
    sq_packed_t sizes = {.kernels = kernels};
    SQ_TRY(set_sizes(&sizes, n, k, g, int8_inputs, bits));
    sq_packed_t *w = sq_alloc(sizeof *w);
    uint8_t *panels = sq_huge_alloc(panels_bytes(&sizes));
    float *panel_scales = sq_huge_alloc(scales_bytes(&sizes));
    if (!w || !panels || !panel_scales) {
        free(w);
        sq_huge_free(panels, panels_bytes(&sizes));
        sq_huge_free(panel_scales, scales_bytes(&sizes));
        return SQ_ERR_NOMEM;
    }
    *w = sizes;
    w->panels = panels;
    w->scales = panel_scales;
    struct panels_job job = {
        .words = words, .scales = scales, .w = w, .panels = panels, .panel_scales = panel_scales};
    sq_parallel_for(w->n_panels, PANELS_PER_CHUNK, fill_panels, &job);
    if (atomic_load(&job.no_memory)) {
        sq_packed_destroy(w);
        return SQ_ERR_NOMEM;
    }
    *out = w;
    return SQ_OK;
}

void
sq_packed_destroy(sq_packed_t *w)
{
    if (w) {
        sq_huge_free((void *)w->panels, panels_bytes(w));
        sq_huge_free((void *)w->scales, scales_bytes(w));
        free(w);
    }
}

void
sq_packed_shape(const sq_packed_t *w, int64_t *n, int64_t *k, int64_t *g)
{
    *n = w->n;
    *k = w->k;
    *g = w->g;
}

int64_t
sq_packed_int8_inputs(const sq_packed_t *w)
{
    return w->int8_inputs;
}

int
sq_packed_bits(const sq_packed_t *w)
{
    return w->bits;
}

size_t
sq_packed_bytes(const sq_packed_t *w)
{
    return panels_bytes(w) + scales_bytes(w);
}

const struct sq_kernels *
sq_packed_kernels(const sq_packed_t *w)
{
    return w->kernels;
}
