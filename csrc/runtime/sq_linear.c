/* SPDX-License-Identifier: Apache-2.0 */
/* Activations for the packed linears, and the blocking loops and tails around the microkernels. */
#include "core/sq_internal.h"

#include <stdatomic.h>
#include <string.h>

#include "core/sq_scratch.h"
#include "core/sq_threads.h"
#include "kernels/sq_kernels.h"
#include "kernels/thin_panels.h"
#include "runtime/sq_rows.h"

/* ---- activations ------------------------------------------------------------------------ */

/* Inputs quantized in one chunk of the parallel loop. */
enum { PREPARE_CHUNK = 1 << 15 };

/* A tile walks down as many as 12 rows at once. A stride of 8 n cache lines would put them into at
 * most 8 of the 64 sets of a first-level cache, a multiple of 4 KiB into one: such a row gets a
 * line more. */
int64_t
sq_activations_ld(int64_t k)
{
    const int64_t ld = sq_round_up(k, SQ_ALIGN_BYTES), lines = ld / SQ_ALIGN_BYTES;
    return ld + (lines % 8 ? 0 : SQ_ALIGN_BYTES);
}

/* Sections of the workspace: codes or values, then scales, then sums. */
struct sections {
    size_t data_bytes, scales_bytes, sums_bytes;
};

static struct sections
activation_sections(int bits, int64_t m, int64_t k)
{
    const int64_t ld = sq_activations_ld(k);
    if (bits == 16) {
        return (struct sections){.data_bytes = sq_align_bytes((size_t)(m * ld) * sizeof(float))};
    }
    const size_t sums = (size_t)(m * (ld / SQ_K_ALIGN + 1));
    return (struct sections){.data_bytes = sq_align_bytes((size_t)(m * ld)),
                             .scales_bytes = sq_align_bytes((size_t)m * 2 * sizeof(float)),
                             .sums_bytes = sq_align_bytes(sums * sizeof(int32_t))};
}

size_t
sq_activations_workspace_bytes(int bits, int64_t m, int64_t k)
{
    int64_t most; /* bytes; no section has more than four for each value */
    if (k > SQ_PACKED_K_MAX ||
        !sq_product(m, sq_activations_ld(k) * (int64_t)sizeof(float), &most) ||
        most > INT64_MAX / 4) {
        return SIZE_MAX / 2;
    }
    const struct sections s = activation_sections(bits, m, k);
    return s.data_bytes + s.scales_bytes + s.sums_bytes;
}

struct prepare_job {
    const struct sq_kernels *kernels;
    const float *x;
    float clip;
    struct sq_activations *a;
    atomic_int nonfinite;
};

/* Codes and scales of token i; 0 if a value is NaN or Inf. */
static int
quantize_token(const struct prepare_job *job, const float *x, int64_t i, int8_t *codes)
{
    const struct sq_activations *a = job->a;
    const int64_t int8_inputs = a->int8_inputs;
    if (int8_inputs &&
        sq_quantize_row(job->kernels, 8, 1.0f, x, int8_inputs, codes, a->scales + a->m + i)) {
        return 0;
    }
    return sq_quantize_row(job->kernels, a->bits, job->clip, x + int8_inputs, a->k - int8_inputs,
                           codes + int8_inputs, a->scales + i) == SQ_OK;
}

/* Tokens first .. first + rows - 1 from values [rows][k], rotated or as given. */
static void
prepare_rows(void *context, int64_t first, int64_t rows, const float *values)
{
    struct prepare_job *job = context;
    struct sq_activations *a = job->a;
    const size_t padding = (size_t)(a->ld - a->k);
    for (int64_t i = first; i < first + rows; i++, values += a->k) {
        int finite;
        if (a->bits == 16) {
            float min, max, *copy = a->values + i * a->ld;
            finite = job->kernels->extremes(values, a->k, &min, &max);
            memcpy(copy, values, (size_t)a->k * sizeof(float));
            memset(copy + a->k, 0, padding * sizeof(float));
        }
        else {
            int8_t *codes = a->codes + i * a->ld;
            finite = quantize_token(job, values, i, codes);
            memset(codes + a->k, 0, padding);
            sq_running_sums(codes, a->ld, a->sums + i * (a->ld / SQ_K_ALIGN + 1));
        }
        if (!finite) { /* the arguments were checked: nothing else can be wrong */
            atomic_store(&job->nonfinite, 1);
            return;
        }
    }
}

static void
prepare_range(void *context, int64_t begin, int64_t end, int thread)
{
    const struct prepare_job *job = context;
    (void)thread;
    prepare_rows(context, begin, end - begin, job->x + begin * job->a->k);
}

sq_status
sq_activations_prepare(const struct sq_kernels *kernels, int bits, float clip, int64_t int8_inputs,
                       const struct sq_rotation *rotation, const float *x, int64_t m, int64_t k,
                       void *rotation_workspace, void *workspace, struct sq_activations *a)
{
    int64_t product;
    const int rotated = rotation && rotation->kind != SQ_UNROTATED;
    if (!kernels || !a || (m > 0 && (!x || !workspace || (rotated && !rotation_workspace)))) {
        return SQ_ERR_NULL;
    }
    if ((bits != 4 && bits != 8 && bits != 16) || !(clip > 0.0f && clip <= 1.0f) ||
        k > SQ_PACKED_K_MAX) {
        return SQ_ERR_RANGE;
    }
    if (k < 1 || !sq_product(m, sq_activations_ld(k) * (int64_t)sizeof(float), &product)) {
        return SQ_ERR_SHAPE;
    }
    if (int8_inputs < 0 || int8_inputs >= k || int8_inputs % SQ_K_ALIGN ||
        (int8_inputs && bits != 4)) {
        return SQ_ERR_RANGE;
    }
    if (rotated && rotation->k != k) {
        return SQ_ERR_SHAPE;
    }
    const struct sections s = activation_sections(bits, m, k);
    char *memory = workspace;
    *a = (struct sq_activations){
        .bits = bits, .m = m, .k = k, .ld = sq_activations_ld(k), .int8_inputs = int8_inputs};
    if (bits == 16) {
        a->values = workspace;
    }
    else if (m > 0) {
        a->codes = workspace;
        a->scales = (float *)(memory + s.data_bytes);
        a->sums = (int32_t *)(memory + s.data_bytes + s.scales_bytes);
    }
    struct prepare_job job = {.kernels = kernels, .x = x, .clip = clip, .a = a};
    if (rotated) {
        SQ_TRY(sq_rotate_each(rotation, x, m, prepare_rows, &job, rotation_workspace));
    }
    else {
        sq_parallel_for(m, sq_max_i64(1, PREPARE_CHUNK / k), prepare_range, &job);
    }
    return atomic_load(&job.nonfinite) ? SQ_ERR_NONFINITE : SQ_OK;
}

/* ---- packed ----------------------------------------------------------------------------- */

/* A chunk is a run of panels; inside it the rows go by blocks whose activations stay in the second
 * level cache (the table's row_block_bytes) while the chunk's panels pass over them, and a panel
 * stays in the first level while mr rows at a time meet it. So a chunk has CHUNK_BYTES of panels at
 * most, and a thread has CHUNKS_PER_THREAD or more, so that all end together. Up to mr rows read
 * each panel once, from memory, which is fastest in long runs: then a thread gets its whole share
 * as one chunk, up to STREAM_BYTES. */
enum { CHUNK_BYTES = 1 << 18, CHUNKS_PER_THREAD = 4, STREAM_BYTES = 1 << 20 };
/* Rows of the last panel, whose missing columns need a buffer. */
enum { TAIL_ROWS = 32 };
/* Multiply-adds below which calling the pool costs more than it brings. */
enum { SERIAL_WORK = 1 << 17 };

struct linear_job {
    const sq_packed_t *w;
    const struct sq_activations *a;
    sq_panel_kernel kernel, int8_kernel;
    int64_t row_block;
    float *y;
    int64_t ld_y;
    atomic_int *no_memory;
    const uint8_t *wide; /* a chunk's thin panels made wide, from panel wide_begin on; or NULL */
    int64_t wide_begin;
    int wide_zero;           /* byte of code 0 in thin panels made wide, as kernel reads them */
    int64_t chunk_end, jump; /* behind the chunk of panels, and from there to this thread's next */
};

/* Whether a kernel reads the thin panels of w as they are. */
static int
reads_thin(const sq_packed_t *w, const struct sq_activations *a)
{
    return a->bits <= 8 && w->kernels->thin_rows && a->m <= w->kernels->thin_rows;
}

static int
must_widen(const struct linear_job *job)
{
    return is_thin(job->w->panel_bits) && !reads_thin(job->w, job->a);
}

/* Where the inputs from `begin` on of panel p lie. */
static const uint8_t *
stored_panel(const sq_packed_t *w, int64_t p, int64_t begin)
{
    return w->panels + p * w->panel_stride_bytes + begin * w->kernels->nr * w->panel_bits / 8;
}

static void
widen(const struct linear_job *job, int64_t p, int64_t begin, int64_t end, uint8_t *wide)
{
    const sq_packed_t *w = job->w;
    w->kernels->widen_panel(w->panel_bits, stored_panel(w, p, begin),
                            w->kernels->nr * (end - begin), job->wide_zero, wide);
}

/* The inputs begin .. end - 1 of panel p as the job's kernels read them; NULL: no memory. */
static const uint8_t *
panel_of(const struct linear_job *job, int64_t p, int64_t begin, int64_t end)
{
    const sq_packed_t *w = job->w;
    const int64_t nr = w->kernels->nr;
    if (job->wide) {
        return job->wide + nr * ((p - job->wide_begin) * w->k_padded + begin);
    }
    if (!must_widen(job)) {
        return stored_panel(w, p, begin);
    }
    uint8_t *wide = sq_thread_scratch((size_t)(nr * (end - begin)));
    if (wide) {
        widen(job, p, begin, end, wide);
    }
    return wide;
}

/* Makes the panels begin .. end - 1 wide, once for all blocks of rows. 0: no memory. */
static int
widen_chunk(struct linear_job *job, int64_t begin, int64_t end)
{
    const sq_packed_t *w = job->w;
    const int64_t bytes = w->kernels->nr * w->k_padded,
                  int8_bytes = w->kernels->nr * w->int8_inputs;
    uint8_t *wide = sq_thread_scratch((size_t)((end - begin) * bytes));
    if (!wide) {
        return 0;
    }
    job->wide = wide;
    job->wide_begin = begin;
    for (int64_t p = begin; p < end; p++, wide += bytes) {
        widen(job, p, 0, w->int8_inputs, wide); /* a panel of its own */
        widen(job, p, w->int8_inputs, w->k_padded, wide + int8_bytes);
    }
    return 1;
}

/* The thin panel that this thread will probably make wide after panel p. */
static void
name_next(const struct linear_job *job, int64_t p, struct sq_panel_args *args)
{
    const sq_packed_t *w = job->w;
    const int64_t next = p + 1 < job->chunk_end ? p + 1 : p + 1 + job->jump;
    if (next < w->n_panels) {
        args->next = stored_panel(w, next, 0);
        args->next_bytes = w->panel_bytes;
    }
}

/* Rows row .. row + rows - 1 against panel p, nr columns of y: the inputs from `begin` up to
 * `end`, which are all, those of 8 bits or the others, which are added to them. */
static void
panel_part(const struct linear_job *job, int64_t p, int64_t row, int64_t rows, int64_t begin,
           int64_t end, float *y, int64_t ld_y)
{
    const sq_packed_t *w = job->w;
    const struct sq_activations *a = job->a;
    const int64_t nr = w->kernels->nr;
    struct sq_panel_args args = {.m = rows,
                                 .k = end - begin,
                                 .g = w->g ? w->g : end - begin,
                                 .ld_a = a->ld,
                                 .ld_sums = a->ld / SQ_K_ALIGN + 1,
                                 .panel = panel_of(job, p, begin, end),
                                 .w_scales = w->scales + p * w->groups * nr,
                                 .y = y,
                                 .ld_y = ld_y};
    if (!args.panel) {
        atomic_store(job->no_memory, 1);
        return;
    }
    SQ_ASSERT(args.m >= 1 && args.k >= 1 && args.k % SQ_K_ALIGN == 0);
    SQ_ASSERT(args.g % SQ_K_ALIGN == 0 && args.k % args.g == 0);
    SQ_ASSERT((uintptr_t)args.panel % SQ_ALIGN_BYTES == 0);
    if (w->g) {
        args.w_scales += begin / w->g * nr;
    }
    if (a->bits == 16) {
        args.a = a->values + row * a->ld;
        job->kernel(&args);
        return;
    }
    const int is_int8 = end <= a->int8_inputs;
    args.accumulate = begin > 0;
    if (must_widen(job) && !job->wide && end == w->k_padded) {
        name_next(job, p, &args);
    }
    args.a = a->codes + row * a->ld + begin;
    args.a_scales = a->scales + (is_int8 ? a->m : 0) + row;
    args.a_sums = a->sums + row * args.ld_sums + begin / SQ_K_ALIGN;
    (is_int8 ? job->int8_kernel : job->kernel)(&args);
}

/* Rows row .. row + rows - 1 against panel p, nr columns of y. */
static void
panel_rows(const struct linear_job *job, int64_t p, int64_t row, int64_t rows, float *y,
           int64_t ld_y)
{
    const int64_t int8_inputs = job->w->int8_inputs;
    if (int8_inputs) { /* in the order of memory */
        panel_part(job, p, row, rows, 0, int8_inputs, y, ld_y);
    }
    panel_part(job, p, row, rows, int8_inputs, job->w->k_padded, y, ld_y);
}

/* The same for the last panel, by way of a buffer: only `columns` of y exist. */
static void
tail_rows(const struct linear_job *job, int64_t p, int64_t row, int64_t rows, int64_t columns)
{
    const int64_t nr = job->w->kernels->nr;
    _Alignas(SQ_ALIGN_BYTES) float buffer[TAIL_ROWS * SQ_NR_MAX];
    for (int64_t begin = 0; begin < rows; begin += TAIL_ROWS) {
        const int64_t count = sq_min_i64(TAIL_ROWS, rows - begin);
        float *to = job->y + (row + begin) * job->ld_y + p * nr;
        panel_rows(job, p, row + begin, count, buffer, nr);
        for (int64_t i = 0; i < count; i++) {
            memcpy(to + i * job->ld_y, buffer + i * nr, (size_t)columns * sizeof *to);
        }
    }
}

/* Panels begin .. end - 1 of one linear. */
static void
linear_panels(const struct linear_job *shared, int64_t begin, int64_t end)
{
    struct linear_job own = *shared, *job = &own;
    const int64_t m = job->a->m, nr = job->w->kernels->nr;
    job->chunk_end = end;
    if (must_widen(job) && m > job->row_block && !widen_chunk(job, begin, end)) {
        atomic_store(job->no_memory, 1);
        return;
    }
    for (int64_t row = 0; row < m && !sq_stopped(); row += job->row_block) {
        const int64_t rows = sq_min_i64(job->row_block, m - row);
        for (int64_t p = begin; p < end; p++) {
            const int64_t columns = job->w->n - p * nr;
            if (columns < nr) {
                tail_rows(job, p, row, rows, columns);
            }
            else {
                panel_rows(job, p, row, rows, job->y + row * job->ld_y + p * nr, job->ld_y);
            }
        }
    }
}

/* Linears that read the same activations: their panels one after another. */
struct site_job {
    struct linear_job linears[SQ_SITE_LINEARS];
    int count;
};

static void
site_panels(void *context, int64_t begin, int64_t end, int thread)
{
    const struct site_job *site = context;
    (void)thread;
    for (int i = 0; i < site->count && end > 0; i++) {
        const struct linear_job *job = &site->linears[i];
        const int64_t panels = job->w->n_panels;
        if (begin < panels) {
            linear_panels(job, sq_max_i64(0, begin), sq_min_i64(end, panels));
        }
        begin -= panels;
        end -= panels;
    }
}

/* The table's own kernel for codes against the thin panels of w made wide; NULL: gemm_a8w8. */
static sq_panel_kernel
in_bytes_kernel(const sq_packed_t *w)
{
    return w->panel_bits == 5   ? w->kernels->gemm_a8w5_in_bytes
           : w->panel_bits == 6 ? w->kernels->gemm_a8w6_in_bytes
                                : NULL;
}

/* For activations of so many bits and the panels of w; NULL: none. */
static sq_panel_kernel
kernel_for(const sq_packed_t *w, const struct sq_activations *a, int bits)
{
    const struct sq_kernels *t = w->kernels;
    if (is_thin(w->panel_bits) && reads_thin(w, a)) {
        return w->panel_bits == 5 ? t->gemm_a8w5 : t->gemm_a8w6;
    }
    if (bits <= 8 && in_bytes_kernel(w)) {
        return in_bytes_kernel(w);
    }
    const int wide = w->panel_bits > 4;
    switch (bits) {
        case 4:
            return wide ? t->gemm_a8w8 : t->gemm_a4w4;
        case 8:
            return wide ? t->gemm_a8w8 : t->gemm_a8w4;
        case 16:
            return wide ? t->gemm_a16w8 : t->gemm_a16w4;
        default:
            return NULL;
    }
}

static sq_status
prepare_linear(const sq_packed_t *w, const struct sq_activations *a, float *y, int64_t ld_y,
               struct linear_job *job)
{
    if (!w || !a || (a->m > 0 && !y)) {
        return SQ_ERR_NULL;
    }
    const sq_panel_kernel kernel = kernel_for(w, a, a->bits);
    if (!kernel) {
        return SQ_ERR_RANGE;
    }
    int64_t product;
    if (a->k != w->k || a->int8_inputs != w->int8_inputs || ld_y < w->n ||
        !sq_product(a->m, ld_y, &product)) {
        return SQ_ERR_SHAPE;
    }
    const int64_t mr = w->kernels->mr;
    const int64_t row_bytes = a->ld * (a->bits == 16 ? (int64_t)sizeof(float) : 1);
    *job = (struct linear_job){
        .w = w,
        .a = a,
        .kernel = kernel,
        .int8_kernel = kernel_for(w, a, 8),
        .wide_zero =
            a->bits <= 8 && in_bytes_kernel(w) ? 1 << (w->panel_bits - 1) : w->kernels->w8_zero,
        .row_block = sq_max_i64(mr, w->kernels->row_block_bytes / row_bytes / mr * mr),
        .y = y,
        .ld_y = ld_y};
    return SQ_OK;
}

sq_status
sq_linears_packed(const sq_packed_t *const w[], int count, const struct sq_activations *a,
                  float *const y[], const int64_t ld_y[])
{
    struct site_job site = {.count = count};
    atomic_int no_memory = 0;
    int64_t panels = 0, bytes = 0;
    double work = 0;
    SQ_ASSERT(count >= 1 && count <= SQ_SITE_LINEARS);
    for (int i = 0; i < count; i++) {
        SQ_TRY(prepare_linear(w[i], a, y[i], ld_y[i], &site.linears[i]));
        site.linears[i].no_memory = &no_memory;
        panels += w[i]->n_panels;
        bytes += w[i]->n_panels * w[i]->panel_bytes;
        work += (double)a->m * (double)w[i]->n * (double)w[i]->k;
    }
    const int is_stream = a->m <= w[0]->kernels->mr;
    const int64_t most = (is_stream ? STREAM_BYTES : CHUNK_BYTES) * panels / sq_max_i64(1, bytes);
    const int64_t chunks = (int64_t)sq_get_num_threads() * (is_stream ? 1 : CHUNKS_PER_THREAD);
    const int64_t grain = sq_max_i64(1, sq_min_i64(most, sq_ceil_div(panels, chunks)));
    for (int i = 0; i < count; i++) {
        site.linears[i].jump = grain * (sq_get_num_threads() - 1);
    }
    if (a->m > 0) {
        sq_parallel_for(panels, work < SERIAL_WORK ? panels : grain, site_panels, &site);
    }
    return atomic_load(&no_memory) ? SQ_ERR_NOMEM : SQ_OK;
}

sq_status
sq_linear_packed(const sq_packed_t *w, const struct sq_activations *a, float *y, int64_t ld_y)
{
    return sq_linears_packed(&w, 1, a, &y, &ld_y);
}

struct bias_job {
    const float *bias;
    float *y;
    int64_t n;
};

static void
add_bias_rows(void *context, int64_t begin, int64_t end, int thread)
{
    const struct bias_job *j = context;
    (void)thread;
    for (int64_t t = begin; t < end; t++) {
        for (int64_t i = 0; i < j->n; i++) {
            j->y[t * j->n + i] += j->bias[i];
        }
    }
}

void
sq_add_bias(const float *bias, int64_t m, int64_t n, float *y)
{
    if (bias) {
        struct bias_job j = {.bias = bias, .y = y, .n = n};
        sq_parallel_for(m, sq_row_grain(n), add_bias_rows, &j);
    }
}
