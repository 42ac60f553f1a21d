/* SPDX-License-Identifier: Apache-2.0 */
/* Bindings of the solvers of Givens rotations, and of principal directions. */
#include "python/py_args.h"

#include <math.h>
#include <string.h>

static double *
f64(PyArrayObject *a)
{
    return PyArray_DATA(a);
}

/* Room for a chain of at most `capacity` steps, cut to `steps` of them once they are known. */
struct chain {
    PyArrayObject *pairs, *angles; /* owned */
};

static int
chain_new(struct chain *c, npy_intp capacity)
{
    c->pairs = sq_py_empty(2, (npy_intp[]){capacity, 2}, NPY_INT32);
    c->angles = sq_py_empty(1, &capacity, NPY_FLOAT64);
    return c->pairs && c->angles ? 0 : -1;
}

static void
chain_clear(struct chain *c)
{
    Py_CLEAR(c->pairs);
    Py_CLEAR(c->angles);
}

/* Exact copies of the first steps, so that no result keeps the full room alive. */
static int
chain_cut(struct chain *c, npy_intp steps)
{
    if (PyArray_DIM(c->angles, 0) == steps) {
        return 0;
    }
    struct chain cut = {NULL, NULL};
    if (chain_new(&cut, steps)) {
        chain_clear(&cut);
        return -1;
    }
    memcpy(PyArray_DATA(cut.pairs), PyArray_DATA(c->pairs), (size_t)steps * 2 * sizeof(int32_t));
    memcpy(PyArray_DATA(cut.angles), PyArray_DATA(c->angles), (size_t)steps * sizeof(double));
    chain_clear(c);
    *c = cut;
    return 0;
}

/* (pairs, angles) of the first steps, new reference. */
static PyObject *
chain_result(struct chain *c, npy_intp steps)
{
    return chain_cut(c, steps) ? NULL : Py_BuildValue("OO", c->pairs, c->angles);
}

/* 0 if max_steps may size a chain, otherwise -1 and a ValueError. */
static int
check_max_steps(Py_ssize_t max_steps)
{
    if (max_steps >= 0 && max_steps <= PY_SSIZE_T_MAX / 16) {
        return 0;
    }
    PyErr_Format(PyExc_ValueError, "max_steps: expected 0 to %zd, got %zd", PY_SSIZE_T_MAX / 16,
                 max_steps);
    return -1;
}

PyDoc_STRVAR(givens_angle_doc,
             "givens_angle(a, b)\n--\n\n"
             "pi/4 - atan2(b, a) in radians: the rotation that makes both entries of (a, b)\n"
             "sqrt((a^2 + b^2) / 2) (SingleQuant, arXiv 2511.22316, the angle of ART).");

static PyObject *
givens_angle(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"a", "b", NULL};
    double a, b;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "dd:givens_angle", names, &a, &b)) {
        return NULL;
    }
    if (!isfinite(a) || !isfinite(b)) {
        return sq_py_raise(module, SQ_ERR_NONFINITE, isfinite(a) ? "b" : "a");
    }
    return PyFloat_FromDouble(sq_givens_angle(a, b));
}

PyDoc_STRVAR(
    art_extremes_doc,
    "art_extremes(v, threshold, max_steps)\n--\n\n"
    "ART on signed extremes v [n]: (pairs [g, 2] int32, angles [g] float64). Pairs the index\n"
    "of largest magnitude with the smallest and makes them equal, until none exceeds\n"
    "threshold * median|v| or max_steps were made (SingleQuant, arXiv 2511.22316).");

static PyObject *
art_extremes(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"v", "threshold", "max_steps", NULL};
    PyObject *v_object, *result = NULL;
    double threshold;
    Py_ssize_t max_steps;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "Odn:art_extremes", names, &v_object, &threshold,
                                     &max_steps)) {
        return NULL;
    }
    if (!(threshold >= 0)) {
        PyObject *given = PyFloat_FromDouble(threshold);
        PyErr_Format(PyExc_ValueError, "threshold: expected at least 0, got %S", given);
        Py_XDECREF(given);
        return NULL;
    }
    struct chain chain = {NULL, NULL};
    PyArrayObject *v = NULL;
    if (check_max_steps(max_steps) || !(v = sq_py_copy_f64(v_object, 1, "v")) ||
        chain_new(&chain, max_steps)) {
        goto done;
    }
    int64_t steps;
    sq_status status;
    SQ_BEGIN_NOGIL(PyArray_SIZE(v) + max_steps);
    status = sq_art_extremes(f64(v), PyArray_DIM(v, 0), threshold, max_steps,
                             PyArray_DATA(chain.pairs), f64(chain.angles), &steps);
    SQ_END_NOGIL;
    if (status != SQ_OK) {
        sq_py_raise(module, status, "v");
        goto done;
    }
    result = chain_result(&chain, steps);
done:
    Py_XDECREF(v);
    chain_clear(&chain);
    return result;
}

PyDoc_STRVAR(
    art_columns_doc,
    "art_columns(columns, max_steps)\n--\n\n"
    "Token-exact ART on columns [n, rows] (one axis index each, rows = tokens x the other\n"
    "axis): (pairs [g, 2] int32, angles [g] float64). Rotates the column of largest peak with\n"
    "the one of smallest, by the angle that equals them in the row of the peak; stops when\n"
    "the pair's peak no longer falls or at max_steps.");

static PyObject *
art_columns(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"columns", "max_steps", NULL};
    PyObject *columns_object, *result = NULL;
    Py_ssize_t max_steps;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "On:art_columns", names, &columns_object,
                                     &max_steps)) {
        return NULL;
    }
    struct chain chain = {NULL, NULL};
    PyArrayObject *columns = NULL;
    if (check_max_steps(max_steps) || !(columns = sq_py_copy_f64(columns_object, 2, "columns")) ||
        chain_new(&chain, max_steps)) {
        goto done;
    }
    int64_t steps;
    sq_status status;
    SQ_BEGIN_NOGIL(PyArray_SIZE(columns));
    status = sq_art_columns(f64(columns), PyArray_DIM(columns, 0), PyArray_DIM(columns, 1),
                            max_steps, PyArray_DATA(chain.pairs), f64(chain.angles), &steps);
    SQ_END_NOGIL;
    if (status != SQ_OK) {
        sq_py_raise(module, status, "columns");
        goto done;
    }
    result = chain_result(&chain, steps);
done:
    Py_XDECREF(columns);
    chain_clear(&chain);
    return result;
}

PyDoc_STRVAR(
    urt_doc,
    "urt(v, u)\n--\n\n"
    "URT: (pairs [g, 2] int32, angles [g] float64), the chain of G_u^T G_v that takes v [n]\n"
    "onto u [n] scaled to |v|; at most 2 (n - 1) rotations (SingleQuant, arXiv 2511.22316).\n"
    "No rotations for v = 0. ValueError when no rotation exists: u = 0, or n = 1 and opposite\n"
    "signs.");

static PyObject *
urt(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"v", "u", NULL};
    PyObject *v_object, *u_object, *result = NULL;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OO:urt", names, &v_object, &u_object)) {
        return NULL;
    }
    struct chain chain = {NULL, NULL};
    PyArrayObject *u = NULL, *v = sq_py_array(v_object, NPY_FLOAT64, 1, "v");
    if (!v || !(u = sq_py_array(u_object, NPY_FLOAT64, 1, "u")) ||
        sq_py_check_dim(u, 0, PyArray_DIM(v, 0), "u") || chain_new(&chain, 2 * PyArray_DIM(v, 0))) {
        goto done;
    }
    int64_t steps;
    sq_status status;
    SQ_BEGIN_NOGIL(PyArray_SIZE(v));
    status = sq_urt(f64(v), f64(u), PyArray_DIM(v, 0), PyArray_DATA(chain.pairs), f64(chain.angles),
                    &steps);
    SQ_END_NOGIL;
    if (status == SQ_ERR_RANGE) {
        PyErr_SetString(PyExc_ValueError, "u: no rotation takes v onto it");
        goto done;
    }
    if (status != SQ_OK) {
        sq_py_raise(module, status, "v, u");
        goto done;
    }
    result = chain_result(&chain, steps);
done:
    Py_XDECREF(v);
    Py_XDECREF(u);
    chain_clear(&chain);
    return result;
}

/* ---- the uniformity sweep --------------------------------------------------------------- */

PyDoc_STRVAR(
    uniformity_sweep_doc,
    "uniformity_sweep(columns, sweeps=1)\n--\n\n"
    "Uniformity sweeps on columns [n, rows]: (pairs [g, 2] int32, angles [g] float64, columns\n"
    "after them). Each sweep rotates every pair of columns once, round-robin, by the angle\n"
    "(pi - arg sum z^4) / 4, z = a + i b, which minimises sum(a^4 + b^4). The result does not\n"
    "depend on the number of threads. ValueError for NaN, Inf or magnitudes above 2^200.");

/* The sweeps, one chain behind the other. */
static sq_status
run_sweeps(PyArrayObject *columns, Py_ssize_t sweeps, struct chain *chain, int64_t *steps)
{
    int32_t *pairs = PyArray_DATA(chain->pairs);
    double *angles = f64(chain->angles);
    *steps = 0;
    for (Py_ssize_t i = 0; i < sweeps; i++) {
        int64_t made;
        const sq_status status =
            sq_uniformity_sweep(f64(columns), PyArray_DIM(columns, 0), PyArray_DIM(columns, 1),
                                pairs + 2 * *steps, angles + *steps, &made);
        if (status != SQ_OK) {
            return status;
        }
        *steps += made;
    }
    return SQ_OK;
}

static PyObject *
uniformity_sweep(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"columns", "sweeps", NULL};
    PyObject *columns_object, *result = NULL;
    Py_ssize_t sweeps = 1;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|n:uniformity_sweep", names, &columns_object,
                                     &sweeps)) {
        return NULL;
    }
    struct chain chain = {NULL, NULL};
    PyArrayObject *columns = sq_py_copy_f64(columns_object, 2, "columns");
    if (!columns) {
        return NULL;
    }
    npy_intp n = PyArray_DIM(columns, 0), capacity;
    if (n < 2 && sweeps > 0) {
        sweeps = 1; /* no pair to turn: one round is as good as many */
    }
    if (sweeps < 0 || n > INT32_MAX - 1 ||
        __builtin_mul_overflow(n * (n - 1) / 2, sweeps, &capacity) ||
        capacity > NPY_MAX_INTP / 16) {
        PyErr_Format(PyExc_ValueError,
                     "sweeps: expected 0 or more sweeps of %zd columns that fit "
                     "memory, got %zd",
                     (Py_ssize_t)n, sweeps);
        goto done;
    }
    if (chain_new(&chain, capacity)) {
        goto done;
    }
    int64_t steps;
    sq_status status;
    SQ_BEGIN_NOGIL(PyArray_SIZE(columns) + capacity * PyArray_DIM(columns, 1));
    status = run_sweeps(columns, sweeps, &chain, &steps);
    SQ_END_NOGIL;
    if (status != SQ_OK) {
        sq_py_raise(module, status, "columns");
        goto done;
    }
    if (chain_cut(&chain, steps) == 0) {
        result = Py_BuildValue("OOO", chain.pairs, chain.angles, columns);
    }
done:
    Py_DECREF(columns);
    chain_clear(&chain);
    return result;
}

PyDoc_STRVAR(
    chain_from_matrix_doc,
    "chain_from_matrix(matrix)\n--\n\n"
    "The chain (pairs [steps, 2] int32, angles [steps] rad) that maps v to matrix v, for an "
    "orthogonal\nmatrix [n, n]: Givens rotations that clear it column by column. With determinant "
    "-1 the last row comes\nout negated. ValueError unless the matrix is square and orthogonal "
    "within 1e-6.");

static PyObject *
chain_from_matrix(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"matrix", NULL};
    PyObject *matrix_object, *result = NULL;
    struct chain chain = {NULL, NULL};
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O:chain_from_matrix", names, &matrix_object)) {
        return NULL;
    }
    PyArrayObject *matrix = sq_py_copy_f64(matrix_object, 2, "matrix");
    if (!matrix || sq_py_check_dim(matrix, 1, PyArray_DIM(matrix, 0), "matrix")) {
        goto done;
    }
    const int64_t n = PyArray_DIM(matrix, 0);
    if (n < 1 || n > SQ_CHAIN_MATRIX_MAX) {
        PyErr_Format(PyExc_ValueError, "matrix: expected an order from 1 to %d, got %lld",
                     SQ_CHAIN_MATRIX_MAX, (long long)n);
        goto done;
    }
    if (chain_new(&chain, n * (n - 1) / 2)) {
        goto done;
    }
    int64_t steps;
    sq_status status;
    SQ_BEGIN_NOGIL(n * n);
    status =
        sq_chain_from_matrix(f64(matrix), n, PyArray_DATA(chain.pairs), f64(chain.angles), &steps);
    SQ_END_NOGIL;
    if (status == SQ_ERR_RANGE) {
        PyErr_SetString(PyExc_ValueError, "matrix: expected an orthogonal one (within 1e-6)");
        goto done;
    }
    if (status != SQ_OK) {
        sq_py_raise(module, status, "matrix");
        goto done;
    }
    result = chain_result(&chain, steps);
done:
    Py_XDECREF(matrix);
    chain_clear(&chain);
    return result;
}

PyDoc_STRVAR(
    principal_directions_doc,
    "principal_directions(gram)\n--\n\n"
    "Eigenvectors of a symmetric matrix [n, n] as rows [n, n] float64, eigenvalues falling, by "
    "cyclic Jacobi\nrotations: the same bytes at any number of threads. ValueError unless it is "
    "square and finite.");

static PyObject *
principal_directions(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"gram", NULL};
    PyObject *object, *result = NULL;
    PyArrayObject *gram = NULL, *directions = NULL;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O:principal_directions", names, &object)) {
        return NULL;
    }
    gram = sq_py_array(object, NPY_FLOAT64, 2, "gram");
    if (!gram || sq_py_check_dim(gram, 1, PyArray_DIM(gram, 0), "gram")) {
        goto done;
    }
    npy_intp dims[2] = {PyArray_DIM(gram, 0), PyArray_DIM(gram, 0)};
    if (dims[0] < 1 || dims[0] > SQ_CHAIN_MATRIX_MAX) {
        PyErr_Format(PyExc_ValueError, "gram: expected an order from 1 to %d, got %lld",
                     SQ_CHAIN_MATRIX_MAX, (long long)dims[0]);
        goto done;
    }
    directions = sq_py_empty(2, dims, NPY_FLOAT64);
    if (!directions) {
        goto done;
    }
    sq_status status;
    SQ_BEGIN_NOGIL(dims[0] * dims[0]);
    status = sq_principal_directions(f64(gram), dims[0], f64(directions));
    SQ_END_NOGIL;
    if (status != SQ_OK) {
        sq_py_raise(module, status, "gram");
        goto done;
    }
    result = Py_NewRef((PyObject *)directions);
done:
    Py_XDECREF(gram);
    Py_XDECREF(directions);
    return result;
}

PyMethodDef sq_py_solve_methods[] = {
    SQ_METHOD(givens_angle),         SQ_METHOD(art_extremes),
    SQ_METHOD(art_columns),          SQ_METHOD(urt),
    SQ_METHOD(uniformity_sweep),     SQ_METHOD(chain_from_matrix),
    SQ_METHOD(principal_directions), {NULL, NULL, 0, NULL},
};
