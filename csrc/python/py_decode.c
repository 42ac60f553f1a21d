/* SPDX-License-Identifier: Apache-2.0 */
/* Bindings of the quantize stage: weights that others stored in floats of 8 or 4 bits. */
#include "python/py_args.h"

#include "core/sq_internal.h"

PyDoc_STRVAR(
    decode_fp8_doc,
    "decode_fp8(codes, scales, block_rows, block_columns)\n--\n\n"
    "bfloat16 bits [count, n, k] uint16 of e4m3 codes [count, n, k] uint8 and a scale for each "
    "block,\n[count, ceil(n / block_rows), ceil(k / block_columns)] float32. NaN codes stay "
    "NaN.\n\n"
    "ValueError for shapes that do not agree, TypeError for codes of another width than 8 bits.");

static PyObject *
decode_fp8(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"codes", "scales", "block_rows", "block_columns", NULL};
    PyObject *codes_object, *scales_object;
    PyArrayObject *codes = NULL, *scales = NULL, *out = NULL;
    long long rows, columns;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOLL:decode_fp8", names, &codes_object,
                                     &scales_object, &rows, &columns)) {
        return NULL;
    }
    if (rows < 1 || columns < 1) {
        return PyErr_Format(PyExc_ValueError,
                            "block_rows, block_columns: expected at least 1, got %lld, %lld", rows,
                            columns);
    }
    codes = sq_py_bits_array(codes_object, NPY_UINT8, 3, "codes");
    scales = codes ? sq_py_array(scales_object, NPY_FLOAT, 3, "scales") : NULL;
    if (!scales) {
        goto done;
    }
    const int64_t count = PyArray_DIM(codes, 0), n = PyArray_DIM(codes, 1);
    const int64_t k = PyArray_DIM(codes, 2);
    if (sq_py_check_dim(scales, 0, count, "scales") ||
        sq_py_check_dim(scales, 1, sq_ceil_div(n, rows), "scales") ||
        sq_py_check_dim(scales, 2, sq_ceil_div(k, columns), "scales")) {
        goto done;
    }
    out = sq_py_empty(3, PyArray_DIMS(codes), NPY_UINT16);
    if (!out) {
        goto done;
    }
    sq_status status;
    SQ_BEGIN_NOGIL(PyArray_SIZE(codes));
    status = sq_decode_fp8(PyArray_DATA(codes), PyArray_DATA(scales), count, n, k, rows, columns,
                           PyArray_DATA(out));
    SQ_END_NOGIL;
    if (status != SQ_OK) {
        sq_py_raise(module, status, "codes");
        Py_CLEAR(out);
    }
done:
    Py_XDECREF(codes);
    Py_XDECREF(scales);
    return (PyObject *)out;
}

PyDoc_STRVAR(
    decode_mxfp4_doc,
    "decode_mxfp4(blocks, scales)\n--\n\n"
    "bfloat16 bits [count, groups * 32, rows] uint16: the transpose of e2m1 codes, blocks\n"
    "[count, rows, groups, 16] uint8 with two codes a byte (low nibble first), times 2^(scale - "
    "127),\nscales [count, rows, groups] uint8. Scale 255 is NaN.\n\n"
    "ValueError for shapes that do not agree, TypeError for another width than 8 bits.");

static PyObject *
decode_mxfp4(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"blocks", "scales", NULL};
    PyObject *blocks_object, *scales_object;
    PyArrayObject *blocks = NULL, *scales = NULL, *out = NULL;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OO:decode_mxfp4", names, &blocks_object,
                                     &scales_object)) {
        return NULL;
    }
    blocks = sq_py_bits_array(blocks_object, NPY_UINT8, 4, "blocks");
    scales = blocks ? sq_py_bits_array(scales_object, NPY_UINT8, 3, "scales") : NULL;
    if (!scales || sq_py_check_dim(blocks, 3, 16, "blocks")) {
        goto done;
    }
    for (int axis = 0; axis < 3; axis++) {
        if (sq_py_check_dim(scales, axis, PyArray_DIM(blocks, axis), "scales")) {
            goto done;
        }
    }
    const int64_t count = PyArray_DIM(blocks, 0), rows = PyArray_DIM(blocks, 1);
    const int64_t groups = PyArray_DIM(blocks, 2);
    npy_intp dims[3] = {count, groups * 32, rows};
    out = sq_py_empty(3, dims, NPY_UINT16);
    if (!out) {
        goto done;
    }
    sq_status status;
    SQ_BEGIN_NOGIL(PyArray_SIZE(out));
    status = sq_decode_mxfp4(PyArray_DATA(blocks), PyArray_DATA(scales), count, rows, groups,
                             PyArray_DATA(out));
    SQ_END_NOGIL;
    if (status != SQ_OK) {
        sq_py_raise(module, status, "blocks");
        Py_CLEAR(out);
    }
done:
    Py_XDECREF(blocks);
    Py_XDECREF(scales);
    return (PyObject *)out;
}

PyMethodDef sq_py_decode_methods[] = {
    SQ_METHOD(decode_fp8),
    SQ_METHOD(decode_mxfp4),
    {NULL, NULL, 0, NULL},
};
