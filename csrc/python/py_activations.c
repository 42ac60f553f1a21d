/* SPDX-License-Identifier: Apache-2.0 */
/* The type Activations: inputs that are rotated and quantized once for several packed linears. */
#include "python/py_rotation.h"

#include <stdlib.h>
#include <string.h>

#include "core/sq_internal.h"
#include "kernels/sq_kernels.h"
#include "runtime/sq_linear.h"

typedef struct {
    PyObject_HEAD struct sq_activations activations;
    void *workspace; /* owned: what activations point to */
    int ndim;
    npy_intp shape[NPY_MAXDIMS]; /* of x */
} activations_object;

/* 0 if the arguments go together, otherwise -1 with ValueError. */
static int
check_arguments(PyArrayObject *x, int bits, float clip, long long int8_inputs)
{
    const int ndim = PyArray_NDIM(x);
    const int64_t k = ndim ? PyArray_DIM(x, ndim - 1) : 0;
    if (k < 1 || k > SQ_PACKED_K_MAX) {
        PyErr_Format(PyExc_ValueError,
                     "x: expected 1 to %lld inputs in its last dimension, got "
                     "%lld",
                     (long long)SQ_PACKED_K_MAX, (long long)k);
        return -1;
    }
    if (bits != 4 && bits != 8 && bits != 16) {
        PyErr_Format(PyExc_ValueError, "bits: expected 4, 8 or 16, got %d", bits);
        return -1;
    }
    if (!(clip > 0.0f && clip <= 1.0f)) {
        PyErr_SetString(PyExc_ValueError, "clip: expected 0 < clip <= 1");
        return -1;
    }
    if (int8_inputs < 0 || int8_inputs >= k || int8_inputs % SQ_K_ALIGN ||
        (int8_inputs && bits != 4)) {
        PyErr_Format(PyExc_ValueError,
                     "int8_inputs: expected a multiple of %d below k = %lld, and "
                     "0 unless bits is 4, got %lld",
                     SQ_K_ALIGN, (long long)k, int8_inputs);
        return -1;
    }
    return 0;
}

/* Fills self from x; 0, or -1 with an exception. */
static int
prepare(PyObject *module, activations_object *self, PyArrayObject *x, int bits, float clip,
        int64_t int8_inputs, const struct sq_rotation *rotation)
{
    self->ndim = PyArray_NDIM(x);
    memcpy(self->shape, PyArray_DIMS(x), (size_t)self->ndim * sizeof *self->shape);
    const int64_t k = self->shape[self->ndim - 1], m = PyArray_SIZE(x) / k;
    self->workspace = sq_alloc(sq_activations_workspace_bytes(bits, m, k));
    void *scratch = sq_alloc(sq_rotation_workspace_bytes(rotation, m));
    if (!self->workspace || !scratch) {
        free(scratch);
        PyErr_NoMemory();
        return -1;
    }
    sq_status status;
    SQ_BEGIN_NOGIL(m * k);
    status =
        sq_activations_prepare(sq_kernels_active(), bits, clip, int8_inputs, rotation,
                               PyArray_DATA(x), m, k, scratch, self->workspace, &self->activations);
    SQ_END_NOGIL;
    free(scratch);
    if (status != SQ_OK) {
        sq_py_raise(module, status, "x");
        return -1;
    }
    return 0;
}

static PyObject *
activations_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"x", "bits", "clip", "rotation", "int8_inputs", NULL};
    PyObject *module = PyType_GetModule(type), *x_object, *rotation_object = Py_None;
    PyObject *result = NULL;
    float clip = 1.0f;
    long long int8_inputs = 0;
    int bits = 4;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|ifOL:Activations", names, &x_object, &bits,
                                     &clip, &rotation_object, &int8_inputs)) {
        return NULL;
    }
    PyArrayObject *x = sq_py_array(x_object, NPY_FLOAT32, -1, "x");
    if (!x || check_arguments(x, bits, clip, int8_inputs)) {
        goto done;
    }
    const struct sq_rotation *rotation =
        sq_py_rotation(module, rotation_object, PyArray_DIM(x, PyArray_NDIM(x) - 1), "rotation");
    activations_object *self = rotation ? (activations_object *)type->tp_alloc(type, 0) : NULL;
    if (self && !prepare(module, self, x, bits, clip, int8_inputs, rotation)) {
        result = Py_NewRef((PyObject *)self);
    }
    Py_XDECREF(self);
done:
    Py_XDECREF(x);
    return result;
}

static void
activations_dealloc(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    free(((activations_object *)self)->workspace);
    type->tp_free(self);
    Py_DECREF(type);
}

static PyObject *
activations_shape(PyObject *object, void *Py_UNUSED(closure))
{
    const activations_object *self = (activations_object *)object;
    return PyArray_IntTupleFromIntp(self->ndim, self->shape);
}

static PyObject *
activations_bits(PyObject *self, void *Py_UNUSED(closure))
{
    return PyLong_FromLong(((activations_object *)self)->activations.bits);
}

static PyGetSetDef activations_getset[] = {
    {"shape", activations_shape, NULL, "Of the inputs.", NULL},
    {"bits", activations_bits, NULL, "4, 8 or 16.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

PyDoc_STRVAR(activations_linear_doc,
             "linear(weight, bias=None)\n--\n\n"
             "What linear gives for the inputs and a PackedWeight [n, k]: [..., n] float32, the "
             "same bits. ValueError\nfor a weight of other inputs, or with another number of "
             "them at 8 bits.");

/* 0 if a weight reads such activations, otherwise -1 with ValueError. */
static int
check_weight(const struct sq_activations *a, const sq_packed_t *weight, int64_t k)
{
    const int64_t int8_inputs = sq_packed_int8_inputs(weight);
    if (k != a->k || int8_inputs != a->int8_inputs) {
        PyErr_Format(PyExc_ValueError,
                     "weight: expected %lld inputs and %lld of them at 8 bits, "
                     "got %lld and %lld",
                     (long long)a->k, (long long)a->int8_inputs, (long long)k,
                     (long long)int8_inputs);
        return -1;
    }
    return 0;
}

static PyObject *
activations_linear(PyObject *object, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"weight", "bias", NULL};
    activations_object *self = (activations_object *)object;
    PyObject *module = PyType_GetModule(Py_TYPE(object)), *weight_object, *bias_object = Py_None;
    PyArrayObject *bias = NULL, *y = NULL;
    int64_t n, k, g;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|O:linear", names, &weight_object,
                                     &bias_object)) {
        return NULL;
    }
    const sq_packed_t *weight = sq_py_packed(module, weight_object, "weight");
    if (!weight) {
        return NULL;
    }
    sq_packed_shape(weight, &n, &k, &g);
    if (check_weight(&self->activations, weight, k)) {
        return NULL;
    }
    if (bias_object != Py_None) {
        bias = sq_py_array(bias_object, NPY_FLOAT32, 1, "bias");
        if (!bias || sq_py_check_dim(bias, 0, n, "bias")) {
            goto done;
        }
    }
    npy_intp dims[NPY_MAXDIMS];
    memcpy(dims, self->shape, (size_t)self->ndim * sizeof *dims);
    dims[self->ndim - 1] = n;
    y = sq_py_empty(self->ndim, dims, NPY_FLOAT32);
    if (!y) {
        goto done;
    }
    sq_status status;
    SQ_BEGIN_NOGIL(n * k);
    status = sq_linear_packed(weight, &self->activations, PyArray_DATA(y), n);
    if (status == SQ_OK) {
        sq_add_bias(bias ? PyArray_DATA(bias) : NULL, self->activations.m, n, PyArray_DATA(y));
    }
    SQ_END_NOGIL;
    if (status != SQ_OK) {
        sq_py_raise(module, status, "linear");
        Py_CLEAR(y);
    }
done:
    Py_XDECREF(bias);
    return (PyObject *)y;
}

static PyMethodDef activations_methods[] = {
    {"linear", (PyCFunction)(void (*)(void))activations_linear, METH_VARARGS | METH_KEYWORDS,
     activations_linear_doc},
    {NULL, NULL, 0, NULL},
};

PyDoc_STRVAR(
    activations_doc,
    "Activations(x, bits=4, clip=1.0, rotation=None, int8_inputs=0)\n--\n\n"
    "Inputs x [..., k] float32, rotated and quantized once for all the linears that read them. "
    "bits, clip and\nrotation: as of linear. int8_inputs: leading inputs with 8 bits, as the "
    "weights have them. Immutable; copies\nx. ValueError for NaN, Inf, bad shapes, bits or clip.");

static PyType_Slot activations_slots[] = {
    {Py_tp_doc, (void *)activations_doc}, {Py_tp_new, activations_new},
    {Py_tp_dealloc, activations_dealloc}, {Py_tp_getset, activations_getset},
    {Py_tp_methods, activations_methods}, {0, NULL},
};

static PyType_Spec activations_spec = {
    .name = "singlequant._C.Activations",
    .basicsize = sizeof(activations_object),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = activations_slots,
};

int
sq_py_add_activations_type(PyObject *module)
{
    PyObject *type = PyType_FromModuleAndSpec(module, &activations_spec, NULL);
    const int failed = type ? PyModule_AddType(module, (PyTypeObject *)type) : -1;
    Py_XDECREF(type);
    return failed;
}
