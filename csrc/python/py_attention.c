/* SPDX-License-Identifier: Apache-2.0 */
/* A layer's attention from its dict. */
#include "python/py_blocks.h"

#include "core/sq_internal.h"
#include "python/py_fields.h"

/* A vector of floats [n], or NULL where o is NULL. 0, or -1 with an exception. */
static int
take_optional(DecoderLayer *self, PyObject *o, int64_t n, const char *name, const float **vector)
{
    if (o) {
        *vector = sq_py_take_vector(self, o, n, name, NULL);
        return *vector ? 0 : -1;
    }
    return 0;
}

/* A dict, see layer_doc, or NULL. */
static int
take_rotary(DecoderLayer *self, PyObject *dict, struct sq_rotary *r)
{
    PyObject *inv_freq, *long_inv_freq = NULL;
    const struct sq_py_field fields[] = {
        {"inv_freq", SQ_PY_OBJECT, 0, &inv_freq},
        {"scale", SQ_PY_NUMBER, 1, &r->scale},
        {"interleaved", SQ_PY_INTEGER, 1, &r->interleaved},
        {"long_inv_freq", SQ_PY_PART, 1, &long_inv_freq},
        {"dynamic", SQ_PY_NUMBER, 1, &r->dynamic},
        {"theta", SQ_PY_NUMBER, 1, &r->theta},
        {"original", SQ_PY_INTEGER, 1, &r->original},
    };
    int64_t half = 0;
    if (!dict) {
        return 0;
    }
    r->scale = 1.0f;
    PyObject *copy = sq_py_fields(dict, "attention.rotary", fields, sizeof fields / sizeof *fields);
    if (!copy) {
        return -1;
    }
    r->inv_freq = sq_py_take_vector(self, inv_freq, -1, "attention.rotary: inv_freq", &half);
    int failed =
        !r->inv_freq || take_optional(self, long_inv_freq, half, "attention.rotary: long_inv_freq",
                                      &r->long_inv_freq);
    if (!failed && half == 0) {
        PyErr_SetString(PyExc_ValueError,
                        "attention.rotary: inv_freq: expected frequencies, got none");
        failed = 1;
    }
    r->dim = 2 * half;
    Py_DECREF(copy);
    return failed ? -1 : 0;
}

/* What the dict has; borrowed, NULL where it is None or absent. */
struct parts {
    PyObject *rotary, *sinks, *slopes, *q_norm, *k_norm, *q, *k, *v, *o;
    PyObject *q_a, *q_b, *kv_a, *kv_b, *q_a_norm, *kv_a_norm;
};

/* 0 if the linear is there (wanted) or is not, otherwise -1 and ValueError. */
static int
check_given(PyObject *o, const char *key, int wanted, const char *beside)
{
    if ((o != NULL) == wanted) {
        return 0;
    }
    if (wanted) {
        PyErr_Format(PyExc_ValueError, "attention: '%s' is missing", key);
    }
    else {
        PyErr_Format(PyExc_ValueError, "attention: %s: expected none beside %s, got one", key,
                     beside);
    }
    return -1;
}

static int
take_latent(DecoderLayer *self, PyObject *module, const struct parts *p)
{
    struct sq_attention *a = &self->layer.attention;
    struct sq_latent *l = &a->latent;
    const int direct = !p->q_a && !p->q_b && !p->q_a_norm; /* q in place of q_a and q_b */
    if (check_given(p->kv_a, "kv_a", 1, "") || check_given(p->kv_b, "kv_b", 1, "") ||
        check_given(p->k, "k", 0, "kv_a") || check_given(p->v, "v", 0, "kv_a") ||
        check_given(p->q_a, "q_a", !direct, "") || check_given(p->q_b, "q_b", !direct, "") ||
        check_given(p->q, "q", direct, "q_a") || check_given(p->q_norm, "q_norm", 0, "kv_a") ||
        check_given(p->k_norm, "k_norm", 0, "kv_a")) {
        return -1;
    }
    const int failed =
        direct ? sq_py_take_linear(self, module, p->q, "attention.q", &a->q)
               : sq_py_take_linear(self, module, p->q_a, "attention.q_a", &l->q_a) ||
                     sq_py_take_linear(self, module, p->q_b, "attention.q_b", &l->q_b) ||
                     sq_py_take_norm(self, p->q_a_norm, l->q_a.n, 0, "attention.q_a_norm",
                                     &l->q_a_norm);
    if (!failed && !direct && l->q_a.n == 0) { /* to the core: no q_a */
        PyErr_SetString(PyExc_ValueError, "attention.q_a: expected at least 1 output, got 0");
        return -1;
    }
    return failed || sq_py_take_linear(self, module, p->kv_a, "attention.kv_a", &l->kv_a) ||
           sq_py_take_linear(self, module, p->kv_b, "attention.kv_b", &l->kv_b) ||
           sq_py_take_norm(self, p->kv_a_norm, l->kv_b.k, 0, "attention.kv_a_norm", &l->kv_a_norm);
}

/* q, k and v. */
static int
take_heads(DecoderLayer *self, PyObject *module, const struct parts *p)
{
    struct sq_attention *a = &self->layer.attention;
    return check_given(p->q, "q", 1, "") || check_given(p->k, "k", 1, "") ||
           check_given(p->v, "v", 1, "") ||
           sq_py_take_norm(self, p->q_norm, a->head_dim, a->heads, "attention.q_norm",
                           &a->q_norm) ||
           sq_py_take_norm(self, p->k_norm, a->head_dim, a->kv_heads, "attention.k_norm",
                           &a->k_norm) ||
           sq_py_take_linear(self, module, p->q, "attention.q", &a->q) ||
           sq_py_take_linear(self, module, p->k, "attention.k", &a->k) ||
           sq_py_take_linear(self, module, p->v, "attention.v", &a->v);
}

int
sq_py_take_attention(DecoderLayer *self, PyObject *module, PyObject *dict)
{
    struct sq_attention *a = &self->layer.attention;
    struct parts p = {0};
    const struct sq_py_field fields[] = {
        {"heads", SQ_PY_INTEGER, 0, &a->heads},
        {"kv_heads", SQ_PY_INTEGER, 0, &a->kv_heads},
        {"head_dim", SQ_PY_INTEGER, 0, &a->head_dim},
        {"window", SQ_PY_INTEGER, 0, &a->window},
        {"scale", SQ_PY_NUMBER, 0, &a->scale},
        {"softcap", SQ_PY_NUMBER, 1, &a->softcap},
        {"slopes_bfloat16", SQ_PY_INTEGER, 1, &a->slopes_bfloat16},
        {"query_growth", SQ_PY_NUMBER, 1, &a->query_growth},
        {"query_original", SQ_PY_INTEGER, 1, &a->query_original},
        {"qkv_clip", SQ_PY_NUMBER, 1, &a->qkv_clip},
        {"value_dim", SQ_PY_INTEGER, 1, &a->latent.value_dim},
        {"rotary", SQ_PY_PART, 0, &p.rotary},
        {"sinks", SQ_PY_PART, 1, &p.sinks},
        {"slopes", SQ_PY_PART, 1, &p.slopes},
        {"q_norm", SQ_PY_PART, 1, &p.q_norm},
        {"k_norm", SQ_PY_PART, 1, &p.k_norm},
        {"q", SQ_PY_PART, 1, &p.q},
        {"k", SQ_PY_PART, 1, &p.k},
        {"v", SQ_PY_PART, 1, &p.v},
        {"o", SQ_PY_OBJECT, 0, &p.o},
        {"q_a", SQ_PY_PART, 1, &p.q_a},
        {"q_b", SQ_PY_PART, 1, &p.q_b},
        {"kv_a", SQ_PY_PART, 1, &p.kv_a},
        {"kv_b", SQ_PY_PART, 1, &p.kv_b},
        {"q_a_norm", SQ_PY_PART, 1, &p.q_a_norm},
        {"kv_a_norm", SQ_PY_PART, 1, &p.kv_a_norm},
    };
    PyObject *copy = sq_py_fields(dict, "attention", fields, sizeof fields / sizeof *fields);
    a->is_latent =
        p.q_a || p.q_b || p.kv_a || p.kv_b || p.q_a_norm || p.kv_a_norm || a->latent.value_dim;
    const int failed =
        !copy || take_rotary(self, p.rotary, &a->rotary) ||
        take_optional(self, p.sinks, a->heads, "attention.sinks", &a->sinks) ||
        take_optional(self, p.slopes, a->heads, "attention.slopes", &a->slopes) ||
        (a->is_latent ? take_latent(self, module, &p) : take_heads(self, module, &p)) ||
        sq_py_take_linear(self, module, p.o, "attention.o", &a->o);
    Py_XDECREF(copy);
    return failed ? -1 : 0;
}
