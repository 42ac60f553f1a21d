/* SPDX-License-Identifier: Apache-2.0 */
/* Bindings of the quantize stage. */
#include "py_args.h"

PyDoc_STRVAR(
    quantize_doc,
    "quantize(x, bits=4, group=0, symmetric=True, clip=1.0, search=False)\n--\n\n"
    "Round x [m, k] to codes: (codes [m, k] int8, scales [m, k / g] float32, zeros [m, k / g] "
    "int32\nor None when symmetric), x = scale * (code - zero). group = g inputs share a "
    "scale; 0 is the\nwhole row. Asymmetric codes are uint8 bits. clip in (0, 1] multiplies "
    "the scale; search takes the\nratio of least squared error per group, 1.00 down to 0.20 "
    "times clip.\nRounding is half to even; the same bytes on every machine. ValueError for "
    "NaN, Inf and bad shapes.");

static PyObject *
quantize(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"x", "bits", "group", "symmetric", "clip", "search", NULL};
    PyObject *x_object, *result = NULL;
    PyArrayObject *x = NULL, *codes = NULL, *scales = NULL, *zeros = NULL;
    struct sq_quantizer q = {.bits = 4, .symmetric = 1, .clip = 1.0f};
    long long group = 0;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|iLpfp:quantize", names, &x_object, &q.bits,
                                     &group, &q.symmetric, &q.clip, &q.search)) {
        return NULL;
    }
    q.group = group;
    x = sq_py_array(x_object, NPY_FLOAT32, 2, "x");
    if (!x) {
        goto done;
    }
    const int64_t m = PyArray_DIM(x, 0), k = PyArray_DIM(x, 1);
    if (q.bits != 4 && q.bits != 8) {
        PyErr_Format(PyExc_ValueError, "bits: expected 4 or 8, got %d", q.bits);
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
    if (!codes || !scales) {
        goto done;
    }
    if (!q.symmetric) {
        zeros = sq_py_empty(2, dims, NPY_INT32);
        if (!zeros) {
            goto done;
        }
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

PyMethodDef sq_py_quantize_methods[] = {
    {"quantize", (PyCFunction)(void (*)(void))quantize, METH_VARARGS | METH_KEYWORDS, quantize_doc},
    {"dequantize", (PyCFunction)(void (*)(void))dequantize, METH_VARARGS | METH_KEYWORDS,
     dequantize_doc},
    {NULL, NULL, 0, NULL},
};
