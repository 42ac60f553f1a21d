/* SPDX-License-Identifier: Apache-2.0 */
/* Sites and linears: proved once, then read chunk by chunk. */
#include "runtime/sq_site.h"

#include <string.h>

#include "core/sq_internal.h"
#include "core/sq_states.h"
#include "core/sq_threads.h"
#include "runtime/sq_rows.h"

/* ---- sealing ---------------------------------------------------------------------------- */

sq_status
sq_site_open(struct sq_site *sites, int n_sites, struct sq_fault *fault)
{
    for (int i = 0; i < n_sites; i++) {
        struct sq_site *s = &sites[i];
        if (s->k < 1 || s->k > SQ_WIDTH_MAX) {
            return sq_refuse(fault, SQ_ERR_RANGE, i, "k: expected 1 to %lld, got %lld",
                             (long long)SQ_WIDTH_MAX, (long long)s->k);
        }
        if (s->bits != 4 && s->bits != 8 && s->bits != 16) {
            return sq_refuse(fault, SQ_ERR_RANGE, i, "bits: expected 4, 8 or 16, got %d", s->bits);
        }
        if (!(s->clip > 0 && s->clip <= 1)) {
            return sq_refuse(fault, SQ_ERR_RANGE, i,
                             "clip: expected more than 0 and at most 1, got %g", (double)s->clip);
        }
        const struct sq_rotation *r = &s->rotation;
        if (r->kind != SQ_UNROTATED && (r->k != s->k || sq_rotation_check(r) != SQ_OK)) {
            return sq_refuse(fault, SQ_ERR_SHAPE, i, "rotation: expected %lld inputs, got %lld",
                             (long long)s->k, (long long)r->k);
        }
        s->int8_inputs = -1;
        s->kernels = NULL;
        s->value = SQ_VALUE_NONE;
    }
    return SQ_OK;
}

/* The packed linears of a site share their codes, so they agree on which inputs have 8 bits. */
static sq_status
enter_packed(const struct sq_linear *l, const char *name, struct sq_site *s, struct sq_fault *fault)
{
    const int64_t own = sq_packed_int8_inputs(l->packed);
    if (own && s->bits != 4) {
        return sq_refuse(fault, SQ_ERR_SHAPE, l->site,
                         "bits: expected 4, as %s has inputs of 8 bits, got %d", name, s->bits);
    }
    if (s->int8_inputs >= 0 && own != s->int8_inputs) {
        return sq_refuse(fault, SQ_ERR_SHAPE, l->site,
                         "expected %lld inputs of 8 bits as in the linears before, got %lld in %s",
                         (long long)s->int8_inputs, (long long)own, name);
    }
    s->int8_inputs = own;
    s->kernels = sq_packed_kernels(l->packed);
    return SQ_OK;
}

sq_status
sq_linear_seal(const struct sq_linear *l, int64_t n, int64_t k, int value, const char *name,
               struct sq_site *sites, int n_sites, struct sq_fault *fault)
{
    if (!l->packed && !l->dense) {
        return sq_refuse(fault, SQ_ERR_NULL, -1, "%s: expected a weight, got none", name);
    }
    if (l->site < 0 || l->site >= n_sites) {
        return sq_refuse(fault, SQ_ERR_RANGE, -1, "%s: expected a site of 0 to %d, got %d", name,
                         n_sites - 1, l->site);
    }
    struct sq_site *s = &sites[l->site];
    int64_t found_n = l->n, found_k = l->k, group;
    if (l->packed && l->n == n && l->k == k) {
        sq_packed_shape(l->packed, &found_n, &found_k, &group);
    }
    if (found_n != n || found_k != k) {
        return sq_refuse(fault, SQ_ERR_SHAPE, -1,
                         "%s: expected (n, k) = (%lld, %lld), got (%lld, %lld)", name, (long long)n,
                         (long long)k, (long long)found_n, (long long)found_k);
    }
    if (s->k != k) {
        return sq_refuse(fault, SQ_ERR_SHAPE, l->site, "k: expected %lld, as %s reads it, got %lld",
                         (long long)k, name, (long long)s->k);
    }
    if (s->value != SQ_VALUE_NONE && s->value != value) {
        return sq_refuse(fault, SQ_ERR_SHAPE, l->site,
                         "expected linears that read one value, got %s, which reads another", name);
    }
    s->value = value;
    return l->packed ? enter_packed(l, name, s, fault) : SQ_OK;
}

sq_status
sq_site_close(const struct sq_site *sites, int n_sites, struct sq_fault *fault)
{
    for (int i = 0; i < n_sites; i++) {
        if (sites[i].value == SQ_VALUE_NONE) {
            return sq_refuse(fault, SQ_ERR_SHAPE, i, "expected a linear that reads it, got none");
        }
    }
    return SQ_OK;
}

/* ---- reading ---------------------------------------------------------------------------- */

void
sq_reader_bytes(const struct sq_site *sites, int n_sites, int64_t m, size_t *activations,
                size_t *rotation)
{
    *activations = *rotation = 0;
    for (int i = 0; i < n_sites; i++) {
        const struct sq_site *s = &sites[i];
        if (s->kernels) {
            const size_t bytes = sq_activations_workspace_bytes(s->bits, m, s->k);
            const size_t scratch = sq_rotation_workspace_bytes(&s->rotation, m);
            *activations = bytes > *activations ? bytes : *activations;
            *rotation = scratch > *rotation ? scratch : *rotation;
        }
    }
}

void
sq_reader_start(struct sq_reader *reader, int64_t begin, int64_t m)
{
    reader->begin = begin;
    reader->m = m;
    reader->site = -1;
}

void
sq_reader_rows(struct sq_reader *reader, int64_t m)
{
    reader->m = m;
    reader->site = -1;
}

struct copy_job {
    const float *x;
    float *to;
    int64_t k;
};

static void
copy_rows(void *context, int64_t begin, int64_t end, int thread)
{
    const struct copy_job *j = context;
    (void)thread;
    memcpy(j->to + begin * j->k, j->x + begin * j->k,
           (size_t)((end - begin) * j->k) * sizeof(float));
}

static void
copy_in(const float *x, int64_t m, int64_t k, float *to)
{
    struct copy_job j = {x, to, k};
    sq_parallel_for(m, sq_row_grain(k), copy_rows, &j);
}

/* Adds x [m][k] of the chunk at token `begin`, unless it is there: a site may be entered again.
 * most: rows that the call may add, so that a site that sees every token never grows. */
static sq_status
add_record(struct sq_record *r, int64_t begin, const float *x, int64_t m, int64_t k, int64_t most)
{
    if (r->seen > begin || m == 0) {
        return SQ_OK;
    }
    if (r->capacity < r->count + m) {
        const int64_t capacity = sq_max_i64(sq_max_i64(r->count + m, most), 2 * r->capacity);
        size_t mapped;
        float *rows = sq_states_alloc((size_t)(capacity * k) * sizeof *rows, &mapped);
        if (!rows) {
            return SQ_ERR_NOMEM;
        }
        copy_in(r->rows, r->count, k, rows);
        sq_states_free(r->rows, r->mapped);
        r->rows = rows;
        r->mapped = mapped;
        r->capacity = capacity;
    }
    copy_in(x, m, k, r->rows + r->count * k);
    r->count += m;
    r->seen = begin + 1;
    return SQ_OK;
}

static sq_status
enter_site(struct sq_reader *r, int site, const float *x)
{
    const struct sq_site *s = &r->sites[site];
    r->site = site;
    if (r->record) {
        const int64_t most = s->value < SQ_VALUE_EXPERTS ? r->tokens : 0;
        SQ_TRY(add_record(&r->record[site], r->begin, x, r->m, s->k, most));
    }
    if (!s->kernels) {
        return SQ_OK;
    }
    return sq_activations_prepare(s->kernels, s->bits, s->clip, s->int8_inputs, &s->rotation, x,
                                  r->m, s->k, r->rotation_workspace, r->activations_workspace,
                                  &r->activations);
}

sq_status
sq_linear_apply(struct sq_reader *reader, const struct sq_linear *l, const float *x, float *y)
{
    if (reader->site != l->site) {
        SQ_TRY(enter_site(reader, l->site, x));
    }
    if (l->packed) {
        SQ_TRY(sq_linear_packed(l->packed, &reader->activations, y, l->n));
    }
    else {
        SQ_TRY(sq_linear_dense(l->dtype, l->dense, x, reader->m, l->n, l->k, y, l->n));
    }
    sq_add_bias(l->bias, reader->m, l->n, y);
    return SQ_OK;
}

sq_status
sq_linears_apply(struct sq_reader *reader, const struct sq_linear *const linears[], int count,
                 const float *x, float *const y[])
{
    const sq_packed_t *packed[SQ_SITE_LINEARS];
    int64_t n[SQ_SITE_LINEARS];
    int together = 1;
    for (int i = 0; i < count; i++) {
        packed[i] = linears[i]->packed;
        n[i] = linears[i]->n;
        together = together && packed[i] && linears[i]->site == linears[0]->site;
    }
    if (!together) {
        for (int i = 0; i < count; i++) {
            SQ_TRY(sq_linear_apply(reader, linears[i], x, y[i]));
        }
        return SQ_OK;
    }
    if (reader->site != linears[0]->site) {
        SQ_TRY(enter_site(reader, linears[0]->site, x));
    }
    SQ_TRY(sq_linears_packed(packed, count, &reader->activations, y, n));
    for (int i = 0; i < count; i++) {
        sq_add_bias(linears[i]->bias, reader->m, n[i], y[i]);
    }
    return SQ_OK;
}
