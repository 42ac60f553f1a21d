/* SPDX-License-Identifier: Apache-2.0 */
/* Bindings of DuQuant: its random steps, greedy blocks and zigzag. */
#include "python/py_args.h"

#include "core/sq_internal.h"

/* 0 if o is an integer that a seed can hold, otherwise -1 with TypeError or ValueError. */
static int
convert_seed(PyObject *o, uint64_t *seed)
{
    PyObject *index = PyNumber_Index(o);
    if (!index) {
        return -1;
    }
    *seed = PyLong_AsUnsignedLongLong(index); /* OverflowError outside, negative ones too */
    if (PyErr_Occurred()) {
        PyErr_Format(PyExc_ValueError, "seed: expected an integer from 0 to 2^64 - 1, got %S",
                     index);
        Py_DECREF(index);
        return -1;
    }
    Py_DECREF(index);
    return 0;
}

PyDoc_STRVAR(
    random_orthogonal_doc,
    "random_orthogonal(n, seed)\n--\n\n"
    "A random orthogonal matrix [n, n] float64 of Haar's measure (Stewart 1980), n <= 4096.\n"
    "A seed from 0 to 2^64 - 1 gives the same matrix at any thread count.");

static PyObject *
random_orthogonal(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"n", "seed", NULL};
    PyObject *seed_object;
    Py_ssize_t n;
    uint64_t seed;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "nO:random_orthogonal", names, &n,
                                     &seed_object) ||
        convert_seed(seed_object, &seed)) {
        return NULL;
    }
    if (n < 1 || n > SQ_DUQUANT_B_MAX) {
        return PyErr_Format(PyExc_ValueError, "n: expected 1 to %d, got %zd", SQ_DUQUANT_B_MAX, n);
    }
    const npy_intp dims[2] = {n, n};
    PyArrayObject *q = sq_py_empty(2, dims, NPY_FLOAT64);
    double *workspace = sq_alloc((size_t)(2 * n) * sizeof *workspace);
    sq_status status = SQ_ERR_NOMEM;
    if (q && workspace) {
        SQ_BEGIN_NOGIL(n * n);
        status = sq_random_orthogonal(n, seed, PyArray_DATA(q), workspace);
        SQ_END_NOGIL;
    }
    free(workspace);
    if (status != SQ_OK) {
        Py_XDECREF(q);
        return sq_py_raise(module, status, "random_orthogonal");
    }
    return (PyObject *)q;
}

PyDoc_STRVAR(
    duquant_steps_doc,
    "duquant_steps(b, count, seed)\n--\n\n"
    "Matrices R~ Q [count, b, b] float32 of DuQuant's equation 2, one per greedy step: Q =\n"
    "diag(1, Q') with its own random orthogonal Q', R~ orthogonal with a flat first row. The\n"
    "first column of each is 1 / sqrt(b). b <= 4096. A seed from 0 to 2^64 - 1 gives the same\n"
    "matrices at any thread count.");

static PyObject *
duquant_steps(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"b", "count", "seed", NULL};
    PyObject *seed_object;
    Py_ssize_t b, count;
    uint64_t seed;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "nnO:duquant_steps", names, &b, &count,
                                     &seed_object) ||
        convert_seed(seed_object, &seed)) {
        return NULL;
    }
    if (b < 1 || b > SQ_DUQUANT_B_MAX || count < 0) {
        return PyErr_Format(PyExc_ValueError,
                            "expected b of 1 to %d and a count of at least 0, got %zd and %zd",
                            SQ_DUQUANT_B_MAX, b, count);
    }
    const npy_intp dims[3] = {count, b, b};
    PyArrayObject *steps = sq_py_empty(3, dims, NPY_FLOAT32);
    if (!steps) {
        return NULL;
    }
    sq_status status;
    SQ_BEGIN_NOGIL(PyArray_SIZE(steps));
    status = sq_duquant_steps(b, count, seed, PyArray_DATA(steps));
    SQ_END_NOGIL;
    if (status != SQ_OK) {
        Py_DECREF(steps);
        return sq_py_raise(module, status, "duquant_steps");
    }
    return (PyObject *)steps;
}

PyDoc_STRVAR(
    duquant_blocks_doc,
    "duquant_blocks(sample, steps)\n--\n\n"
    "DuQuant's greedy rotation of each block of b columns of sample [rows, k], b = the order of\n"
    "steps [count, b, b]: (blocks [k / b, b, b], peaks [k / b, count + 1]), both float32. Step i\n"
    "swaps the column of largest absolute value with the first, multiplies by steps[i] and swaps\n"
    "back; the product of the first n steps is kept, n the first with the lowest peak (largest\n"
    "absolute value; peaks has it before and after each step), n = 0 being the identity. The\n"
    "result does not depend on the number of threads. ValueError unless b divides k, and for NaN\n"
    "and Inf.");

static PyObject *
duquant_blocks(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"sample", "steps", NULL};
    PyObject *sample_object, *steps_object, *result = NULL;
    PyArrayObject *sample = NULL, *steps = NULL, *blocks = NULL, *peaks = NULL;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OO:duquant_blocks", names, &sample_object,
                                     &steps_object)) {
        return NULL;
    }
    sample = sq_py_array(sample_object, NPY_FLOAT32, 2, "sample");
    steps = sample ? sq_py_array(steps_object, NPY_FLOAT32, 3, "steps") : NULL;
    if (!steps || sq_py_check_dim(steps, 2, PyArray_DIM(steps, 1), "steps")) {
        goto done;
    }
    const npy_intp rows = PyArray_DIM(sample, 0), k = PyArray_DIM(sample, 1);
    const npy_intp count = PyArray_DIM(steps, 0), b = PyArray_DIM(steps, 1);
    if (k < 1 || b < 1 || b > SQ_DUQUANT_B_MAX || k % b) {
        PyErr_Format(PyExc_ValueError,
                     "steps: expected an order that divides k = %zd, at most %d, got %zd",
                     (Py_ssize_t)k, SQ_DUQUANT_B_MAX, (Py_ssize_t)b);
        goto done;
    }
    const npy_intp block_dims[3] = {k / b, b, b}, peak_dims[2] = {k / b, count + 1};
    blocks = sq_py_empty(3, block_dims, NPY_FLOAT32);
    peaks = blocks ? sq_py_empty(2, peak_dims, NPY_FLOAT32) : NULL;
    if (!peaks) {
        goto done;
    }
    sq_status status;
    SQ_BEGIN_NOGIL(PyArray_SIZE(sample) * (count + 1));
    status = sq_duquant_blocks(PyArray_DATA(sample), rows, k, PyArray_DATA(steps), count, b,
                               PyArray_DATA(blocks), PyArray_DATA(peaks));
    SQ_END_NOGIL;
    if (status != SQ_OK) {
        sq_py_raise(module, status, "duquant_blocks");
        goto done;
    }
    result = Py_BuildValue("OO", blocks, peaks);
done:
    Py_XDECREF(sample);
    Py_XDECREF(steps);
    Py_XDECREF(blocks);
    Py_XDECREF(peaks);
    return result;
}

PyDoc_STRVAR(
    zigzag_doc,
    "zigzag(maxima, b)\n--\n\n"
    "DuQuant's permutation [k] int32 from the channels' maxima [k]: the channels by descending\n"
    "maximum (the lower index first among equals) are dealt over the k / b blocks, from the first\n"
    "block to the last and back. y[i] = x[permutation[i]]. ValueError unless b divides k, and for\n"
    "NaN and Inf.");

static PyObject *
zigzag(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"maxima", "b", NULL};
    PyObject *maxima_object, *result = NULL;
    PyArrayObject *maxima, *permutation = NULL;
    Py_ssize_t b;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "On:zigzag", names, &maxima_object, &b)) {
        return NULL;
    }
    maxima = sq_py_array(maxima_object, NPY_FLOAT64, 1, "maxima");
    if (!maxima) {
        return NULL;
    }
    const npy_intp k = PyArray_DIM(maxima, 0);
    if (k < 1 || b < 1 || k % b) {
        PyErr_Format(PyExc_ValueError, "b: expected a divisor of k = %zd, got %zd", (Py_ssize_t)k,
                     b);
        goto done;
    }
    permutation = sq_py_empty(1, &k, NPY_INT32);
    if (!permutation) {
        goto done;
    }
    sq_status status;
    SQ_BEGIN_NOGIL(k);
    status = sq_zigzag(PyArray_DATA(maxima), k, b, PyArray_DATA(permutation));
    SQ_END_NOGIL;
    if (status != SQ_OK) {
        sq_py_raise(module, status, "maxima");
        goto done;
    }
    result = Py_NewRef(permutation);
done:
    Py_DECREF(maxima);
    Py_XDECREF(permutation);
    return result;
}

PyMethodDef sq_py_duquant_methods[] = {
    SQ_METHOD(random_orthogonal), SQ_METHOD(duquant_steps),
    SQ_METHOD(duquant_blocks),    SQ_METHOD(zigzag),
    {NULL, NULL, 0, NULL},
};
