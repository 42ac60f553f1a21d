/* SPDX-License-Identifier: Apache-2.0 */
/* A layer's blocks from dicts and tuples: types and lengths of arrays. sq_layer_seal checks all
 * that the blocks must agree on. */
#include "python/py_blocks.h"

#include <limits.h>

#include "core/sq_internal.h"
#include "python/py_dense.h"
#include "python/py_fields.h"
#include "python/py_rotation.h"

/* ---- arrays ----------------------------------------------------------------------------- */

void *
sq_py_keep(DecoderLayer *self, PyArrayObject *array)
{
    if (!array) {
        return NULL;
    }
    const int failed = PyList_Append(self->owned, (PyObject *)array);
    Py_DECREF(array); /* the list holds it */
    return failed ? NULL : PyArray_DATA(array);
}

PyArrayObject *
sq_py_take_array(DecoderLayer *self, PyObject *o, int ndim, const char *name)
{
    PyArrayObject *array = sq_py_array(o, NPY_FLOAT, ndim, name);
    return sq_py_keep(self, array) ? array : NULL;
}

const float *
sq_py_take_vector(DecoderLayer *self, PyObject *o, int64_t n, const char *name, int64_t *found)
{
    PyArrayObject *array = sq_py_take_array(self, o, 1, name);
    if (!array || (n >= 0 && sq_py_check_dim(array, 0, n, name))) {
        return NULL;
    }
    if (found) {
        *found = PyArray_DIM(array, 0);
    }
    return PyArray_DATA(array);
}

int
sq_py_check_tuple(PyObject *o, Py_ssize_t count, const char *name, const char *expected)
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
    if (sq_py_check_tuple(o, 4, name, "(k, rotation or None, bits, clip)") ||
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
        char name[SQ_PY_NAME_BYTES];
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
    l->dense = sq_py_keep(self, array);
    return l->dense ? 0 : -1;
}

int
sq_py_take_linear(DecoderLayer *self, PyObject *module, PyObject *o, const char *name,
                  struct sq_linear *l)
{
    if (sq_py_check_tuple(o, 3, name, "(site, weight, bias or None)")) {
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
        char text[SQ_PY_NAME_BYTES];
        PyOS_snprintf(text, sizeof text, "%s: bias", name);
        l->bias = sq_py_take_vector(self, bias, l->n, text, NULL);
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

/* A new vector offset + weight, kept. */
static const float *
add_offset(DecoderLayer *self, float offset, PyArrayObject *array)
{
    const float *weight = PyArray_DATA(array);
    const int64_t n = PyArray_SIZE(array);
    const npy_intp dims[1] = {n};
    float *sum = sq_py_keep(self, sq_py_empty(1, dims, NPY_FLOAT));
    for (int64_t i = 0; sum && i < n; i++) {
        sum[i] = offset + weight[i];
    }
    return sum;
}

/* Fills rows and n from the shape of a weight of heads, see sq_py_take_norm. */
static int
head_norm_shape(PyArrayObject *weight, int64_t n, int64_t heads, const char *name,
                struct sq_norm *norm)
{
    const npy_intp *dims = PyArray_DIMS(weight);
    const int ndim = PyArray_NDIM(weight);
    int64_t all;
    if (ndim == 1 && dims[0] == n) {
        return 0;
    }
    if (ndim == 1 && sq_product(heads, n, &all) && dims[0] == all) {
        norm->n = all;
        return 0;
    }
    if (ndim == 2 && dims[0] == heads && dims[1] == n) {
        norm->rows = heads;
        return 0;
    }
    PyObject *found = PyObject_GetAttrString((PyObject *)weight, "shape");
    if (found) {
        PyErr_Format(PyExc_ValueError,
                     "%s: expected shape (head_dim,), (heads, head_dim) or (heads * head_dim,) "
                     "with heads, head_dim = %lld, %lld, got %R",
                     name, (long long)heads, (long long)n, found);
        Py_DECREF(found);
    }
    return -1;
}

/* 0 if a norm's weight has a shape it may have, which goes to norm; otherwise -1 and ValueError. */
static int
norm_shape(PyArrayObject *weight, int64_t n, int64_t heads, const char *name, struct sq_norm *norm)
{
    norm->n = n;
    norm->rows = 1;
    if (heads > 0) {
        return head_norm_shape(weight, n, heads, name, norm);
    }
    return sq_py_check_ndim(weight, 1, name) ||
                   (n >= 0 && sq_py_check_dim(weight, 0, n, name)) /* sq_layer_seal sees n < 0 */
               ? -1
               : 0;
}

static const float *
take_norm_bias(DecoderLayer *self, PyObject *o, PyArrayObject *weight, const char *name)
{
    PyArrayObject *bias = sq_py_take_array(self, o, PyArray_NDIM(weight), name);
    for (int axis = 0; bias && axis < PyArray_NDIM(weight); axis++) {
        if (sq_py_check_dim(bias, axis, PyArray_DIM(weight, axis), name)) {
            return NULL;
        }
    }
    return bias ? PyArray_DATA(bias) : NULL;
}

int
sq_py_take_norm(DecoderLayer *self, PyObject *o, int64_t n, int64_t heads, const char *name,
                struct sq_norm *norm)
{
    float offset;
    char text[SQ_PY_NAME_BYTES];
    if (!o || o == Py_None) {
        return 0;
    }
    if (sq_py_check_tuple(o, 5, name, "(kind, eps, offset, weight, bias or None)") ||
        norm_kind(PyTuple_GET_ITEM(o, 0), name, &norm->kind) ||
        sq_py_number(PyTuple_GET_ITEM(o, 1), name, "eps", &norm->eps) ||
        sq_py_number(PyTuple_GET_ITEM(o, 2), name, "offset", &offset)) {
        return -1;
    }
    PyObject *weight_object = PyTuple_GET_ITEM(o, 3), *bias = PyTuple_GET_ITEM(o, 4);
    PyOS_snprintf(text, sizeof text, "%s: weight", name);
    PyArrayObject *weight = sq_py_take_array(self, weight_object, -1, text);
    if (!weight || norm_shape(weight, n, heads, text, norm)) {
        return -1;
    }
    norm->weight = offset != 0 ? add_offset(self, offset, weight) : PyArray_DATA(weight);
    if (norm->weight && bias != Py_None) {
        PyOS_snprintf(text, sizeof text, "%s: bias", name);
        norm->bias = take_norm_bias(self, bias, weight, text);
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
        sq_py_take_norm(self, before_attention, l->hidden, 0, "norms.before_attention",
                        &l->before_attention) ||
        sq_py_take_norm(self, after_attention, l->hidden, 0, "norms.after_attention",
                        &l->after_attention) ||
        sq_py_take_norm(self, before_mlp, l->hidden, 0, "norms.before_mlp", &l->before_mlp) ||
        sq_py_take_norm(self, after_mlp, l->hidden, 0, "norms.after_mlp", &l->after_mlp);
    Py_XDECREF(copy);
    return failed ? -1 : 0;
}

/* ---- the layer -------------------------------------------------------------------------- */

int
sq_py_parse_layer(DecoderLayer *self, PyObject *module, const struct sq_py_blocks_of_layer *blocks)
{
    struct sq_fault fault;
    if (take_sites(self, module, blocks->sites) ||
        sq_py_take_attention(self, module, blocks->attention) ||
        sq_py_take_feed(self, module, blocks->mlp, blocks->experts) ||
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
