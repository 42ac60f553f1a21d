/* SPDX-License-Identifier: Apache-2.0 */
/* Bindings of the pack stage: words, packed weights, the linear that multiplies them. */
#include "python/py_rotation.h"

#include "core/sq_internal.h"
#include "kernels/sq_kernels.h"
#include "kernels/sq_peaks.h"

#define SQ_KEYWORDS(f) (PyCFunction)(void (*)(void))(f), METH_VARARGS | METH_KEYWORDS

/* ---- words ------------------------------------------------------------------------------ */

static PyObject *
raise_codes(int bits)
{
    const int half = 1 << (bits - 1);
    return PyErr_Format(PyExc_ValueError, "codes: expected values in %d .. %d, got others", -half,
                        half - 1);
}

/* Codes of so many bits as int8 [n][k], or values out of their range where o has such. New
 * reference, or NULL with the error set. */
static PyArrayObject *
convert_codes(PyObject *o, int bits)
{
    PyArrayObject *any = (PyArrayObject *)PyArray_FromAny(o, NULL, 0, 0, 0, NULL);
    PyArrayObject *values = NULL, *codes = NULL;
    if (!any) {
        return NULL;
    }
    const int type = PyArray_TYPE(any);
    if (type == NPY_INT8 || !PyTypeNum_ISINTEGER(type)) {
        codes = sq_py_array((PyObject *)any, NPY_INT8, 2, "codes");
        goto done;
    }
    values = sq_py_array((PyObject *)any, NPY_FLOAT64, 2, "codes");
    codes = values ? sq_py_empty(2, PyArray_DIMS(values), NPY_INT8) : NULL;
    if (codes) {
        const double *from = PyArray_DATA(values);
        int8_t *to = PyArray_DATA(codes);
        int fits = 1;
        for (npy_intp i = 0; i < PyArray_SIZE(values); i++) {
            const int in_range = from[i] >= -128 && from[i] <= 127;
            fits &= in_range;
            to[i] = in_range ? (int8_t)from[i] : 0;
        }
        if (!fits) {
            Py_CLEAR(codes);
            raise_codes(bits);
        }
    }
done:
    Py_DECREF(any);
    Py_XDECREF(values);
    return codes;
}

PyDoc_STRVAR(
    pack_doc,
    "pack(codes, bits=4)\n--\n\n"
    "Words [n, ceil(k bits / 32)] int32 of codes [n, k] in -2^(bits - 1) .. 2^(bits - 1) - 1, bits "
    "4, 5, 6\nor 8: a stream of code + 2^(bits - 1) along k, low bits first (with 4 and 8 bits the "
    "pack-quantized\nlayout of compressed-tensors); the tail is code 0. ValueError for codes "
    "outside and other bits.");

static PyObject *
pack(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"codes", "bits", NULL};
    int bits = 4;
    PyObject *codes_object, *result = NULL;
    PyArrayObject *codes = NULL, *words = NULL;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|i:pack", names, &codes_object, &bits) ||
        sq_py_check_weight_bits(bits)) {
        return NULL;
    }
    codes = convert_codes(codes_object, bits);
    if (!codes) {
        goto done;
    }
    const int64_t n = PyArray_DIM(codes, 0), k = PyArray_DIM(codes, 1);
    if (k < 1) {
        PyErr_SetString(PyExc_ValueError, "codes: expected k >= 1, got 0");
        goto done;
    }
    npy_intp dims[2] = {n, sq_packed_words(bits, k)};
    words = sq_py_empty(2, dims, NPY_INT32);
    if (!words) {
        goto done;
    }
    sq_status status;
    SQ_BEGIN_NOGIL(n * k);
    status = sq_pack_codes(bits, PyArray_DATA(codes), n, k, PyArray_DATA(words));
    SQ_END_NOGIL;
    if (status == SQ_ERR_RANGE) {
        raise_codes(bits);
        goto done;
    }
    if (status != SQ_OK) {
        sq_py_raise(module, status, "codes");
        goto done;
    }
    result = Py_NewRef((PyObject *)words);
done:
    Py_XDECREF(codes);
    Py_XDECREF(words);
    return result;
}

/* 0 if bits are a width and words [n][ceil(k bits / 32)] fit k, otherwise -1 with ValueError. */
static int
check_words(PyArrayObject *words, long long k, int bits)
{
    if (sq_py_check_weight_bits(bits)) {
        return -1;
    }
    if (k < 1) {
        PyErr_Format(PyExc_ValueError, "k: expected k >= 1, got %lld", k);
        return -1;
    }
    if (PyArray_DIM(words, 1) != sq_packed_words(bits, k)) {
        PyErr_Format(PyExc_ValueError,
                     "words: expected (n, ceil(k * %d / 32)) = (%lld, %lld), got (%lld, %lld)",
                     bits, (long long)PyArray_DIM(words, 0), (long long)sq_packed_words(bits, k),
                     (long long)PyArray_DIM(words, 0), (long long)PyArray_DIM(words, 1));
        return -1;
    }
    return 0;
}

PyDoc_STRVAR(
    unpack_doc,
    "unpack(words, k, bits=4)\n--\n\n"
    "Codes [n, k] int8 of words [n, ceil(k bits / 32)] int32; the reverse of pack. ValueError for "
    "shapes that\ndo not agree and other bits, TypeError for words of another width than 32 bits.");

static PyObject *
unpack(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"words", "k", "bits", NULL};
    int bits = 4;
    PyObject *words_object, *result = NULL;
    PyArrayObject *words = NULL, *codes = NULL;
    long long k;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OL|i:unpack", names, &words_object, &k,
                                     &bits)) {
        return NULL;
    }
    words = sq_py_bits_array(words_object, NPY_INT32, 2, "words");
    if (!words || check_words(words, k, bits)) {
        goto done;
    }
    const int64_t n = PyArray_DIM(words, 0);
    npy_intp dims[2] = {n, k};
    codes = sq_py_empty(2, dims, NPY_INT8);
    if (!codes) {
        goto done;
    }
    sq_status status;
    SQ_BEGIN_NOGIL(n * k);
    status = sq_unpack_codes(bits, PyArray_DATA(words), n, k, PyArray_DATA(codes));
    SQ_END_NOGIL;
    if (status != SQ_OK) {
        sq_py_raise(module, status, "words");
        goto done;
    }
    result = Py_NewRef((PyObject *)codes);
done:
    Py_XDECREF(words);
    Py_XDECREF(codes);
    return result;
}

/* ---- PackedWeight ----------------------------------------------------------------------- */

/* Immutable: made whole by __new__, never written again, hence shared between threads freely. */
typedef struct {
    PyObject_HEAD sq_packed_t *packed; /* owned */
} packed_object;

/* scales as [n][groups] float32, finite, from [n, groups], or from [n] when there is one group. */
static PyArrayObject *
convert_scales(PyObject *o, int64_t n, int64_t groups)
{
    PyArrayObject *scales = sq_py_array(o, NPY_FLOAT32, -1, "scales");
    if (!scales) {
        return NULL;
    }
    const int ndim = PyArray_NDIM(scales);
    const int fits =
        (ndim == 2 && PyArray_DIM(scales, 0) == n && PyArray_DIM(scales, 1) == groups) ||
        (ndim == 1 && groups == 1 && PyArray_DIM(scales, 0) == n);
    if (!fits) {
        PyObject *shape = PyObject_GetAttrString((PyObject *)scales, "shape");
        if (shape) {
            PyErr_Format(PyExc_ValueError, "scales: expected (n, groups) = (%lld, %lld), got %R",
                         (long long)n, (long long)groups, shape);
            Py_DECREF(shape);
        }
        Py_DECREF(scales);
        return NULL;
    }
    const float *values = PyArray_DATA(scales);
    for (int64_t i = 0; i < n * groups; i++) {
        if (!(values[i] - values[i] == 0.0f)) {
            PyErr_Format(PyExc_ValueError, "scales: expected finite values, got %s in row %lld",
                         values[i] != values[i] ? "NaN" : "Inf", (long long)(i / groups));
            Py_DECREF(scales);
            return NULL;
        }
    }
    return scales;
}

/* 0 if the core will take k and group, otherwise -1 with ValueError. */
static int
check_group(long long k, long long group, long long int8_inputs, int bits)
{
    if (k > sq_packed_k_max(bits)) {
        PyErr_Format(PyExc_ValueError, "k: expected k <= %lld with %d bits, got %lld",
                     (long long)sq_packed_k_max(bits), bits, k);
        return -1;
    }
    if (group < 0 || (group && (group % SQ_K_ALIGN || k % group))) {
        PyErr_Format(PyExc_ValueError,
                     "group: expected 0 or a multiple of %d that divides k = %lld, got %lld",
                     SQ_K_ALIGN, k, group);
        return -1;
    }
    const long long step = group ? group : SQ_K_ALIGN;
    if (int8_inputs < 0 || int8_inputs >= k || int8_inputs % step) {
        PyErr_Format(PyExc_ValueError,
                     "int8_inputs: expected a multiple of %lld below k = %lld, got %lld", step, k,
                     int8_inputs);
        return -1;
    }
    return 0;
}

static PyObject *
packed_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"words", "scales", "k", "group", "int8_inputs", "bits", NULL};
    PyObject *words_object, *scales_object;
    PyArrayObject *words = NULL, *scales = NULL;
    packed_object *self = NULL;
    sq_packed_t *packed = NULL;
    long long k, group = 0, int8_inputs = 0;
    int bits = 4;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOL|LLi:PackedWeight", names, &words_object,
                                     &scales_object, &k, &group, &int8_inputs, &bits)) {
        return NULL;
    }
    words = sq_py_bits_array(words_object, NPY_INT32, 2, "words");
    if (!words || check_words(words, k, bits) || check_group(k, group, int8_inputs, bits)) {
        goto done;
    }
    const int64_t n = PyArray_DIM(words, 0);
    if (n < 1) {
        PyErr_SetString(PyExc_ValueError, "words: expected n >= 1, got 0");
        goto done;
    }
    scales = convert_scales(scales_object, n, group ? k / group : 1);
    if (!scales) {
        goto done;
    }
    sq_status status;
    const struct sq_kernels *kernels = sq_kernels_active();
    SQ_BEGIN_NOGIL(n * k);
    status = sq_packed_create(kernels, PyArray_DATA(words), PyArray_DATA(scales), n, k, group,
                              int8_inputs, bits, &packed);
    SQ_END_NOGIL;
    if (status != SQ_OK) {
        sq_py_raise(PyType_GetModule(type), status, "PackedWeight");
        goto done;
    }
    self = (packed_object *)type->tp_alloc(type, 0);
    if (self) {
        self->packed = packed;
        packed = NULL;
    }
done:
    sq_packed_destroy(packed);
    Py_XDECREF(words);
    Py_XDECREF(scales);
    return (PyObject *)self;
}

static void
packed_dealloc(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    sq_packed_destroy(((packed_object *)self)->packed);
    type->tp_free(self);
    Py_DECREF(type);
}

static PyObject *
packed_shape(PyObject *self, void *Py_UNUSED(closure))
{
    int64_t n, k, g;
    sq_packed_shape(((packed_object *)self)->packed, &n, &k, &g);
    return Py_BuildValue("LL", (long long)n, (long long)k);
}

static PyObject *
packed_group(PyObject *self, void *Py_UNUSED(closure))
{
    int64_t n, k, g;
    sq_packed_shape(((packed_object *)self)->packed, &n, &k, &g);
    return PyLong_FromLongLong(g);
}

static PyObject *
packed_int8_inputs(PyObject *self, void *Py_UNUSED(closure))
{
    return PyLong_FromLongLong(sq_packed_int8_inputs(((packed_object *)self)->packed));
}

static PyObject *
packed_bits(PyObject *self, void *Py_UNUSED(closure))
{
    return PyLong_FromLong(sq_packed_bits(((packed_object *)self)->packed));
}

static PyObject *
packed_kernels(PyObject *self, void *Py_UNUSED(closure))
{
    return PyUnicode_FromString(sq_packed_kernels(((packed_object *)self)->packed)->name);
}

static PyObject *
packed_nbytes(PyObject *self, void *Py_UNUSED(closure))
{
    return PyLong_FromSize_t(sq_packed_bytes(((packed_object *)self)->packed));
}

static PyObject *
packed_repr(PyObject *self)
{
    int64_t n, k, g;
    const sq_packed_t *packed = ((packed_object *)self)->packed;
    sq_packed_shape(packed, &n, &k, &g);
    return PyUnicode_FromFormat(
        "PackedWeight(shape=(%lld, %lld), bits=%d, group=%lld, kernels='%s')", (long long)n,
        (long long)k, sq_packed_bits(packed), (long long)g, sq_packed_kernels(packed)->name);
}

static PyGetSetDef packed_getset[] = {
    {"shape", packed_shape, NULL, "(n, k)", NULL},
    {"group", packed_group, NULL, "Inputs that share a scale; 0: one scale per output.", NULL},
    {"int8_inputs", packed_int8_inputs, NULL,
     "Leading inputs whose activations have 8 bits instead of 4.", NULL},
    {"bits", packed_bits, NULL, "Bits of a stored code.", NULL},
    {"kernels", packed_kernels, NULL, "Name of the kernel table that made the panels.", NULL},
    {"nbytes", packed_nbytes, NULL, "Memory held by panels and scales.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

PyDoc_STRVAR(
    packed_doc,
    "PackedWeight(words, scales, k, group=0, int8_inputs=0, bits=4)\n--\n\n"
    "Weights [n, k] of 4, 5, 6 or 8 bits in the panels of the active kernel table, where codes of "
    "more than\n4 bits take a byte. words [n, ceil(k bits / 32)] int32 as pack\nmakes them, scales "
    "[n, k / group] float32 (or [n]); group = 0 is one "
    "scale per output, otherwise a\nmultiple of 32 that divides k. int8_inputs: leading inputs "
    "whose activations get 8 bits "
    "where the others\nget 4, a multiple of 32 and of group. Immutable; copies its "
    "arguments. ValueError for shapes that do not\nagree and scales that are not finite.");

static PyType_Slot packed_slots[] = {
    {Py_tp_doc, (void *)packed_doc}, {Py_tp_new, packed_new},       {Py_tp_dealloc, packed_dealloc},
    {Py_tp_repr, packed_repr},       {Py_tp_getset, packed_getset}, {0, NULL},
};

static PyType_Spec packed_spec = {
    .name = "singlequant._C.PackedWeight",
    .basicsize = sizeof(packed_object),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = packed_slots,
};

int
sq_py_add_pack_types(PyObject *module)
{
    struct sq_module_state *state = PyModule_GetState(module);
    state->packed_type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &packed_spec, NULL);
    return state->packed_type ? PyModule_AddType(module, state->packed_type) : -1;
}

const sq_packed_t *
sq_py_packed(PyObject *module, PyObject *o, const char *name)
{
    struct sq_module_state *state = PyModule_GetState(module);
    if (!PyObject_TypeCheck(o, state->packed_type)) {
        PyErr_Format(PyExc_TypeError, "%s: expected a PackedWeight, got %.200s", name,
                     Py_TYPE(o)->tp_name);
        return NULL;
    }
    return ((packed_object *)o)->packed;
}

/* ---- linear ----------------------------------------------------------------------------- */

PyDoc_STRVAR(
    linear_doc,
    "linear(x, weight, bits=4, clip=1.0, rotation=None, bias=None)\n--\n\n"
    "x [..., k] float32 times a PackedWeight [n, k] transposed: [..., n] float32. bits 4 or 8 "
    "quantizes each\ntoken of x first (symmetric, its maximum times clip is the range; the "
    "weight's 8-bit "
    "inputs get 8 bits\nover their own unclipped range); 16 "
    "leaves it in float32.\nA Rotation turns each token before.\nInteger sums are exact; a token's "
    "values do not depend on the "
    "others or on the number of threads.\nValueError for NaN, Inf, bad shapes, bits or clip.");

/* 0 if the arguments go together, otherwise -1 with ValueError. */
static int
check_linear(PyArrayObject *x, int64_t k, int64_t int8_inputs, int bits, float clip)
{
    const int ndim = PyArray_NDIM(x);
    if (ndim < 1) {
        PyErr_SetString(PyExc_ValueError, "x: expected at least 1 dimension, got 0");
        return -1;
    }
    if (sq_py_check_dim(x, ndim - 1, k, "x")) {
        return -1;
    }
    if (bits != 4 && bits != 8 && bits != 16) {
        PyErr_Format(PyExc_ValueError, "bits: expected 4, 8 or 16, got %d", bits);
        return -1;
    }
    if (int8_inputs && bits != 4) {
        PyErr_Format(PyExc_ValueError, "bits: expected 4, as the weight has 8-bit inputs, got %d",
                     bits);
        return -1;
    }
    if (!(clip > 0.0f && clip <= 1.0f)) {
        PyErr_SetString(PyExc_ValueError, "clip: expected 0 < clip <= 1");
        return -1;
    }
    return 0;
}

struct linear_call {
    const sq_packed_t *weight;
    const struct sq_rotation *rotation;
    int bits;
    float clip;
    int64_t m, n, k;
    const float *x, *bias; /* [m][k]; [n] or NULL */
    float *y;              /* [m][n] */
    void *rotation_workspace, *workspace;
    double *seconds; /* [2] of preparing x and of multiplying, or NULL */
};

/* The product without the GIL. */
static sq_status
multiply(const struct linear_call *c)
{
    struct sq_activations a;
    sq_status status;
    SQ_BEGIN_NOGIL(c->m * c->k + c->n * c->k);
    const double begin = c->seconds ? sq_clock() : 0;
    status = sq_activations_prepare(sq_packed_kernels(c->weight), c->bits, c->clip,
                                    sq_packed_int8_inputs(c->weight), c->rotation, c->x, c->m, c->k,
                                    c->rotation_workspace, c->workspace, &a);
    const double prepared = c->seconds ? sq_clock() : 0;
    if (status == SQ_OK) {
        status = sq_linear_packed(c->weight, &a, c->y, c->n);
    }
    if (status == SQ_OK) {
        sq_add_bias(c->bias, c->m, c->n, c->y);
    }
    if (c->seconds) {
        c->seconds[0] = prepared - begin;
        c->seconds[1] = sq_clock() - prepared;
    }
    SQ_END_NOGIL;
    return status;
}

/* y [..., n] of x [..., k], with memory of its own; NULL with an error. */
static PyObject *
run_linear(PyObject *module, struct linear_call *c, PyArrayObject *x)
{
    const int ndim = PyArray_NDIM(x);
    PyObject *result = NULL;
    npy_intp dims[NPY_MAXDIMS];
    memcpy(dims, PyArray_DIMS(x), (size_t)ndim * sizeof *dims);
    dims[ndim - 1] = c->n;
    PyArrayObject *y = sq_py_empty(ndim, dims, NPY_FLOAT32);
    c->workspace = sq_alloc(sq_activations_workspace_bytes(c->bits, c->m, c->k));
    c->rotation_workspace = sq_alloc(sq_rotation_workspace_bytes(c->rotation, c->m));
    if (!c->workspace || !c->rotation_workspace) {
        PyErr_NoMemory();
    }
    if (!y || !c->workspace || !c->rotation_workspace) {
        goto done;
    }
    c->y = PyArray_DATA(y);
    const sq_status status = multiply(c);
    if (status != SQ_OK) {
        sq_py_raise(module, status, "x");
        goto done;
    }
    result = Py_NewRef((PyObject *)y);
done:
    free(c->workspace);
    free(c->rotation_workspace);
    Py_XDECREF(y);
    return result;
}

PyObject *
sq_py_linear(PyObject *module, PyObject *args, PyObject *kwargs, const char *format,
             double seconds[2])
{
    static char *names[] = {"x", "weight", "bits", "clip", "rotation", "bias", NULL};
    PyObject *x_object, *weight_object, *rotation_object = Py_None, *bias_object = Py_None;
    PyObject *result = NULL;
    PyArrayObject *x = NULL, *bias = NULL;
    struct linear_call c = {.bits = 4, .clip = 1.0f, .seconds = seconds};
    int64_t g;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, format, names, &x_object, &weight_object,
                                     &c.bits, &c.clip, &rotation_object, &bias_object)) {
        return NULL;
    }
    c.weight = sq_py_packed(module, weight_object, "weight");
    x = c.weight ? sq_py_array(x_object, NPY_FLOAT32, -1, "x") : NULL;
    if (!x) {
        goto done;
    }
    sq_packed_shape(c.weight, &c.n, &c.k, &g);
    if (check_linear(x, c.k, sq_packed_int8_inputs(c.weight), c.bits, c.clip) ||
        !(c.rotation = sq_py_rotation(module, rotation_object, c.k, "rotation"))) {
        goto done;
    }
    if (bias_object != Py_None) {
        bias = sq_py_array(bias_object, NPY_FLOAT32, 1, "bias");
        if (!bias || sq_py_check_dim(bias, 0, c.n, "bias")) {
            goto done;
        }
        c.bias = PyArray_DATA(bias);
    }
    c.m = PyArray_SIZE(x) / c.k;
    c.x = PyArray_DATA(x);
    result = run_linear(module, &c, x);
done:
    Py_XDECREF(x);
    Py_XDECREF(bias);
    return result;
}

static PyObject *
linear(PyObject *module, PyObject *args, PyObject *kwargs)
{
    return sq_py_linear(module, args, kwargs, "OO|ifOO:linear", NULL);
}

PyMethodDef sq_py_pack_methods[] = {
    {"pack", SQ_KEYWORDS(pack), pack_doc},
    {"unpack", SQ_KEYWORDS(unpack), unpack_doc},
    {"linear", SQ_KEYWORDS(linear), linear_doc},
    {NULL, NULL, 0, NULL},
};
