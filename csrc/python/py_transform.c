/* SPDX-License-Identifier: Apache-2.0 */
/* Bindings of the transform folder: factor sizes, Hadamard matrices, chains. */
#include "python/py_rotation.h"

static double *
f64(PyArrayObject *a)
{
    return PyArray_DATA(a);
}

PyDoc_STRVAR(
    factor_sizes_doc,
    "factor_sizes(k)\n--\n\n"
    "(k1, k2) with k1 * k2 = k, both as near sqrt(k) as possible, k2 an order that carries a\n"
    "Hadamard matrix: a power of two, or 12 * 2^i or 20 * 2^i where that halves the larger\n"
    "factor. Every k >= 1 has an answer (odd k: k2 = 1). ValueError for k < 1.");

static PyObject *
factor_sizes(PyObject *Py_UNUSED(module), PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"k", NULL};
    long long k;
    int64_t k1, k2;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "L:factor_sizes", names, &k)) {
        return NULL;
    }
    if (sq_factor_sizes(k, &k1, &k2) != SQ_OK) {
        return PyErr_Format(PyExc_ValueError, "k: expected at least 1, got %lld", k);
    }
    return Py_BuildValue("LL", (long long)k1, (long long)k2);
}

PyDoc_STRVAR(
    hadamard_matrix_doc,
    "hadamard_matrix(n)\n--\n\n"
    "Orthonormal float64 matrix [n, n] with near-flat entries, for every n from 1 on:\n"
    "Sylvester, Paley I and II and their Kronecker products with Sylvester where the rule of\n"
    "csrc/sq_hadamard.c finds one, otherwise Hartley kron Sylvester. ValueError for n < 1.");

static PyObject *
hadamard_matrix(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"n", NULL};
    Py_ssize_t n;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "n:hadamard_matrix", names, &n)) {
        return NULL;
    }
    if (n < 1 || n > INT32_MAX) {
        return PyErr_Format(PyExc_ValueError, "n: expected 1 to %d, got %zd", INT32_MAX, n);
    }
    PyArrayObject *h = sq_py_empty(2, (npy_intp[]){n, n}, NPY_FLOAT64);
    if (!h) {
        return NULL;
    }
    sq_status status;
    SQ_BEGIN_NOGIL(n * n);
    status = sq_hadamard_matrix(n, f64(h));
    SQ_END_NOGIL;
    if (status != SQ_OK) {
        Py_DECREF(h);
        return sq_py_raise(module, status, "hadamard_matrix");
    }
    return (PyObject *)h;
}

/* The last dimension of x, its rows in *rows; -1 and ValueError if there is none or it is empty. */
static npy_intp
last_axis(PyArrayObject *x, npy_intp *rows, const char *name)
{
    const int ndim = PyArray_NDIM(x);
    if (ndim < 1 || PyArray_DIM(x, ndim - 1) < 1) {
        PyErr_Format(PyExc_ValueError, "%s: expected [..., n] with n >= 1, got %d dimensions%s",
                     name, ndim, ndim < 1 ? "" : " and n = 0");
        return -1;
    }
    const npy_intp n = PyArray_DIM(x, ndim - 1);
    *rows = PyArray_SIZE(x) / n;
    return n;
}

PyDoc_STRVAR(
    hadamard_transform_doc,
    "hadamard_transform(x)\n--\n\n"
    "x [..., n] with hadamard_matrix(n) applied to each vector of the last axis, as a new\n"
    "float64 array, by the fast transform.");

static PyObject *
hadamard_transform(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"x", NULL};
    PyObject *x_object;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O:hadamard_transform", names, &x_object)) {
        return NULL;
    }
    double *workspace = NULL;
    PyObject *result = NULL;
    npy_intp rows, n;
    PyArrayObject *x = sq_py_copy_f64(x_object, -1, "x");
    if (!x || (n = last_axis(x, &rows, "x")) < 0) {
        goto done;
    }
    workspace = PyMem_RawMalloc((size_t)n * 3 * sizeof(double));
    if (!workspace) {
        PyErr_NoMemory();
        goto done;
    }
    sq_status status;
    SQ_BEGIN_NOGIL(PyArray_SIZE(x) * n); /* an odd core costs its order per element */
    status = sq_hadamard_transform(f64(x), rows, n, workspace);
    SQ_END_NOGIL;
    if (status != SQ_OK) {
        sq_py_raise(module, status, "hadamard_transform");
        goto done;
    }
    result = Py_NewRef(x);
done:
    PyMem_RawFree(workspace);
    Py_XDECREF(x);
    return result;
}

PyDoc_STRVAR(
    chain_apply_doc,
    "chain_apply(pairs, angles, x)\n--\n\n"
    "x [..., n] with the rotations pairs [g, 2], angles [g] (radians) applied in order to each\n"
    "vector v of the last axis, as a new float64 array: v_i' = c v_i - s v_j,\n"
    "v_j' = s v_i + c v_j. ValueError for indices outside 0 .. n - 1 or equal ones.");

static PyObject *
chain_apply(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"pairs", "angles", "x", NULL};
    PyObject *pairs_object, *angles_object, *x_object, *result = NULL;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOO:chain_apply", names, &pairs_object,
                                     &angles_object, &x_object)) {
        return NULL;
    }
    PyArrayObject *pairs = NULL, *angles = NULL, *x = sq_py_copy_f64(x_object, -1, "x");
    npy_intp rows, n;
    if (!x || (n = last_axis(x, &rows, "x")) < 0 ||
        !(pairs = sq_py_pairs(pairs_object, n, "pairs")) ||
        !(angles = sq_py_array(angles_object, NPY_FLOAT64, 1, "angles")) ||
        sq_py_check_dim(angles, 0, PyArray_DIM(pairs, 0), "angles")) {
        goto done;
    }
    sq_status status;
    SQ_BEGIN_NOGIL(PyArray_SIZE(x) + PyArray_SIZE(pairs));
    status =
        sq_chain_apply(PyArray_DATA(pairs), f64(angles), PyArray_DIM(pairs, 0), f64(x), rows, n);
    SQ_END_NOGIL;
    if (status != SQ_OK) {
        sq_py_raise(module, status, status == SQ_ERR_NONFINITE ? "angles" : "chain_apply");
        goto done;
    }
    result = Py_NewRef(x);
done:
    Py_XDECREF(pairs);
    Py_XDECREF(angles);
    Py_XDECREF(x);
    return result;
}

PyMethodDef sq_py_transform_methods[] = {
    SQ_METHOD(factor_sizes), SQ_METHOD(hadamard_matrix), SQ_METHOD(hadamard_transform),
    SQ_METHOD(chain_apply),  {NULL, NULL, 0, NULL},
};
