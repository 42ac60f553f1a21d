/* SPDX-License-Identifier: Apache-2.0 */
/* A layer's blocks from dicts and tuples: types and lengths of arrays. sq_layer_seal checks all
 * that the blocks must agree on. */
#include "python/py_layer.h"

#include <limits.h>

#include "core/sq_internal.h"
#include "python/py_dense.h"
#include "python/py_fields.h"
#include "python/py_rotation.h"

enum { NAME_BYTES = 64 };

/* ---- arrays ----------------------------------------------------------------------------- */

/* Keeps array (stolen) alive as long as self; its data, or NULL with an exception. */
static void *
keep(DecoderLayer *self, PyArrayObject *array)
{
    if (!array) {
        return NULL;
    }
    const int failed = PyList_Append(self->owned, (PyObject *)array);
    Py_DECREF(array); /* the list holds it */
    return failed ? NULL : PyArray_DATA(array);
}

/* A vector of float32, [n] or of any length where n < 0, kept; its length in *found. */
static const float *
take_vector(DecoderLayer *self, PyObject *o, int64_t n, const char *name, int64_t *found)
{
    PyArrayObject *array = sq_py_array(o, NPY_FLOAT, 1, name);
    if (array && n >= 0 && sq_py_check_dim(array, 0, n, name)) {
        Py_CLEAR(array);
    }
    if (array && found) {
        *found = PyArray_DIM(array, 0);
    }
    return keep(self, array);
}

/* 0 if o is a tuple of `count`, otherwise -1 and TypeError that says `expected`. */
static int
check_tuple(PyObject *o, Py_ssize_t count, const char *name, const char *expected)
{
    if (PyTuple_Check(o) && PyTuple_GET_SIZE(o) == count) {
        return 0;
    }
    PyErr_Format(PyExc_TypeError, "%s: expected %s, got %R", name, expected, o);
    return -1;
}

/* ---- sites ------------------------------------------------------------------------------ */

static int
take_site(DecoderLayer *self, PyObject *module, PyObject *o, const char *name, struct sq_site *s)
{
    int64_t bits;
    PyObject *object;
    if (check_tuple(o, 4, name, "(k, rotation or None, bits, clip)") ||
        sq_py_integer(PyTuple_GET_ITEM(o, 0), name, "k", &s->k) ||
        sq_py_integer(PyTuple_GET_ITEM(o, 2), name, "bits", &bits) ||
        sq_py_number(PyTuple_GET_ITEM(o, 3), name, "clip", &s->clip)) {
        return -1;
    }
    s->bits = (int)sq_max_i64(INT_MIN, sq_min_i64(bits, INT_MAX));
    object = PyTuple_GET_ITEM(o, 1);
    const struct sq_rotation *rotation = sq_py_rotation(module, object, s->k, name);
    if (!rotation || PyList_Append(self->owned, object)) { /* keeps its arrays */
        return -1;
    }
    s->rotation = *rotation;
    return 0;
}

static int
take_sites(DecoderLayer *self, PyObject *module, PyObject *sites)
{
    if (!PyDict_Check(sites)) {
        PyErr_Format(PyExc_TypeError, "sites: expected a dict, got %s", Py_TYPE(sites)->tp_name);
        return -1;
    }
    PyObject *items = PyDict_Items(sites); /* a copy: parsing may run code that changes sites */
    if (!items) {
        return -1;
    }
    const Py_ssize_t count = PyList_GET_SIZE(items);
    int result = -1;
    self->names = PyTuple_New(count);
    self->sites = PyMem_Calloc((size_t)count, sizeof *self->sites);
    if (!self->names || !self->sites) {
        PyErr_NoMemory();
        goto done;
    }
    self->layer.sites = self->sites;
    for (Py_ssize_t i = 0; i < count; i++) {
        PyObject *item = PyList_GET_ITEM(items, i), *key = PyTuple_GET_ITEM(item, 0);
        char name[NAME_BYTES];
        const char *text = PyUnicode_CheckExact(key) ? PyUnicode_AsUTF8(key) : NULL;
        if (!text) { /* a subclass of str may compare as it likes */
            if (!PyErr_Occurred()) {
                PyErr_Format(PyExc_TypeError, "sites: expected names, got %R", key);
            }
            goto done;
        }
        PyTuple_SET_ITEM(self->names, i, Py_NewRef(key));
        self->layer.n_sites = (int)i + 1;
        PyOS_snprintf(name, sizeof name, "site %s", text);
        if (take_site(self, module, PyTuple_GET_ITEM(item, 1), name, &self->sites[i])) {
            goto done;
        }
    }
    result = 0;
done:
    Py_DECREF(items);
    return result;
}

/* ---- linears ---------------------------------------------------------------------------- */

static int
take_weight(DecoderLayer *self, PyObject *module, PyObject *o, const char *name,
            struct sq_linear *l)
{
    const struct sq_module_state *state = PyModule_GetState(module);
    int64_t group;
    self->linears++;
    if (PyObject_TypeCheck(o, state->packed_type)) {
        self->packed++;
        l->packed = sq_py_packed(module, o, name);
        if (!l->packed || PyList_Append(self->owned, o)) {
            return -1;
        }
        sq_packed_shape(l->packed, &l->n, &l->k, &group);
        return 0;
    }
    PyArrayObject *array = sq_py_dense(o, 2, name, &l->dtype);
    if (!array) {
        return -1;
    }
    l->n = PyArray_DIM(array, 0);
    l->k = PyArray_DIM(array, 1);
    l->dense = keep(self, array);
    return l->dense ? 0 : -1;
}

/* (site name, weight, bias or None). */
static int
take_linear(DecoderLayer *self, PyObject *module, PyObject *o, const char *name,
            struct sq_linear *l)
{
    if (check_tuple(o, 3, name, "(site, weight, bias or None)")) {
        return -1;
    }
    PyObject *site = PyTuple_GET_ITEM(o, 0), *bias = PyTuple_GET_ITEM(o, 2);
    const Py_ssize_t index = PySequence_Index(self->names, site);
    if (index < 0) {
        if (PyErr_ExceptionMatches(PyExc_ValueError)) {
            PyErr_Format(PyExc_ValueError, "%s: expected one of the sites %R, got %R", name,
                         self->names, site);
        }
        return -1;
    }
    l->site = (int)index;
    if (take_weight(self, module, PyTuple_GET_ITEM(o, 1), name, l)) {
        return -1;
    }
    if (bias != Py_None) {
        char text[NAME_BYTES];
        PyOS_snprintf(text, sizeof text, "%s: bias", name);
        l->bias = take_vector(self, bias, l->n, text, NULL);
        return l->bias ? 0 : -1;
    }
    return 0;
}

/* ---- norms ------------------------------------------------------------------------------ */

static int
norm_kind(PyObject *o, const char *name, enum sq_norm_kind *kind)
{
    if (PyUnicode_Check(o) && !PyUnicode_CompareWithASCIIString(o, "rms")) {
        *kind = SQ_NORM_RMS;
    }
    else if (PyUnicode_Check(o) && !PyUnicode_CompareWithASCIIString(o, "layer")) {
        *kind = SQ_NORM_LAYER;
    }
    else {
        PyErr_Format(PyExc_ValueError, "%s: kind: expected 'rms' or 'layer', got %R", name, o);
        return -1;
    }
    return 0;
}

/* A new vector offset + weight [n], kept. */
static const float *
add_offset(DecoderLayer *self, float offset, const float *weight, int64_t n)
{
    const npy_intp dims[1] = {n};
    float *sum = keep(self, sq_py_empty(1, dims, NPY_FLOAT));
    for (int64_t i = 0; sum && i < n; i++) {
        sum[i] = offset + weight[i];
    }
    return sum;
}

/* (kind, eps, offset, weight [n], bias [n] or None); NULL or None: no norm. */
static int
take_norm(DecoderLayer *self, PyObject *o, int64_t n, const char *name, struct sq_norm *norm)
{
    float offset;
    char text[NAME_BYTES];
    if (!o || o == Py_None) {
        return 0;
    }
    if (check_tuple(o, 5, name, "(kind, eps, offset, weight, bias or None)") ||
        norm_kind(PyTuple_GET_ITEM(o, 0), name, &norm->kind) ||
        sq_py_number(PyTuple_GET_ITEM(o, 1), name, "eps", &norm->eps) ||
        sq_py_number(PyTuple_GET_ITEM(o, 2), name, "offset", &offset)) {
        return -1;
    }
    PyObject *weight = PyTuple_GET_ITEM(o, 3), *bias = PyTuple_GET_ITEM(o, 4);
    PyOS_snprintf(text, sizeof text, "%s: weight", name);
    norm->weight = take_vector(self, weight, n, text, NULL);
    if (norm->weight && offset != 0) {
        norm->weight = add_offset(self, offset, norm->weight, n);
    }
    if (norm->weight && bias != Py_None) {
        PyOS_snprintf(text, sizeof text, "%s: bias", name);
        norm->bias = take_vector(self, bias, n, text, NULL);
    }
    return norm->weight && (bias == Py_None || norm->bias) ? 0 : -1;
}

static int
take_norms(DecoderLayer *self, PyObject *dict)
{
    struct sq_layer *l = &self->layer;
    PyObject *before_attention = NULL, *after_attention = NULL, *before_mlp = NULL;
    PyObject *after_mlp = NULL;
    const struct sq_py_field fields[] = {
        {"before_attention", SQ_PY_OBJECT, 1, &before_attention},
        {"after_attention", SQ_PY_OBJECT, 1, &after_attention},
        {"before_mlp", SQ_PY_OBJECT, 1, &before_mlp},
        {"after_mlp", SQ_PY_OBJECT, 1, &after_mlp},
    };
    PyObject *copy = sq_py_fields(dict, "norms", fields, sizeof fields / sizeof *fields);
    const int failed =
        !copy ||
        take_norm(self, before_attention, l->hidden, "norms.before_attention",
                  &l->before_attention) ||
        take_norm(self, after_attention, l->hidden, "norms.after_attention", &l->after_attention) ||
        take_norm(self, before_mlp, l->hidden, "norms.before_mlp", &l->before_mlp) ||
        take_norm(self, after_mlp, l->hidden, "norms.after_mlp", &l->after_mlp);
    Py_XDECREF(copy);
    return failed ? -1 : 0;
}

/* ---- attention -------------------------------------------------------------------------- */

/* (inv_freq [dim / 2], scale), or None. */
static int
take_rotary(DecoderLayer *self, PyObject *o, struct sq_rotary *r)
{
    if (o == Py_None) {
        return 0;
    }
    if (check_tuple(o, 2, "attention.rotary", "(inv_freq, scale) or None") ||
        sq_py_number(PyTuple_GET_ITEM(o, 1), "attention.rotary", "scale", &r->scale)) {
        return -1;
    }
    r->inv_freq = take_vector(self, PyTuple_GET_ITEM(o, 0), -1, "attention.rotary", &r->dim);
    if (r->inv_freq && r->dim == 0) {
        PyErr_SetString(PyExc_ValueError,
                        "attention.rotary: expected frequencies or None, got none");
        return -1;
    }
    r->dim *= 2;
    return r->inv_freq ? 0 : -1;
}

static int
take_attention(DecoderLayer *self, PyObject *module, PyObject *dict)
{
    struct sq_attention *a = &self->layer.attention;
    PyObject *rotary, *q, *k, *v, *o, *q_norm = NULL, *k_norm = NULL;
    const struct sq_py_field fields[] = {
        {"heads", SQ_PY_INTEGER, 0, &a->heads},
        {"kv_heads", SQ_PY_INTEGER, 0, &a->kv_heads},
        {"head_dim", SQ_PY_INTEGER, 0, &a->head_dim},
        {"window", SQ_PY_INTEGER, 0, &a->window},
        {"scale", SQ_PY_NUMBER, 0, &a->scale},
        {"rotary", SQ_PY_OBJECT, 0, &rotary},
        {"q", SQ_PY_OBJECT, 0, &q},
        {"k", SQ_PY_OBJECT, 0, &k},
        {"v", SQ_PY_OBJECT, 0, &v},
        {"o", SQ_PY_OBJECT, 0, &o},
        {"q_norm", SQ_PY_OBJECT, 1, &q_norm},
        {"k_norm", SQ_PY_OBJECT, 1, &k_norm},
    };
    PyObject *copy = sq_py_fields(dict, "attention", fields, sizeof fields / sizeof *fields);
    const int failed = !copy || take_rotary(self, rotary, &a->rotary) ||
                       take_norm(self, q_norm, a->head_dim, "attention.q_norm", &a->q_norm) ||
                       take_norm(self, k_norm, a->head_dim, "attention.k_norm", &a->k_norm) ||
                       take_linear(self, module, q, "attention.q", &a->q) ||
                       take_linear(self, module, k, "attention.k", &a->k) ||
                       take_linear(self, module, v, "attention.v", &a->v) ||
                       take_linear(self, module, o, "attention.o", &a->o);
    Py_XDECREF(copy);
    return failed ? -1 : 0;
}

/* ---- MLP -------------------------------------------------------------------------------- */

static int
take_activation(PyObject *o, enum sq_activation *activation)
{
    static const char *const names[SQ_N_ACTIVATIONS] = {[SQ_SILU] = "silu",
                                                        [SQ_GELU] = "gelu",
                                                        [SQ_GELU_TANH] = "gelu_tanh",
                                                        [SQ_RELU] = "relu",
                                                        [SQ_RELU2] = "relu2"};
    for (int i = 0; i < SQ_N_ACTIVATIONS; i++) {
        if (PyUnicode_Check(o) && !PyUnicode_CompareWithASCIIString(o, names[i])) {
            *activation = i;
            return 0;
        }
    }
    PyErr_Format(PyExc_ValueError,
                 "mlp: activation: expected 'silu', 'gelu', 'gelu_tanh', 'relu' or 'relu2', got %R",
                 o);
    return -1;
}

static int
take_mlp(DecoderLayer *self, PyObject *module, PyObject *dict)
{
    struct sq_mlp *mlp = &self->layer.mlp;
    PyObject *activation, *gate, *up, *down;
    const struct sq_py_field fields[] = {
        {"activation", SQ_PY_OBJECT, 0, &activation},
        {"gate", SQ_PY_OBJECT, 0, &gate},
        {"up", SQ_PY_OBJECT, 0, &up},
        {"down", SQ_PY_OBJECT, 0, &down},
    };
    PyObject *copy = sq_py_fields(dict, "mlp", fields, sizeof fields / sizeof *fields);
    int failed = !copy || take_activation(activation, &mlp->activation);
    mlp->gated = !failed && gate != Py_None;
    failed = failed || (mlp->gated && take_linear(self, module, gate, "mlp.gate", &mlp->gate)) ||
             take_linear(self, module, up, "mlp.up", &mlp->up) ||
             take_linear(self, module, down, "mlp.down", &mlp->down);
    Py_XDECREF(copy);
    return failed ? -1 : 0;
}

/* ---- the layer -------------------------------------------------------------------------- */

int
sq_py_parse_layer(DecoderLayer *self, PyObject *module, const struct sq_py_blocks_of_layer *blocks)
{
    struct sq_fault fault;
    if (take_sites(self, module, blocks->sites) ||
        take_attention(self, module, blocks->attention) || take_mlp(self, module, blocks->mlp) ||
        take_norms(self, blocks->norms)) {
        return -1;
    }
    if (sq_layer_seal(&self->layer, &fault) == SQ_OK) {
        return 0;
    }
    if (fault.site < 0) {
        PyErr_SetString(PyExc_ValueError, fault.text);
    }
    else {
        PyErr_Format(PyExc_ValueError, "site %U: %s", PyTuple_GET_ITEM(self->names, fault.site),
                     fault.text);
    }
    return -1;
}
