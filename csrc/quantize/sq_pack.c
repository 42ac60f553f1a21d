/* SPDX-License-Identifier: Apache-2.0 */
/* Codes to the words of the file (pack-quantized layout), and words to the panels of one table. */
#include "quantize/sq_quantize.h"

#include <stdatomic.h>
#include <string.h>

#include "core/sq_internal.h"
#include "kernels/sq_kernels.h"
#include "core/sq_threads.h"

enum { CODES_PER_WORD = 8, PANELS_PER_CHUNK = 4, CHUNK_WORDS = 1 << 13 };
static const uint32_t zero_word = 0x88888888u; /* eight times code 0, stored as code + 8 */
_Static_assert(CODES_PER_WORD * 4 == 8 * sizeof(int32_t), "eight nibbles fill a word");
_Static_assert(SQ_K_ALIGN % CODES_PER_WORD == 0, "padded rows are whole words");

int64_t
sq_packed_words(int64_t k)
{
    return sq_ceil_div(k, CODES_PER_WORD);
}

/* ---- words ------------------------------------------------------------------------------ */

struct words_job {
    const int8_t *codes_in;
    int8_t *codes_out;
    const int32_t *words_in;
    int32_t *words_out;
    int64_t k;
    atomic_int out_of_range;
};

/* Eight bytes of 0 .. 15, the first one lowest, to eight nibbles: neighbours are merged three
 * times. */
static uint32_t
merge_nibbles(uint64_t bytes)
{
    bytes = (bytes | bytes >> 4) & 0x00ff00ff00ff00ffu;
    bytes = (bytes | bytes >> 8) & 0x0000ffff0000ffffu;
    return (uint32_t)(bytes | bytes >> 16);
}

void
sq_pack_nibbles(uint8_t *nibbles, int64_t k, int32_t *words)
{
    const int64_t count = sq_packed_words(k);
    memset(nibbles + k, 8, (size_t)(count * CODES_PER_WORD - k));
    for (int64_t w = 0; w < count; w++) {
        uint64_t bytes;
        memcpy(&bytes, nibbles + w * CODES_PER_WORD, sizeof bytes);
        const uint32_t word = merge_nibbles(bytes);
        memcpy(words + w, &word, sizeof word);
    }
}
_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "byte 0 becomes the lowest nibble");

/* Codes of one row; the bits outside of a nibble that a code + 8 had are added to bad. */
static void
pack_row(const int8_t *codes, int64_t k, int32_t *words, uint64_t *bad)
{
    const uint64_t low7 = 0x7f7f7f7f7f7f7f7fu, eights = 0x0808080808080808u;
    for (int64_t w = 0; w < sq_packed_words(k); w++) {
        const int64_t first = w * CODES_PER_WORD;
        uint64_t bytes = 0;
        memcpy(&bytes, codes + first, (size_t)sq_min_i64(k - first, CODES_PER_WORD));
        bytes = ((bytes & low7) + eights) ^ (bytes & ~low7); /* + 8 in each byte */
        *bad |= bytes & 0xf0f0f0f0f0f0f0f0u;
        words[w] = (int32_t)merge_nibbles(bytes & 0x0f0f0f0f0f0f0f0fu);
    }
}

static void
pack_rows(void *context, int64_t begin, int64_t end, int thread)
{
    struct words_job *job = context;
    const int64_t k = job->k, words = sq_packed_words(k);
    (void)thread;
    uint64_t bad = 0;
    for (int64_t i = begin; i < end; i++) {
        pack_row(job->codes_in + i * k, k, job->words_out + i * words, &bad);
    }
    if (bad) {
        atomic_store(&job->out_of_range, 1);
    }
}

static void
unpack_rows(void *context, int64_t begin, int64_t end, int thread)
{
    const struct words_job *job = context;
    const int64_t k = job->k, words = sq_packed_words(k);
    (void)thread;
    for (int64_t i = begin; i < end; i++) {
        const int32_t *row = job->words_in + i * words;
        int8_t *codes = job->codes_out + i * k;
        for (int64_t j = 0; j < k; j++) {
            const uint32_t word = (uint32_t)row[j / CODES_PER_WORD];
            codes[j] = (int8_t)((int)(word >> (4 * (j % CODES_PER_WORD)) & 15) - 8);
        }
    }
}

sq_status
sq_pack_int4(const int8_t *codes, int64_t n, int64_t k, int32_t *words)
{
    int64_t count;
    if (k < 1 || !sq_product(n, k, &count)) {
        return SQ_ERR_SHAPE;
    }
    if (count && (!codes || !words)) {
        return SQ_ERR_NULL;
    }
    struct words_job job = {.codes_in = codes, .words_out = words, .k = k};
    sq_parallel_for(n, sq_max_i64(1, CHUNK_WORDS / sq_packed_words(k)), pack_rows, &job);
    return atomic_load(&job.out_of_range) ? SQ_ERR_RANGE : SQ_OK;
}

sq_status
sq_unpack_int4(const int32_t *words, int64_t n, int64_t k, int8_t *codes)
{
    int64_t count;
    if (k < 1 || !sq_product(n, k, &count)) {
        return SQ_ERR_SHAPE;
    }
    if (count && (!codes || !words)) {
        return SQ_ERR_NULL;
    }
    struct words_job job = {.words_in = words, .codes_out = codes, .k = k};
    sq_parallel_for(n, sq_max_i64(1, CHUNK_WORDS / sq_packed_words(k)), unpack_rows, &job);
    return SQ_OK;
}

/* ---- panels ----------------------------------------------------------------------------- */

struct panels_job {
    const int32_t *words; /* [n][ceil(k / 8)] */
    const float *scales;  /* [n][groups] */
    const sq_packed_t *w;
    uint8_t *panels;
    float *panel_scales;
    atomic_int no_memory;
};

/* Words of panel p from `first` on, padded: outputs past n and k past the end read as code 0,
 * whatever the file holds in its tail nibbles. padded [nr][count]. */
static void
pad_rows(const struct panels_job *job, int64_t p, int64_t first, int64_t count, int32_t *padded)
{
    const sq_packed_t *w = job->w;
    const int64_t words = sq_packed_words(w->k), last = w->k % CODES_PER_WORD;
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

static void
fill_panels(void *context, int64_t begin, int64_t end, int thread)
{
    struct panels_job *job = context;
    const sq_packed_t *w = job->w;
    const int64_t nr = w->kernels->nr;
    (void)thread;
    int32_t *padded = sq_alloc((size_t)w->panel_bytes);
    if (!padded) {
        atomic_store(&job->no_memory, 1);
        return;
    }
    for (int64_t p = begin; p < end; p++) {
        uint8_t *panel = job->panels + p * w->panel_stride_bytes;
        if (w->int8_inputs) { /* a panel of its own, so that another kernel can read it */
            pad_rows(job, p, 0, w->int8_inputs / CODES_PER_WORD, padded);
            w->kernels->pack_panel(padded, w->int8_inputs, panel);
        }
        const int64_t rest = w->k_padded - w->int8_inputs;
        pad_rows(job, p, w->int8_inputs / CODES_PER_WORD, rest / CODES_PER_WORD, padded);
        w->kernels->pack_panel(padded, rest, panel + w->int8_inputs * nr / 2);
        for (int64_t g = 0; g < w->groups; g++) {
            for (int64_t j = 0; j < nr; j++) {
                const int64_t row = p * nr + j;
                job->panel_scales[(p * w->groups + g) * nr + j] =
                    row < w->n ? job->scales[row * w->groups + g] : 0.0f;
            }
        }
    }
    free(padded);
}

/* Sizes of w from n, k, g and the table. */
static sq_status
set_sizes(sq_packed_t *w, int64_t n, int64_t k, int64_t g, int64_t int8_inputs)
{
    if (n < 1 || k < 1 || g < 0 || (g && (g % SQ_K_ALIGN || k % g)) || int8_inputs < 0 ||
        int8_inputs >= k || int8_inputs % (g ? g : SQ_K_ALIGN)) {
        return SQ_ERR_SHAPE;
    }
    if (k > SQ_PACKED_K_MAX) {
        return SQ_ERR_RANGE;
    }
    w->n = n;
    w->k = k;
    w->g = g;
    w->int8_inputs = int8_inputs;
    w->k_padded = sq_round_up(k, SQ_K_ALIGN);
    w->group_length = g ? g : w->k_padded;
    w->groups = w->k_padded / w->group_length;
    w->n_panels = sq_ceil_div(n, w->kernels->nr);
    w->panel_bytes = w->kernels->nr * w->k_padded / 2;
    w->panel_stride_bytes = (int64_t)sq_align_bytes((size_t)w->panel_bytes);
    int64_t bytes;
    if (!sq_product(w->n_panels, w->panel_stride_bytes, &bytes) ||
        !sq_product(bytes, (int64_t)sizeof(float), &bytes)) { /* scales are fewer than bytes */
        return SQ_ERR_RANGE;
    }
    return SQ_OK;
}

sq_status
sq_packed_create(const struct sq_kernels *kernels, const int32_t *words, const float *scales,
                 int64_t n, int64_t k, int64_t g, int64_t int8_inputs, sq_packed_t **out)
{
    if (!kernels || !words || !scales || !out) {
        return SQ_ERR_NULL;
    }
    *out = NULL;
    sq_packed_t sizes = {.kernels = kernels};
    SQ_TRY(set_sizes(&sizes, n, k, g, int8_inputs));
    const int64_t n_scales = sizes.n_panels * sizes.groups * kernels->nr;
    sq_packed_t *w = sq_alloc(sizeof *w);
    uint8_t *panels = sq_alloc((size_t)(sizes.n_panels * sizes.panel_stride_bytes));
    float *panel_scales = sq_alloc((size_t)n_scales * sizeof(float));
    if (!w || !panels || !panel_scales) {
        free(w);
        free(panels);
        free(panel_scales);
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
        free((void *)w->panels);
        free((void *)w->scales);
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

size_t
sq_packed_bytes(const sq_packed_t *w)
{
    return (size_t)(w->n_panels * w->panel_stride_bytes) +
           (size_t)(w->n_panels * w->groups * w->kernels->nr) * sizeof(float);
}

const struct sq_kernels *
sq_packed_kernels(const sq_packed_t *w)
{
    return w->kernels;
}
