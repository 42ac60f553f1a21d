/* SPDX-License-Identifier: Apache-2.0 */
/* Bindings of the quantize stage. */
#include "python/py_dense.h"
#include "python/py_rotation.h"

PyDoc_STRVAR(
    quantize_doc,
    "quantize(x, bits=4, group=0, symmetric=True, clip=1.0, search=False, bfloat16=False)\n--\n\n"
    "Round x [m, k] to codes: (codes [m, k] int8, scales [m, k / g] float32, zeros [m, k / g] "
    "int32\nor None when symmetric), x = scale * (code - zero). group = g inputs share a "
    "scale; 0 is the\nwhole row. Asymmetric codes are uint8 bits. clip in (0, 1] multiplies "
    "the scale; search takes the\nratio of least squared error per group, 1.00 down to 0.20 "
    "times clip. bfloat16 rounds scales, of symmetric codes alone, to bfloat16 before their "
    "use. bits are 4,\n5, 6 or 8.\nRounding is half to even; the same bytes on every machine. "
    "ValueError for "
    "NaN, Inf and bad shapes.");

static PyObject *
quantize(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"x", "bits", "group", "symmetric", "clip", "search", "bfloat16", NULL};
    PyObject *x_object, *result = NULL;
    PyArrayObject *x = NULL, *codes = NULL, *scales = NULL, *zeros = NULL;
    struct sq_quantizer q = {.bits = 4, .symmetric = 1, .clip = 1.0f};
    long long group = 0;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|iLpfpp:quantize", names, &x_object, &q.bits,
                                     &group, &q.symmetric, &q.clip, &q.search,
                                     &q.bfloat16_scales)) {
        return NULL;
    }
    q.group = group;
    x = sq_py_array(x_object, NPY_FLOAT32, 2, "x");
    if (!x) {
        goto done;
    }
    const int64_t m = PyArray_DIM(x, 0), k = PyArray_DIM(x, 1);
    if (sq_py_check_weight_bits(q.bits)) {
        goto done;
    }
    if (q.bfloat16_scales && !q.symmetric) {
        PyErr_SetString(PyExc_ValueError, "bfloat16: expected symmetric codes");
        goto done;
    }
    if (k < 1) {
        PyErr_SetString(PyExc_ValueError, "x: expected k >= 1, got 0");
        goto done;
    }
    if (group < 0 || (group && k % group)) {
        PyErr_Format(PyExc_ValueError, "group: expected 0 or a divisor of k = %lld, got %lld",
                     (long long)k, group);
        goto done;
    }
    npy_intp dims[2] = {m, group ? k / group : 1};
    codes = sq_py_empty(2, PyArray_DIMS(x), NPY_INT8);
    scales = sq_py_empty(2, dims, NPY_FLOAT32);
    zeros = q.symmetric ? NULL : sq_py_empty(2, dims, NPY_INT32);
    if (!codes || !scales || (!q.symmetric && !zeros)) {
        goto done;
    }
    sq_status status;
    SQ_BEGIN_NOGIL(m * k);
    status = sq_quantize(&q, PyArray_DATA(x), m, k, PyArray_DATA(codes), PyArray_DATA(scales),
                         zeros ? PyArray_DATA(zeros) : NULL);
    SQ_END_NOGIL;
    if (status == SQ_ERR_RANGE) { /* bits were checked above */
        PyErr_Format(PyExc_ValueError, "clip: expected 0 < clip <= 1");
        goto done;
    }
    if (status != SQ_OK) {
        sq_py_raise(module, status, "x");
        goto done;
    }
    result = Py_BuildValue("OOO", codes, scales, zeros ? (PyObject *)zeros : Py_None);
done:
    Py_XDECREF(x);
    Py_XDECREF(codes);
    Py_XDECREF(scales);
    Py_XDECREF(zeros);
    return result;
}

PyDoc_STRVAR(dequantize_doc,
             "dequantize(codes, scales, zeros=None)\n--\n\n"
             "scale * (code - zero) as float32 [m, k], for codes [m, k] int8 and scales, zeros "
             "[m, k / g] as\nquantize returns them. With zeros the codes are read as uint8 bits. "
             "TypeError for codes of another\nwidth than 8 bits, ValueError for shapes that do not "
             "agree and zeros outside 0 .. 255.");

static PyObject *
dequantize(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"codes", "scales", "zeros", NULL};
    PyObject *codes_object, *scales_object, *zeros_object = Py_None, *result = NULL;
    PyArrayObject *codes = NULL, *scales = NULL, *zeros = NULL, *x = NULL;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OO|O:dequantize", names, &codes_object,
                                     &scales_object, &zeros_object)) {
        return NULL;
    }
    codes = sq_py_bits_array(codes_object, NPY_INT8, 2, "codes");
    scales = codes ? sq_py_array(scales_object, NPY_FLOAT32, 2, "scales") : NULL;
    if (!scales) {
        goto done;
    }
    const int64_t m = PyArray_DIM(codes, 0), k = PyArray_DIM(codes, 1);
    const int64_t groups = PyArray_DIM(scales, 1);
    if (sq_py_check_dim(scales, 0, m, "scales")) {
        goto done;
    }
    if (k < 1 || groups < 1 || k % groups) {
        PyErr_Format(PyExc_ValueError, "scales: expected shape[1] to divide k = %lld, got %lld",
                     (long long)k, (long long)groups);
        goto done;
    }
    if (zeros_object != Py_None) {
        zeros = sq_py_array(zeros_object, NPY_INT32, 2, "zeros");
        if (!zeros || sq_py_check_dim(zeros, 0, m, "zeros") ||
            sq_py_check_dim(zeros, 1, groups, "zeros")) {
            goto done;
        }
    }
    x = sq_py_empty(2, PyArray_DIMS(codes), NPY_FLOAT32);
    if (!x) {
        goto done;
    }
    sq_status status;
    SQ_BEGIN_NOGIL(m * k);
    status = sq_dequantize(PyArray_DATA(codes), PyArray_DATA(scales),
                           zeros ? PyArray_DATA(zeros) : NULL, m, k, groups, PyArray_DATA(x));
    SQ_END_NOGIL;
    if (status != SQ_OK) {
        sq_py_raise(module, status, status == SQ_ERR_RANGE ? "zeros" : "codes");
        goto done;
    }
    result = Py_NewRef((PyObject *)x);
done:
    Py_XDECREF(codes);
    Py_XDECREF(scales);
    Py_XDECREF(zeros);
    Py_XDECREF(x);
    return result;
}

/* ---- weights ---------------------------------------------------------------------------- */

/* The arguments that quantize_weight and transform_weight share, and what keeps them alive; zero it
 * before use. */
struct weight_arguments {
    PyObject *weight_object, *rotation_object, *columns_object, *rows_object; /* borrowed */
    PyArrayObject *weight, *columns, *rows;                                   /* owned */
    struct sq_weight_transform transform;
    sq_dtype dtype;
    int64_t n, k;
};

static void
clear_weight_arguments(struct weight_arguments *a)
{
    Py_CLEAR(a->weight);
    Py_CLEAR(a->columns);
    Py_CLEAR(a->rows);
}

/* Factors o [count] into *array and *values, or nothing where o is None. 0, or -1. */
static int
take_factors(PyObject *o, int64_t count, const char *name, PyArrayObject **array,
             const float **values)
{
    if (o == Py_None) {
        return 0;
    }
    *array = sq_py_array(o, NPY_FLOAT32, 1, name);
    if (!*array || sq_py_check_dim(*array, 0, count, name)) {
        return -1;
    }
    *values = PyArray_DATA(*array);
    return 0;
}

/* The objects of a, parsed, into its transform. 0, or -1 with an exception. Clear a either way. */
static int
take_weight_arguments(PyObject *module, struct weight_arguments *a)
{
    a->weight = sq_py_dense(a->weight_object, 2, "weight", &a->dtype);
    if (!a->weight) {
        return -1;
    }
    a->n = PyArray_DIM(a->weight, 0);
    a->k = PyArray_DIM(a->weight, 1);
    if (a->k < 1) {
        PyErr_SetString(PyExc_ValueError, "weight: expected k >= 1, got 0");
        return -1;
    }
    if (take_factors(a->columns_object, a->k, "columns", &a->columns, &a->transform.columns) ||
        take_factors(a->rows_object, a->n, "rows", &a->rows, &a->transform.rows)) {
        return -1;
    }
    a->transform.rotation = a->rotation_object == Py_None
                                ? NULL
                                : sq_py_rotation(module, a->rotation_object, a->k, "rotation");
    return PyErr_Occurred() ? -1 : 0;
}

/* The exception of a status (not SQ_OK); NULL. */
static PyObject *
raise_weight(PyObject *module, sq_status status, int64_t bad_row)
{
    if (status == SQ_ERR_NONFINITE) {
        return PyErr_Format(PyExc_ValueError, "weight, row %lld: NaN or Inf found",
                            (long long)bad_row);
    }
    return sq_py_raise(module, status, "weight");
}

PyDoc_STRVAR(
    quantize_weight_doc,
    "quantize_weight(weight, group=0, search=False, rotation=None, columns=None, rows=None, "
    "bits=4,\n"
    "    bfloat16=False)\n--\n\n"
    "(words [n, ceil(k bits / 32)] int32 as pack makes them, scales [n, k / g] float32) of a "
    "weight "
    "[n, k] of\nfloat32, float16 or bfloat16, in one pass over blocks of rows that stay in cache: "
    "columns [k] and\nrows [n] multiply it, a Rotation turns its rows, and quantize with "
    "bits, group, "
    "search and bfloat16 rounds them.\nThe same bytes at any thread count. ValueError for bad "
    "shapes, and "
    "naming the first row that holds, or\ncomes to hold, NaN or Inf.");

static PyObject *
quantize_weight(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"weight", "group", "search",   "rotation", "columns",
                            "rows",   "bits",  "bfloat16", NULL};
    struct weight_arguments a = {
        .rotation_object = Py_None, .columns_object = Py_None, .rows_object = Py_None};
    struct sq_quantizer q = {.bits = 4, .symmetric = 1, .clip = 1.0f};
    long long group = 0;
    if (!PyArg_ParseTupleAndKeywords(
            args, kwargs, "O|LpOOOip:quantize_weight", names, &a.weight_object, &group, &q.search,
            &a.rotation_object, &a.columns_object, &a.rows_object, &q.bits, &q.bfloat16_scales)) {
        return NULL;
    }
    PyObject *result = NULL;
    PyArrayObject *words = NULL, *scales = NULL;
    if (take_weight_arguments(module, &a) || sq_py_check_weight_bits(q.bits)) {
        goto done;
    }
    if (group < 0 || (group && a.k % group)) {
        PyErr_Format(PyExc_ValueError, "group: expected 0 or a divisor of k = %lld, got %lld",
                     (long long)a.k, group);
        goto done;
    }
    q.group = group;
    npy_intp word_dims[2] = {a.n, sq_packed_words(q.bits, a.k)},
             dims[2] = {a.n, group ? a.k / group : 1};
    words = sq_py_empty(2, word_dims, NPY_INT32);
    scales = sq_py_empty(2, dims, NPY_FLOAT32);
    if (!words || !scales) {
        goto done;
    }
    sq_status status;
    int64_t bad_row;
    SQ_BEGIN_NOGIL(a.n * a.k);
    status = sq_quantize_weight(&q, &a.transform, a.dtype, PyArray_DATA(a.weight), a.n, a.k,
                                PyArray_DATA(words), PyArray_DATA(scales), &bad_row);
    SQ_END_NOGIL;
    if (status != SQ_OK) {
        raise_weight(module, status, bad_row);
        goto done;
    }
    result = Py_BuildValue("OO", words, scales);
done:
    Py_XDECREF(words);
    Py_XDECREF(scales);
    clear_weight_arguments(&a);
    return result;
}

PyDoc_STRVAR(
    transform_weight_doc,
    "transform_weight(weight, rotation=None, columns=None, rows=None)\n--\n\n"
    "The rows [n, k] float32 that quantize_weight would round: of a weight of float32, float16 or\n"
    "bfloat16, multiplied by columns [k] and rows [n] and turned by rotation. ValueError for bad "
    "shapes,\nand naming the first row that holds, or comes to hold, NaN or Inf.");

static PyObject *
transform_weight(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"weight", "rotation", "columns", "rows", NULL};
    struct weight_arguments a = {
        .rotation_object = Py_None, .columns_object = Py_None, .rows_object = Py_None};
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|OOO:transform_weight", names,
                                     &a.weight_object, &a.rotation_object, &a.columns_object,
                                     &a.rows_object)) {
        return NULL;
    }
    PyArrayObject *out = NULL;
    if (take_weight_arguments(module, &a)) {
        goto done;
    }
    out = sq_py_empty(2, PyArray_DIMS(a.weight), NPY_FLOAT32);
    if (!out) {
        goto done;
    }
    sq_status status;
    int64_t bad_row;
    SQ_BEGIN_NOGIL(a.n * a.k);
    status = sq_transform_weight(&a.transform, a.dtype, PyArray_DATA(a.weight), a.n, a.k,
                                 PyArray_DATA(out), &bad_row);
    SQ_END_NOGIL;
    if (status != SQ_OK) {
        raise_weight(module, status, bad_row);
        Py_CLEAR(out);
    }
done:
    clear_weight_arguments(&a);
    return (PyObject *)out;
}

PyDoc_STRVAR(will_need_doc,
             "will_need(array)\n--\n\n"
             "Ask the system to read the file behind a memory-mapped array ahead of its use. "
             "Nothing for other\narrays. TypeError unless array is contiguous.");

static PyObject *
will_need(PyObject *Py_UNUSED(module), PyObject *o)
{
    if (!PyArray_Check(o) || !PyArray_IS_C_CONTIGUOUS((PyArrayObject *)o)) {
        PyErr_SetString(PyExc_TypeError, "array: expected a contiguous array");
        return NULL;
    }
    PyArrayObject *a = (PyArrayObject *)o;
    Py_BEGIN_ALLOW_THREADS; /* it may wait for the disk's queue */
    sq_will_need(PyArray_DATA(a), (size_t)PyArray_NBYTES(a));
    Py_END_ALLOW_THREADS;
    Py_RETURN_NONE;
}

PyMethodDef sq_py_quantize_methods[] = {
    {"quantize", (PyCFunction)(void (*)(void))quantize, METH_VARARGS | METH_KEYWORDS, quantize_doc},
    {"dequantize", (PyCFunction)(void (*)(void))dequantize, METH_VARARGS | METH_KEYWORDS,
     dequantize_doc},
    {"quantize_weight", (PyCFunction)(void (*)(void))quantize_weight, METH_VARARGS | METH_KEYWORDS,
     quantize_weight_doc},
    {"transform_weight", (PyCFunction)(void (*)(void))transform_weight,
     METH_VARARGS | METH_KEYWORDS, transform_weight_doc},
    {"will_need", will_need, METH_O, will_need_doc},
    {NULL, NULL, 0, NULL},
};
