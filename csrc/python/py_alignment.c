/* SPDX-License-Identifier: Apache-2.0 */
/* Bindings of the alignment of activations and weights. */
#include "python/py_args.h"

PyDoc_STRVAR(
    block_gram_doc,
    "block_gram(x, b, gram=None)\n--\n\n"
    "The Gram matrices [k / b, b, b] float64 of blocks of b channels: the sums over the rows of\n"
    "x [m, k] of the outer products, in float32 over 256 rows and then in float64. gram: what\n"
    "rows before gave, of which a copy is added to. The same bytes at any number of threads.\n"
    "ValueError unless b divides k, and for NaN or Inf.");

static PyObject *
block_gram(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"x", "b", "gram", NULL};
    PyObject *x_object, *gram_object = Py_None, *result = NULL;
    PyArrayObject *gram = NULL;
    long long b;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OL|O:block_gram", names, &x_object, &b,
                                     &gram_object)) {
        return NULL;
    }
    PyArrayObject *x = sq_py_array(x_object, NPY_FLOAT32, 2, "x");
    if (!x) {
        return NULL;
    }
    const npy_intp m = PyArray_DIM(x, 0), k = PyArray_DIM(x, 1);
    if (b < 1 || b > SQ_ALIGN_B_MAX || k < 1 || k % b) {
        PyErr_Format(PyExc_ValueError, "b: expected 1 to %d, a divisor of k = %zd, got %lld",
                     SQ_ALIGN_B_MAX, (Py_ssize_t)k, b);
        goto done;
    }
    const npy_intp shape[3] = {k / b, b, b};
    if (gram_object == Py_None) {
        gram = (PyArrayObject *)PyArray_ZEROS(3, (npy_intp *)shape, NPY_FLOAT64, 0);
    }
    else if ((gram = sq_py_copy_f64(gram_object, 3, "gram"))) {
        for (int i = 0; i < 3; i++) {
            if (sq_py_check_dim(gram, i, shape[i], "gram")) {
                goto done;
            }
        }
    }
    if (!gram) {
        goto done;
    }
    sq_status status;
    SQ_BEGIN_NOGIL(PyArray_SIZE(x) * b);
    status = sq_block_gram(PyArray_DATA(x), m, k, b, PyArray_DATA(gram));
    SQ_END_NOGIL;
    if (status != SQ_OK) {
        sq_py_raise(module, status, "x");
        goto done;
    }
    result = Py_NewRef((PyObject *)gram);
done:
    Py_DECREF(x);
    Py_XDECREF(gram);
    return result;
}

PyDoc_STRVAR(
    align_blocks_doc,
    "align_blocks(x_gram, w_gram, damping, symmetric=False)\n--\n\n"
    "(M, M^-T), [count, b, b] float64 each, of blocks with the Gram matrices x_gram and w_gram\n"
    "[count, b, b] of activations and weights: x M and W M^-T have equal Gram matrices, so that\n"
    "M M^T is the geometric mean of x_gram^-1 and w_gram. M makes both diagonal, the largest\n"
    "entries first (WUSH, arXiv 2512.00956); symmetric: the symmetric M (CAT, arXiv 2603.04359).\n"
    "damping above 0 is added to the diagonals as a share of each entry, and 1e-2 of their\n"
    "median to all. ValueError for other shapes, NaN, Inf, and a matrix that is not positive\n"
    "semidefinite.");

static PyObject *
align_blocks(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"x_gram", "w_gram", "damping", "symmetric", NULL};
    PyObject *x_object, *w_object, *result = NULL;
    PyArrayObject *w = NULL, *m = NULL, *inverse = NULL;
    double damping;
    int symmetric = 0;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOd|p:align_blocks", names, &x_object,
                                     &w_object, &damping, &symmetric)) {
        return NULL;
    }
    PyArrayObject *x = sq_py_array(x_object, NPY_FLOAT64, 3, "x_gram");
    if (!x || !(w = sq_py_array(w_object, NPY_FLOAT64, 3, "w_gram"))) {
        goto done;
    }
    npy_intp *dims = PyArray_DIMS(x);
    if (dims[1] < 1 || dims[1] > SQ_ALIGN_B_MAX || sq_py_check_dim(x, 2, dims[1], "x_gram")) {
        if (!PyErr_Occurred()) {
            PyErr_Format(PyExc_ValueError, "x_gram: expected blocks of 1 to %d channels, got %zd",
                         SQ_ALIGN_B_MAX, (Py_ssize_t)dims[1]);
        }
        goto done;
    }
    for (int i = 0; i < 3; i++) {
        if (sq_py_check_dim(w, i, dims[i], "w_gram")) {
            goto done;
        }
    }
    if (!(damping > 0 && damping <= 1e6)) {
        PyErr_SetString(PyExc_ValueError, "damping: expected more than 0 and at most 1e6");
        goto done;
    }
    m = sq_py_empty(3, dims, NPY_FLOAT64);
    inverse = sq_py_empty(3, dims, NPY_FLOAT64);
    if (!m || !inverse) {
        goto done;
    }
    sq_status status;
    SQ_BEGIN_NOGIL(PyArray_SIZE(x) * dims[1]);
    status = sq_alignment(PyArray_DATA(x), PyArray_DATA(w), dims[0], dims[1], damping, symmetric,
                          PyArray_DATA(m), PyArray_DATA(inverse));
    SQ_END_NOGIL;
    if (status == SQ_ERR_RANGE) {
        PyErr_SetString(PyExc_ValueError,
                        "x_gram, w_gram: expected positive semidefinite matrices, got others");
        goto done;
    }
    if (status != SQ_OK) {
        sq_py_raise(module, status, "x_gram, w_gram");
        goto done;
    }
    result = PyTuple_Pack(2, (PyObject *)m, (PyObject *)inverse);
done:
    Py_XDECREF(x);
    Py_XDECREF(w);
    Py_XDECREF(m);
    Py_XDECREF(inverse);
    return result;
}

PyDoc_STRVAR(
    block_energy_doc,
    "block_energy(gram, m)\n--\n\n"
    "The sums of squares [count] float64 of the rows x M of each block, for gram and m\n"
    "[count, b, b]: trace(M^T S M), where S, the block's gram, is the sum of the outer products\n"
    "of x. The same bytes at any number of threads. ValueError for other shapes, NaN or Inf.");

static PyObject *
block_energy(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"gram", "m", NULL};
    PyObject *gram_object, *m_object, *result = NULL;
    PyArrayObject *m = NULL, *energy = NULL;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OO:block_energy", names, &gram_object,
                                     &m_object)) {
        return NULL;
    }
    PyArrayObject *gram = sq_py_array(gram_object, NPY_FLOAT64, 3, "gram");
    if (!gram || !(m = sq_py_array(m_object, NPY_FLOAT64, 3, "m"))) {
        goto done;
    }
    npy_intp *dims = PyArray_DIMS(gram);
    if (dims[1] < 1 || dims[1] > SQ_ALIGN_B_MAX) {
        PyErr_Format(PyExc_ValueError, "gram: expected blocks of 1 to %d channels, got %zd",
                     SQ_ALIGN_B_MAX, (Py_ssize_t)dims[1]);
        goto done;
    }
    if (sq_py_check_dim(gram, 2, dims[1], "gram") || sq_py_check_dim(m, 0, dims[0], "m") ||
        sq_py_check_dim(m, 1, dims[1], "m") || sq_py_check_dim(m, 2, dims[1], "m")) {
        goto done;
    }
    if (!(energy = sq_py_empty(1, dims, NPY_FLOAT64))) {
        goto done;
    }
    sq_status status;
    SQ_BEGIN_NOGIL(PyArray_SIZE(gram) * dims[1]);
    status = sq_block_energy(PyArray_DATA(gram), PyArray_DATA(m), dims[0], dims[1],
                             PyArray_DATA(energy));
    SQ_END_NOGIL;
    if (status != SQ_OK) {
        sq_py_raise(module, status, "gram, m");
        goto done;
    }
    result = Py_NewRef((PyObject *)energy);
done:
    Py_XDECREF(gram);
    Py_XDECREF(m);
    Py_XDECREF(energy);
    return result;
}

PyMethodDef sq_py_alignment_methods[] = {
    SQ_METHOD(align_blocks),
    SQ_METHOD(block_energy),
    SQ_METHOD(block_gram),
    {NULL, NULL, 0, NULL},
};
