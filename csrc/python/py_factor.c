/* SPDX-License-Identifier: Apache-2.0 */
/* The one parser of factors and of sites' rotations, for rotate(), linear() and DecoderLayer. */
#include "python/py_factor.h"

#include <math.h>

#include "core/sq_internal.h"

PyArrayObject *
sq_py_pairs(PyObject *o, int64_t n, const char *name)
{
    PyArrayObject *pairs = sq_py_array(o, NPY_INT32, 2, name);
    if (!pairs || sq_py_check_dim(pairs, 1, 2, name)) {
        Py_XDECREF(pairs);
        return NULL;
    }
    const int32_t *p = PyArray_DATA(pairs);
    for (npy_intp t = 0; t < PyArray_DIM(pairs, 0); t++) {
        const int32_t i = p[2 * t], j = p[2 * t + 1];
        if (i < 0 || j < 0 || i >= n || j >= n || i == j) {
            PyErr_Format(PyExc_ValueError,
                         "%s: expected two different indices below %lld, got (%d, %d) at step %zd",
                         name, (long long)n, (int)i, (int)j, (Py_ssize_t)t);
            Py_DECREF(pairs);
            return NULL;
        }
    }
    return pairs;
}

void
sq_py_factor_clear(struct sq_py_factor *f)
{
    Py_CLEAR(f->matrix);
    Py_CLEAR(f->pairs);
    free(f->matrix_t);
    free(f->cos_sin);
    f->matrix_t = f->cos_sin = NULL;
}

/* cos and sin of the angles, in float32. -1 with an exception. */
static int
take_angles(struct sq_py_factor *f, PyArrayObject *angles, const char *name)
{
    const int64_t steps = PyArray_DIM(angles, 0);
    const double *theta = PyArray_DATA(angles);
    f->cos_sin = sq_alloc((size_t)steps * 2 * sizeof *f->cos_sin);
    if (!f->cos_sin) {
        PyErr_NoMemory();
        return -1;
    }
    for (int64_t t = 0; t < steps; t++) {
        if (!isfinite(theta[t])) {
            PyErr_Format(PyExc_ValueError, "%s: angle %lld is NaN or Inf", name, (long long)t);
            return -1;
        }
        f->cos_sin[2 * t] = (float)cos(theta[t]);
        f->cos_sin[2 * t + 1] = (float)sin(theta[t]);
    }
    f->factor.cos_sin = f->cos_sin;
    return 0;
}

/* (order, hadamard, pairs, angles). */
static int
take_chain(PyObject *tuple, const char *name, struct sq_py_factor *f)
{
    long long order;
    PyObject *pairs_object, *angles_object;
    if (PyTuple_GET_SIZE(tuple) != 4) {
        PyErr_Format(PyExc_ValueError,
                     "%s: expected (order, hadamard, pairs, angles), got a tuple of %zd", name,
                     PyTuple_GET_SIZE(tuple));
        return -1;
    }
    if (!PyArg_ParseTuple(tuple, "LpOO", &order, &f->factor.hadamard, &pairs_object,
                          &angles_object)) {
        return -1;
    }
    if (order < 1 || order > INT32_MAX) {
        PyErr_Format(PyExc_ValueError, "%s: expected an order of 1 to %d, got %lld", name,
                     INT32_MAX, order);
        return -1;
    }
    f->pairs = sq_py_pairs(pairs_object, order, name);
    PyArrayObject *angles = f->pairs ? sq_py_array(angles_object, NPY_FLOAT64, 1, name) : NULL;
    if (!angles) {
        return -1;
    }
    int result = -1;
    if (PyArray_DIM(angles, 0) != PyArray_DIM(f->pairs, 0)) {
        PyErr_Format(PyExc_ValueError, "%s: expected as many angles as pairs = %zd, got %zd", name,
                     (Py_ssize_t)PyArray_DIM(f->pairs, 0), (Py_ssize_t)PyArray_DIM(angles, 0));
        goto done;
    }
    f->factor.order = order;
    f->factor.steps = PyArray_DIM(angles, 0);
    f->factor.pairs = PyArray_DATA(f->pairs);
    result = take_angles(f, angles, name);
done:
    Py_DECREF(angles);
    return result;
}

int
sq_py_factor(PyObject *o, enum sq_py_side side, const char *name, struct sq_py_factor *f)
{
    if (PyTuple_Check(o)) {
        return take_chain(o, name, f);
    }
    f->matrix = sq_py_array(o, NPY_FLOAT32, 2, name);
    if (!f->matrix) {
        return -1;
    }
    const npy_intp n = PyArray_DIM(f->matrix, 0);
    if (n < 1 || PyArray_DIM(f->matrix, 1) != n) {
        PyErr_Format(PyExc_ValueError, "%s: expected a square matrix, got (%zd, %zd)", name,
                     (Py_ssize_t)n, (Py_ssize_t)PyArray_DIM(f->matrix, 1));
        return -1;
    }
    f->factor.order = n;
    f->factor.matrix = PyArray_DATA(f->matrix);
    if (side == SQ_PY_RIGHT) {
        f->matrix_t = sq_alloc((size_t)PyArray_NBYTES(f->matrix));
        if (!f->matrix_t) {
            PyErr_NoMemory();
            return -1;
        }
        sq_transpose(f->factor.matrix, n, f->matrix_t);
        f->factor.matrix_t = f->matrix_t;
    }
    return 0;
}

/* ---- a site's rotation ------------------------------------------------------------------ */

/* tuple is (first, permutation, second). */
static int
take_blocks(PyObject *tuple, PyObject *right, int64_t k, const char *name, struct sq_py_rotation *r)
{
    PyObject *const parts[3] = {PyTuple_GET_ITEM(tuple, 0), PyTuple_GET_ITEM(tuple, 1),
                                PyTuple_GET_ITEM(tuple, 2)};
    char prefix[40];
    if (right != Py_None) {
        PyErr_Format(PyExc_ValueError, "%s: expected no right factor beside blocks, got %s", name,
                     Py_TYPE(right)->tp_name);
        return -1;
    }
    PyOS_snprintf(prefix, sizeof prefix, "%s: ", name);
    if (sq_py_blocks(parts, prefix, &r->blocks)) {
        return -1;
    }
    r->rotation.blocks = r->blocks.rotation;
    if (r->rotation.blocks.k != k) {
        PyErr_Format(PyExc_ValueError, "%s: expected blocks of %lld inputs, got %lld", name,
                     (long long)k, (long long)r->rotation.blocks.k);
        return -1;
    }
    r->rotation.kind = SQ_BLOCKS;
    return 0;
}

int
sq_py_rotation(PyObject *left, PyObject *right, int64_t k, const char *name,
               struct sq_py_rotation *r)
{
    struct sq_factor *factors[2] = {&r->rotation.left, &r->rotation.right};
    PyObject *objects[2] = {left, right};
    if (PyTuple_Check(left) && PyTuple_GET_SIZE(left) == 3) {
        return take_blocks(left, right, k, name, r);
    }
    for (int i = 0; i < 2; i++) {
        struct sq_py_factor *parsed = &r->factors[i];
        char side[40];
        if (objects[i] == Py_None) {
            continue;
        }
        PyOS_snprintf(side, sizeof side, "%s: %s factor", name, i ? "right" : "left");
        if (sq_py_factor(objects[i], i ? SQ_PY_RIGHT : SQ_PY_LEFT, side, parsed)) {
            return -1;
        }
        if (k % parsed->factor.order) {
            PyErr_Format(PyExc_ValueError, "%s: expected an order dividing %lld, got %lld", side,
                         (long long)k, (long long)parsed->factor.order);
            return -1;
        }
        r->rotation.kind = SQ_KRONECKER;
        *factors[i] = parsed->factor;
    }
    if (r->rotation.kind == SQ_UNROTATED) {
        return 0;
    }
    for (int i = 0; i < 2; i++) {
        if (objects[i] == Py_None) { /* an empty chain leaves its axis as it is */
            factors[i]->order = k / factors[1 - i]->order;
        }
    }
    if (factors[0]->order * factors[1]->order != k) {
        PyErr_Format(PyExc_ValueError, "%s: expected orders k1 * k2 = %lld, got %lld * %lld", name,
                     (long long)k, (long long)factors[0]->order, (long long)factors[1]->order);
        return -1;
    }
    return 0;
}

int
sq_py_rotation_argument(PyObject *o, int64_t k, struct sq_py_rotation *rotation)
{
    if (o == Py_None) {
        return 0;
    }
    const Py_ssize_t size = PyTuple_Check(o) ? PyTuple_GET_SIZE(o) : 0;
    if (size == 2) {
        return sq_py_rotation(PyTuple_GET_ITEM(o, 0), PyTuple_GET_ITEM(o, 1), k, "rotation",
                              rotation);
    }
    if (size == 3) {
        return sq_py_rotation(o, Py_None, k, "rotation", rotation);
    }
    PyErr_Format(PyExc_TypeError,
                 "rotation: expected None, (left, right) or (first, permutation, second), got %s",
                 Py_TYPE(o)->tp_name);
    return -1;
}

void
sq_py_rotation_clear(struct sq_py_rotation *r)
{
    sq_py_factor_clear(&r->factors[0]);
    sq_py_factor_clear(&r->factors[1]);
    sq_py_blocks_clear(&r->blocks);
}
