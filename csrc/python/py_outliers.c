/* SPDX-License-Identifier: Apache-2.0 */
/* Binding of the outlier measures. */
#include <math.h>

#include "python/py_args.h"

PyDoc_STRVAR(
    outliers_doc,
    "outliers(x, codes, scales, normal)\n--\n\n"
    "How hard x [m, k] is to quantize, given its symmetric codes [m, k] int8 and scales [m]:\n"
    "(tokens [m, 6] float64, channel_sum2 [k] float64, channel_above [k] int64).\n"
    "A token's row: max |x|, sum |x|, sum x^2, sum x^4, sum (x - scale code)^2, and the Shannon\n"
    "entropy of its codes in bits. channel_above counts the tokens whose value in the channel\n"
    "exceeds normal times the token's root mean square. The same bytes at any thread count.\n"
    "ValueError for NaN, Inf and bad shapes.");

static PyObject *
outliers(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"x", "codes", "scales", "normal", NULL};
    PyObject *x_object, *codes_object, *scales_object, *result = NULL;
    PyArrayObject *x = NULL, *codes = NULL, *scales = NULL;
    PyArrayObject *tokens = NULL, *sum2 = NULL, *above = NULL;
    double normal;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOOd:outliers", names, &x_object, &codes_object,
                                     &scales_object, &normal)) {
        return NULL;
    }
    x = sq_py_array(x_object, NPY_FLOAT32, 2, "x");
    codes = x ? sq_py_array(codes_object, NPY_INT8, 2, "codes") : NULL;
    scales = codes ? sq_py_array(scales_object, NPY_FLOAT32, 1, "scales") : NULL;
    if (!scales) {
        goto done;
    }
    const int64_t m = PyArray_DIM(x, 0), k = PyArray_DIM(x, 1);
    if (k < 1) {
        PyErr_SetString(PyExc_ValueError, "x: expected k >= 1, got 0");
        goto done;
    }
    if (sq_py_check_dim(codes, 0, m, "codes") || sq_py_check_dim(codes, 1, k, "codes") ||
        sq_py_check_dim(scales, 0, m, "scales")) {
        goto done;
    }
    if (!(normal > 0.0) || !isfinite(normal)) {
        PyErr_SetString(PyExc_ValueError, "normal: expected a finite number above 0");
        goto done;
    }
    npy_intp token_dims[2] = {m, SQ_OUTLIER_FIELDS}, channel_dims[1] = {k};
    tokens = sq_py_empty(2, token_dims, NPY_FLOAT64);
    sum2 = sq_py_empty(1, channel_dims, NPY_FLOAT64);
    above = sq_py_empty(1, channel_dims, NPY_INT64);
    if (!tokens || !sum2 || !above) {
        goto done;
    }
    sq_status status;
    SQ_BEGIN_NOGIL(m * k);
    status = sq_outliers(PyArray_DATA(x), m, k, PyArray_DATA(codes), PyArray_DATA(scales), normal,
                         PyArray_DATA(tokens), PyArray_DATA(sum2), PyArray_DATA(above));
    SQ_END_NOGIL;
    if (status != SQ_OK) {
        sq_py_raise(module, status, "x, scales");
        goto done;
    }
    result = Py_BuildValue("OOO", tokens, sum2, above);
done:
    Py_XDECREF(x);
    Py_XDECREF(codes);
    Py_XDECREF(scales);
    Py_XDECREF(tokens);
    Py_XDECREF(sum2);
    Py_XDECREF(above);
    return result;
}

PyMethodDef sq_py_outliers_methods[] = {
    {"outliers", (PyCFunction)(void (*)(void))outliers, METH_VARARGS | METH_KEYWORDS, outliers_doc},
    {NULL, NULL, 0, NULL},
};
