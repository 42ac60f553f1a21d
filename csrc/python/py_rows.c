/* SPDX-License-Identifier: Apache-2.0 */
/* Bindings of rows of codes: embedding and head in 8 or 4 bits. */
#include "python/py_dense.h"

#include <string.h>

#include "kernels/code_rows.h"

/* 0 if rows of codes can have so many bits, or -1 with ValueError. */
static int
check_bits(int bits)
{
    if (sq_code_row_bits_valid(bits)) {
        return 0;
    }
    PyErr_Format(PyExc_ValueError, "bits: expected 8, 6 or 4, got %d", bits);
    return -1;
}

PyDoc_STRVAR(
    quantize_rows_doc,
    "quantize_rows(table, bits)\n--\n\n"
    "(codes [n, b] uint8, scales [n, s] uint16 that are bfloat16) of a table [n, k] of float32, "
    "float16 or\nbfloat16, in s = ceil(k / 32) blocks of 32 inputs. 8 bits: b = k signed codes, to "
    "nearest over the\nblock's largest magnitude. 4 bits: b = 16 s, byte j of a block with code + "
    "8 of its inputs j and\nj + 16; 6 bits: b = 24 s, these bytes with the low bits of code + 32, "
    "and behind them byte j with the\nupper two of inputs j, j + 8, j + 16 and j + 24. Both take "
    "the clip of least squared error; a scale\nbelow 0 turns the block round. The same bytes at "
    "any thread count. ValueError names the first row with NaN or "
    "Inf.");

static PyObject *
quantize_rows(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"table", "bits", NULL};
    PyObject *object, *result = NULL;
    PyArrayObject *table = NULL, *codes = NULL, *scales = NULL;
    sq_dtype dtype;
    int bits;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "Oi:quantize_rows", names, &object, &bits) ||
        check_bits(bits)) {
        return NULL;
    }
    table = sq_py_dense(object, 2, "table", &dtype);
    if (!table) {
        goto done;
    }
    const int64_t n = PyArray_DIM(table, 0), k = PyArray_DIM(table, 1);
    if (k < 1) {
        PyErr_SetString(PyExc_ValueError, "table: expected k >= 1, got 0");
        goto done;
    }
    const npy_intp code_dims[2] = {n, sq_code_row_bytes(bits, k)};
    const npy_intp scale_dims[2] = {n, sq_code_row_scales(k)};
    codes = sq_py_empty(2, code_dims, NPY_UINT8);
    scales = sq_py_empty(2, scale_dims, NPY_UINT16);
    if (!codes || !scales) {
        goto done;
    }
    sq_status status;
    int64_t bad_row = 0;
    SQ_BEGIN_NOGIL(n * k);
    status = sq_quantize_rows(bits, dtype, PyArray_DATA(table), n, k, PyArray_DATA(codes),
                              PyArray_DATA(scales), &bad_row);
    SQ_END_NOGIL;
    if (status == SQ_ERR_NONFINITE) {
        PyErr_Format(PyExc_ValueError, "table, row %lld: NaN or Inf found", (long long)bad_row);
    }
    else {
        result =
            status == SQ_OK ? PyTuple_Pack(2, codes, scales) : sq_py_raise(module, status, "table");
    }
done:
    Py_XDECREF(table);
    Py_XDECREF(codes);
    Py_XDECREF(scales);
    return result;
}

/* Rows of codes of k inputs, and the arrays that hold them; zero it before use. */
struct taken_rows {
    PyArrayObject *codes, *scales; /* owned */
    struct sq_code_rows rows;
};

static void
clear_rows(struct taken_rows *t)
{
    Py_CLEAR(t->codes);
    Py_CLEAR(t->scales);
}

/* 0, or -1 with an exception. Clear t either way. */
static int
take_rows(PyObject *codes, PyObject *scales, int bits, int64_t k, struct taken_rows *t)
{
    if (check_bits(bits)) {
        return -1;
    }
    t->codes = sq_py_bits_array(codes, NPY_UINT8, 2, "codes");
    t->scales = t->codes ? sq_py_bits_array(scales, NPY_UINT16, 2, "scales") : NULL;
    if (!t->scales) {
        return -1;
    }
    const int64_t n = PyArray_DIM(t->codes, 0);
    if (sq_py_check_dim(t->codes, 1, sq_code_row_bytes(bits, k), "codes") ||
        sq_py_check_dim(t->scales, 0, n, "scales") ||
        sq_py_check_dim(t->scales, 1, sq_code_row_scales(k), "scales")) {
        return -1;
    }
    t->rows = (struct sq_code_rows){.bits = bits,
                                    .k = k,
                                    .rows = n,
                                    .codes = PyArray_DATA(t->codes),
                                    .scales = PyArray_DATA(t->scales)};
    return 0;
}

PyDoc_STRVAR(linear_rows_doc,
             "linear_rows(x, codes, scales, bits, activation_bits=16)\n--\n\n"
             "y [..., n] = x [..., k] w^T in float32 for w [n, k] in codes and scales as "
             "quantize_rows makes them.\n\n"
             "x gets codes of activation_bits, 8, 16 or 24, with a scale for every 32 inputs; 16 "
             "are two codes of 8, one\nof the value and one of what that leaves, and 24 are "
             "three. codes are read in "
             "place when they are contiguous (a read-only\nmemory map is welcome). A row of y "
             "depends on neither the other rows nor the number of threads, and\nhas the same bits "
             "on every CPU. ValueError if the shapes disagree.");

static PyObject *
linear_rows(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"x", "codes", "scales", "bits", "activation_bits", NULL};
    PyObject *x_object, *codes, *scales;
    PyArrayObject *x = NULL, *y = NULL;
    struct taken_rows w = {0};
    npy_intp dims[NPY_MAXDIMS];
    int bits, activation_bits = 16;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOOi|i:linear_rows", names, &x_object, &codes,
                                     &scales, &bits, &activation_bits)) {
        return NULL;
    }
    if (activation_bits != 8 && activation_bits != 16 && activation_bits != 24) {
        return PyErr_Format(PyExc_ValueError, "activation_bits: expected 8, 16 or 24, got %d",
                            activation_bits);
    }
    x = sq_py_array(x_object, NPY_FLOAT, -1, "x");
    if (!x) {
        goto done;
    }
    const int ndim = PyArray_NDIM(x);
    const int64_t k = ndim ? PyArray_DIM(x, ndim - 1) : 0;
    if (k < 1) {
        PyErr_SetString(PyExc_ValueError, "x: expected at least 1 dimension and k >= 1, got less");
        goto done;
    }
    if (take_rows(codes, scales, bits, k, &w)) {
        goto done;
    }
    int64_t m = 1;
    for (int i = 0; i < ndim - 1; i++) {
        m *= PyArray_DIM(x, i);
    }
    memcpy(dims, PyArray_DIMS(x), (size_t)ndim * sizeof *dims);
    dims[ndim - 1] = w.rows.rows;
    y = sq_py_empty(ndim, dims, NPY_FLOAT);
    if (!y) {
        goto done;
    }
    sq_status status;
    SQ_BEGIN_NOGIL(w.rows.rows * k + m * (w.rows.rows + k));
    status =
        sq_linear_rows(&w.rows, activation_bits, PyArray_DATA(x), m, PyArray_DATA(y), w.rows.rows);
    SQ_END_NOGIL;
    if (status != SQ_OK) {
        sq_py_raise(module, status, "linear_rows");
        Py_CLEAR(y);
    }
done:
    Py_XDECREF(x);
    clear_rows(&w);
    return (PyObject *)y;
}

PyDoc_STRVAR(gather_codes_doc,
             "gather_codes(codes, scales, bits, width, index)\n--\n\n"
             "Rows index [m] of a table [n, width] in codes and scales as quantize_rows makes "
             "them, as float32\n[m, width]: scale * code, exactly. Only the rows asked for are "
             "read. ValueError if an index is\noutside 0 to n - 1.");

static PyObject *
gather_codes(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"codes", "scales", "bits", "width", "index", NULL};
    PyObject *codes, *scales, *index_object;
    PyArrayObject *index = NULL, *out = NULL;
    struct taken_rows w = {0};
    long long width;
    int bits;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOiLO:gather_codes", names, &codes, &scales,
                                     &bits, &width, &index_object)) {
        return NULL;
    }
    if (width < 1) {
        PyErr_Format(PyExc_ValueError, "width: expected at least 1, got %lld", width);
        return NULL;
    }
    if (take_rows(codes, scales, bits, width, &w)) {
        goto done;
    }
    index = sq_py_index(index_object, w.rows.rows, "index");
    if (!index) {
        goto done;
    }
    const npy_intp dims[2] = {PyArray_DIM(index, 0), width};
    out = sq_py_empty(2, dims, NPY_FLOAT);
    if (!out) {
        goto done;
    }
    sq_status status;
    SQ_BEGIN_NOGIL(dims[0] * dims[1]);
    status = sq_gather_code_rows(&w.rows, PyArray_DATA(index), dims[0], PyArray_DATA(out));
    SQ_END_NOGIL;
    if (status != SQ_OK) {
        sq_py_raise(module, status, "gather_codes");
        Py_CLEAR(out);
    }
done:
    Py_XDECREF(index);
    clear_rows(&w);
    return (PyObject *)out;
}

PyMethodDef sq_py_rows_methods[] = {
    SQ_METHOD(quantize_rows),
    SQ_METHOD(linear_rows),
    SQ_METHOD(gather_codes),
    {NULL, NULL, 0, NULL},
};
