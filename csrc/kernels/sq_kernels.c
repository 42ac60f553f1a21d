/* SPDX-License-Identifier: Apache-2.0 */
/* The list of kernel tables, best first, and the selection made once at module start. */
#include "kernels/sq_kernels.h"

#include <string.h>

#include "core/sq_cpu.h"

/* Rows in the order of preference; the generic table is always last and always complete. */
static const struct sq_kernels *const sources[] = {
#ifdef SQ_HAVE_AMX
    &sq_kernels_amx,
#endif
#ifdef SQ_HAVE_AVX512VNNI
    &sq_kernels_avx512vnni,
#endif
#ifdef SQ_HAVE_AVXVNNI
    &sq_kernels_avxvnni,
#endif
#ifdef SQ_HAVE_AVX2
    &sq_kernels_avx2,
#endif
#ifdef SQ_HAVE_NEON
    &sq_kernels_neon,
#endif
    &sq_kernels_generic,
};
enum { N_TABLES = sizeof sources / sizeof sources[0] };

static struct sq_kernels tables[N_TABLES];
static const struct sq_kernels *listed[N_TABLES + 1];
static const struct sq_kernels *_Atomic active = &sq_kernels_generic;
static uint32_t features;
static int off[N_TABLES]; /* named as disabled */

/* The base's row, in the end the generic one, wherever the instruction set's own is missing. The
 * packed kernels share their base's panel order unless the table brings all of them. */
static struct sq_kernels
merged(const struct sq_kernels *own)
{
    if (own == &sq_kernels_generic) {
        return *own;
    }
    struct sq_kernels t = merged(own->base ? own->base : &sq_kernels_generic);
    t.name = own->name;
    t.required_features |= own->required_features;
    t.base = own->base;
    for (int i = 0; i < 3; i++) {
        t.steps[i] = own->steps[i] ? own->steps[i] : t.steps[i];
    }
#define SQ_TAKE(row)      \
    if (own->row) {       \
        t.row = own->row; \
    }
    SQ_TAKE(mr)
    SQ_TAKE(nr)
    SQ_TAKE(row_block_bytes)
    SQ_TAKE(pack_panel)
    SQ_TAKE(gemm_a4w4)
    SQ_TAKE(gemm_a8w4)
    SQ_TAKE(gemm_a16w4)
    SQ_TAKE(pack_panel_w8)
    SQ_TAKE(gemm_a8w8)
    SQ_TAKE(gemm_a16w8)
    SQ_TAKE(thin_block)
    SQ_TAKE(w8_zero)
    SQ_TAKE(widen_panel)
    SQ_TAKE(gptq_columns)
    SQ_TAKE(sylvester)
    SQ_TAKE(sum_pairs)
    SQ_TAKE(rotate_pairs)
    SQ_TAKE(thin_rows)
    SQ_TAKE(gemm_a8w5)
    SQ_TAKE(gemm_a8w6)
    SQ_TAKE(gemm_f32)
    SQ_TAKE(gemm_page)
    SQ_TAKE(gemm_half)
    SQ_TAKE(gemm_rows)
    SQ_TAKE(extremes)
    SQ_TAKE(quantize_codes)
    SQ_TAKE(quantize_errors)
    SQ_TAKE(fixed_point)
    SQ_TAKE(fixed_errors)
    SQ_TAKE(rms_norm_row)
    SQ_TAKE(silu_mul)
    SQ_TAKE(softmax_row)
    SQ_TAKE(f16_to_f32)
    SQ_TAKE(bf16_to_f32)
    SQ_TAKE(f32_to_f16)
    SQ_TAKE(kv8_to_f32)
    SQ_TAKE(kv4_to_f32)
#undef SQ_TAKE
    if (own->gemm_a8w8) { /* what could stand in its place goes with it */
        t.gemm_a8w5_in_bytes = own->gemm_a8w5_in_bytes;
        t.gemm_a8w6_in_bytes = own->gemm_a8w6_in_bytes;
    }
    return t;
}

static const struct sq_kernels *
find(const char *name, size_t length)
{
    for (int i = 0; i < N_TABLES; i++) {
        if (strlen(tables[i].name) == length && !strncmp(tables[i].name, name, length)) {
            return &tables[i];
        }
    }
    return NULL;
}

const struct sq_kernels *const *
sq_kernels_compiled(void)
{
    return listed;
}

uint32_t
sq_kernels_missing_features(const struct sq_kernels *table)
{
    return table->required_features & ~features;
}

int
sq_kernels_runnable(const struct sq_kernels *table)
{
    return !sq_kernels_missing_features(table);
}

/* Selects a table that can run. 0, or -1 where the system refuses what it needs: it lacks that. */
static int
activate(const struct sq_kernels *table)
{
    if (!sq_kernels_runnable(table)) {
        return -1;
    }
    if (!sq_cpu_permit(table->required_features)) {
        features &= ~(uint32_t)SQ_CPU_AMX_INT8;
        return -1;
    }
    active = table;
    return 0;
}

int
sq_kernels_disabled(const struct sq_kernels *table)
{
    for (const struct sq_kernels *source = sources[table - tables]; source; source = source->base) {
        for (int i = 0; i < N_TABLES; i++) {
            if (sources[i] == source && off[i]) {
                return 1;
            }
        }
    }
    return 0;
}

int
sq_kernels_init(const char *disabled)
{
    features = sq_cpu_features();
    for (int i = 0; i < N_TABLES; i++) {
        tables[i] = merged(sources[i]);
        listed[i] = &tables[i];
    }
    listed[N_TABLES] = NULL;
    memset(off, 0, sizeof off);
    for (const char *p = disabled; p && *p;) {
        const size_t length = strcspn(p, ",");
        if (length) {
            const struct sq_kernels *t = find(p, length);
            if (!t || t == &tables[N_TABLES - 1]) {
                return -1;
            }
            off[t - tables] = 1;
        }
        p += length + (p[length] == ',');
    }
    for (int i = 0; i < N_TABLES; i++) {
        if (!sq_kernels_disabled(&tables[i]) && !activate(&tables[i])) {
            break;
        }
    }
    return 0;
}

const struct sq_kernels *
sq_kernels_active(void)
{
    return active;
}

int
sq_kernels_use(const char *name)
{
    const struct sq_kernels *t = find(name, strlen(name));
    return t ? activate(t) : -1;
}
