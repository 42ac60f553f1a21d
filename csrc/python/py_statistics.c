/* SPDX-License-Identifier: Apache-2.0 */
/* Bindings of what calibration measures: streaming statistics, axis Gram matrices, columns. */
#include "python/py_args.h"
#include "python/py_dense.h"

#include <string.h>

/* A state under construction: new arrays, and the core's view of them. */
enum { N_STATISTICS = 3 };
static const char *const statistics_names[N_STATISTICS] = {"min", "max", "sum2"};
struct statistics_arg {
    PyArrayObject *arrays[N_STATISTICS]; /* owned */
    struct sq_statistics s;
};

static void
statistics_clear(struct statistics_arg *a)
{
    for (int i = 0; i < N_STATISTICS; i++) {
        Py_CLEAR(a->arrays[i]);
    }
}

static void
statistics_view(struct statistics_arg *a)
{
    a->s.min = PyArray_DATA(a->arrays[0]);
    a->s.max = PyArray_DATA(a->arrays[1]);
    a->s.sum2 = PyArray_DATA(a->arrays[2]);
}

/* Zeroed arrays for k inputs. -1 with MemoryError. */
static int
statistics_new(struct statistics_arg *a, npy_intp k)
{
    a->s.k = k;
    for (int i = 0; i < N_STATISTICS; i++) {
        a->arrays[i] = sq_py_empty(1, &k, NPY_FLOAT64);
        if (!a->arrays[i]) {
            return -1;
        }
    }
    statistics_view(a);
    return sq_statistics_reset(&a->s) == SQ_OK ? 0 : -1;
}

/* Copies a state tuple (count, min, max, sum2); k is min's length. */
static int
statistics_from(PyObject *tuple, const char *name, struct statistics_arg *a)
{
    char label[64];
    if (!PyTuple_Check(tuple) || PyTuple_GET_SIZE(tuple) != N_STATISTICS + 1) {
        PyErr_Format(PyExc_TypeError, "%s: expected a tuple of %d, as statistics_update returns",
                     name, N_STATISTICS + 1);
        return -1;
    }
    a->s.count = PyLong_AsLongLong(PyTuple_GET_ITEM(tuple, 0));
    if (a->s.count < 0) {
        if (!PyErr_Occurred()) {
            PyErr_Format(PyExc_ValueError, "%s.count: expected at least 0, got %lld", name,
                         (long long)a->s.count);
        }
        return -1;
    }
    for (int i = 0; i < N_STATISTICS; i++) {
        PyOS_snprintf(label, sizeof label, "%s.%s", name, statistics_names[i]);
        a->arrays[i] = sq_py_copy_f64(PyTuple_GET_ITEM(tuple, i + 1), 1, label);
        if (!a->arrays[i] ||
            sq_py_check_dim(a->arrays[i], 0, PyArray_DIM(a->arrays[0], 0), label)) {
            return -1;
        }
    }
    a->s.k = PyArray_DIM(a->arrays[0], 0);
    statistics_view(a);
    return 0;
}

static PyObject *
statistics_tuple(const struct statistics_arg *a)
{
    return Py_BuildValue("LOOO", (long long)a->s.count, a->arrays[0], a->arrays[1], a->arrays[2]);
}

PyDoc_STRVAR(
    column_moments_doc,
    "column_moments(weight)\n--\n\n"
    "(largest magnitude [k], sum of squares [k]), float64, of the columns of weight [n, k] "
    "(float32, float16\nor bfloat16). ValueError for NaN or Inf.");

static PyObject *
column_moments(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"weight", NULL};
    PyObject *object, *result = NULL;
    PyArrayObject *w = NULL, *max_abs = NULL, *sum2 = NULL;
    sq_dtype dtype;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O:column_moments", names, &object)) {
        return NULL;
    }
    w = sq_py_dense(object, 2, "weight", &dtype);
    if (!w) {
        return NULL;
    }
    npy_intp k = PyArray_DIM(w, 1);
    if (k < 1) {
        PyErr_SetString(PyExc_ValueError, "weight: expected at least 1 column, got 0");
        goto done;
    }
    max_abs = sq_py_empty(1, &k, NPY_FLOAT64);
    sum2 = sq_py_empty(1, &k, NPY_FLOAT64);
    if (!max_abs || !sum2) {
        goto done;
    }
    sq_status status;
    SQ_BEGIN_NOGIL(PyArray_SIZE(w));
    status = sq_column_moments(dtype, PyArray_DATA(w), PyArray_DIM(w, 0), k, PyArray_DATA(max_abs),
                               PyArray_DATA(sum2));
    SQ_END_NOGIL;
    if (status != SQ_OK) {
        sq_py_raise(module, status, "weight");
        goto done;
    }
    result = PyTuple_Pack(2, (PyObject *)max_abs, (PyObject *)sum2);
done:
    Py_XDECREF(w);
    Py_XDECREF(max_abs);
    Py_XDECREF(sum2);
    return result;
}

PyDoc_STRVAR(
    block_peaks_doc,
    "block_peaks(weight, scale, block)\n--\n\n"
    "Sums [k] float64 over the rows of weight [n, k], its columns multiplied by scale [k]: of "
    "each\n"
    "block of inputs, the square of the row's largest magnitude, by the input that has it.\n"
    "ValueError for NaN or Inf, and where block does not divide k.");

static PyObject *
block_peaks(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"weight", "scale", "block", NULL};
    PyObject *weight, *factors;
    PyArrayObject *w = NULL, *scale = NULL, *peaks = NULL;
    long long block;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOL:block_peaks", names, &weight, &factors,
                                     &block)) {
        return NULL;
    }
    w = sq_py_array(weight, NPY_FLOAT32, 2, "weight");
    scale = w ? sq_py_array(factors, NPY_FLOAT32, 1, "scale") : NULL;
    if (!scale || sq_py_check_dim(scale, 0, PyArray_DIM(w, 1), "scale")) {
        goto done;
    }
    npy_intp k = PyArray_DIM(w, 1);
    if (block < 1 || k < 1 || k % block) {
        PyErr_Format(PyExc_ValueError, "block: expected a divisor of k = %lld, got %lld",
                     (long long)k, block);
        goto done;
    }
    peaks = sq_py_empty(1, &k, NPY_FLOAT64);
    if (!peaks) {
        goto done;
    }
    sq_status status;
    SQ_BEGIN_NOGIL(PyArray_SIZE(w));
    status = sq_block_peaks(PyArray_DATA(w), PyArray_DIM(w, 0), k, PyArray_DATA(scale), block,
                            PyArray_DATA(peaks));
    SQ_END_NOGIL;
    if (status != SQ_OK) {
        sq_py_raise(module, status, "weight or scale");
        Py_CLEAR(peaks);
    }
done:
    Py_XDECREF(w);
    Py_XDECREF(scale);
    return (PyObject *)peaks;
}

PyDoc_STRVAR(
    axis_gram_doc,
    "axis_gram(x, k1, k2)\n--\n\n"
    "The Gram matrix [k1, k1] float64 of the first axis: the sum over the rows of x [m, k1 * k2]\n"
    "of X X^T, X the row as [k1, k2]. Each entry is one chain over rows and k2, whatever the\n"
    "number of threads. ValueError for NaN or Inf.");

/* 0 if an axis of so many inputs can be squared without overflow, or -1 with ValueError. */
static int
check_axis(long long n, const char *name)
{
    if (n >= 1 && n <= 1 << 30) {
        return 0;
    }
    PyErr_Format(PyExc_ValueError, "%s: expected 1 to %d, got %lld", name, 1 << 30, n);
    return -1;
}

static PyObject *
axis_gram(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"x", "k1", "k2", NULL};
    PyObject *x_object, *result = NULL;
    PyArrayObject *gram = NULL;
    long long k1, k2;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OLL:axis_gram", names, &x_object, &k1, &k2) ||
        check_axis(k1, "k1") || check_axis(k2, "k2")) {
        return NULL;
    }
    PyArrayObject *x = sq_py_array(x_object, NPY_FLOAT32, 2, "x");
    if (!x || sq_py_check_dim(x, 1, k1 * k2, "x") ||
        !(gram = sq_py_empty(2, (npy_intp[]){k1, k1}, NPY_FLOAT64))) {
        goto done;
    }
    sq_status status;
    SQ_BEGIN_NOGIL(PyArray_SIZE(x));
    status = sq_axis_gram(PyArray_DATA(x), PyArray_DIM(x, 0), k1, k2, PyArray_DATA(gram));
    SQ_END_NOGIL;
    if (status != SQ_OK) {
        sq_py_raise(module, status, "x");
        goto done;
    }
    result = Py_NewRef(gram);
done:
    Py_XDECREF(x);
    Py_XDECREF(gram);
    return result;
}

PyDoc_STRVAR(
    statistics_update_doc,
    "statistics_update(x, state=None)\n--\n\n"
    "A new state with the tokens x [m, k] added: (count, min [k], max [k], sum of squares [k]),\n"
    "float64. State None is the empty one. ValueError for NaN or Inf. Sums run over tokens in\n"
    "order: cutting x into several updates changes no bit.");

static PyObject *
statistics_update(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"x", "state", NULL};
    PyObject *x_object, *state = Py_None, *result = NULL;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|O:statistics_update", names, &x_object,
                                     &state)) {
        return NULL;
    }
    struct statistics_arg a = {.s.count = 0};
    PyArrayObject *x = sq_py_array(x_object, NPY_FLOAT32, 2, "x");
    if (!x) {
        return NULL;
    }
    if (PyArray_DIM(x, 1) < 1) {
        PyErr_SetString(PyExc_ValueError, "x: expected k >= 1, got 0");
        goto done;
    }
    if (state == Py_None
            ? statistics_new(&a, PyArray_DIM(x, 1))
            : statistics_from(state, "state", &a) || sq_py_check_dim(x, 1, a.s.k, "x")) {
        goto done;
    }
    sq_status status;
    SQ_BEGIN_NOGIL(PyArray_SIZE(x));
    status = sq_statistics_update(&a.s, PyArray_DATA(x), PyArray_DIM(x, 0));
    SQ_END_NOGIL;
    if (status != SQ_OK) {
        sq_py_raise(module, status, "x");
        goto done;
    }
    result = statistics_tuple(&a);
done:
    Py_DECREF(x);
    statistics_clear(&a);
    return result;
}

PyDoc_STRVAR(statistics_merge_doc,
             "statistics_merge(a, b)\n--\n\n"
             "The state of both inputs together, as a new state. ValueError if k differs.");

static PyObject *
statistics_merge(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"a", "b", NULL};
    PyObject *a_object, *b_object, *result = NULL;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OO:statistics_merge", names, &a_object,
                                     &b_object)) {
        return NULL;
    }
    struct statistics_arg a = {.s.count = 0}, b = {.s.count = 0};
    if (statistics_from(a_object, "a", &a) || statistics_from(b_object, "b", &b)) {
        goto done;
    }
    if (a.s.k != b.s.k) {
        PyErr_Format(PyExc_ValueError, "b: expected k = %lld, got %lld", (long long)a.s.k,
                     (long long)b.s.k);
        goto done;
    }
    sq_status status;
    SQ_BEGIN_NOGIL(a.s.k);
    status = sq_statistics_merge(&a.s, &b.s);
    SQ_END_NOGIL;
    if (status != SQ_OK) {
        sq_py_raise(module, status, "statistics_merge");
        goto done;
    }
    result = statistics_tuple(&a);
done:
    statistics_clear(&a);
    statistics_clear(&b);
    return result;
}

PyMethodDef sq_py_statistics_methods[] = {
    SQ_METHOD(axis_gram),         SQ_METHOD(block_peaks),      SQ_METHOD(column_moments),
    SQ_METHOD(statistics_update), SQ_METHOD(statistics_merge), {NULL, NULL, 0, NULL},
};
