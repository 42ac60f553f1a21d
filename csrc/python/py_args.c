/* SPDX-License-Identifier: Apache-2.0 */
/* Array converters and the mapping from sq_status to exceptions. */
#include "python/py_args.h"

#ifdef __APPLE__
#include <pthread.h>
#else
#include <sys/syscall.h>
#include <unistd.h>
#endif

/* Python runs signal handlers on the main thread alone: no other needs to take the GIL. */
static int
is_main_thread(void)
{
#ifdef __APPLE__
    return pthread_main_np();
#else
    return syscall(SYS_gettid) == getpid();
#endif
}

static int
wants_stop(void *context)
{
    struct sq_py_call *call = context;
    if (!is_main_thread()) {
        return 0;
    }
    PyEval_RestoreThread(call->saved);
    const int raised = PyErr_CheckSignals() != 0;
    call->saved = PyEval_SaveThread();
    return raised;
}

void
sq_py_call_begin(struct sq_py_call *call, int64_t work)
{
    call->saved = NULL;
    if (work >= SQ_GIL_THRESHOLD) {
        call->saved = PyEval_SaveThread();
        sq_watch_begin(&call->watch, wants_stop, call);
    }
}

int
sq_py_call_end(struct sq_py_call *call)
{
    if (!call->saved) {
        return 0;
    }
    const int stopped = sq_watch_end(&call->watch);
    PyEval_RestoreThread(call->saved);
    return stopped;
}

/* 0 if every element of the integer array a fits the signed integer type, or -1 and ValueError. */
static int
check_range(PyArrayObject *a, int type, const char *name)
{
    const int bits = type == NPY_INT8 ? 8 : type == NPY_INT16 ? 16 : type == NPY_INT32 ? 32 : 64;
    if (bits == 64 || PyArray_ITEMSIZE(a) * 8 < bits || PyArray_TYPE(a) == type ||
        PyArray_SIZE(a) == 0) {
        return 0;
    }
    int outside = 0;
    for (int upper = 0; upper < 2 && !outside; upper++) {
        PyObject *extreme =
            upper ? PyArray_Max(a, NPY_RAVEL_AXIS, NULL) : PyArray_Min(a, NPY_RAVEL_AXIS, NULL);
        PyObject *number = extreme ? PyNumber_Index(extreme) : NULL;
        const long long value = number ? PyLong_AsLongLongAndOverflow(number, &outside) : 0;
        Py_XDECREF(extreme);
        Py_XDECREF(number);
        if (PyErr_Occurred()) {
            return -1;
        }
        outside |= value < -(1LL << (bits - 1)) || value >= 1LL << (bits - 1);
    }
    if (outside) {
        PyErr_Format(PyExc_ValueError, "%s: expected integers of %d bits, found larger ones", name,
                     bits);
        return -1;
    }
    return 0;
}

int
sq_py_check_ndim(PyArrayObject *a, int ndim, const char *name)
{
    if (ndim < 0 || PyArray_NDIM(a) == ndim) {
        return 0;
    }
    PyErr_Format(PyExc_ValueError, "%s: expected %d dimensions, got %d", name, ndim,
                 PyArray_NDIM(a));
    return -1;
}

PyArrayObject *
sq_py_array(PyObject *o, int type, int ndim, const char *name)
{
    PyArrayObject *any = (PyArrayObject *)PyArray_FromAny(o, NULL, 0, 0, 0, NULL);
    if (!any) {
        return NULL;
    }
    const int found = PyArray_TYPE(any);
    const int wants_integer = PyTypeNum_ISINTEGER(type);
    /* ml_dtypes' bfloat16 and friends are user types: numpy's safe cast decides for them. */
    const int fits = wants_integer ? PyTypeNum_ISINTEGER(found)
                                   : PyTypeNum_ISFLOAT(found) || PyTypeNum_ISINTEGER(found) ||
                                         PyTypeNum_ISUSERDEF(found);
    PyArray_Descr *want = PyArray_DescrFromType(type);
    if (!fits) {
        PyErr_Format(PyExc_TypeError, "%s: expected an array of %R, got %R", name, want,
                     PyArray_DESCR(any));
        Py_DECREF(want);
        Py_DECREF(any);
        return NULL;
    }
    if (sq_py_check_ndim(any, ndim, name)) {
        Py_DECREF(want);
        Py_DECREF(any);
        return NULL;
    }
    if (wants_integer && check_range(any, type, name)) {
        Py_DECREF(want);
        Py_DECREF(any);
        return NULL;
    }
    /* steals want */
    PyArrayObject *array = (PyArrayObject *)PyArray_FromArray(
        any, want, NPY_ARRAY_CARRAY_RO | NPY_ARRAY_NOTSWAPPED | NPY_ARRAY_FORCECAST);
    Py_DECREF(any);
    return array;
}

PyArrayObject *
sq_py_bits_array(PyObject *o, int type, int ndim, const char *name)
{
    PyArrayObject *any = (PyArrayObject *)PyArray_FromAny(o, NULL, 0, 0, 0, NULL);
    PyArray_Descr *want = PyArray_DescrFromType(type);
    PyArrayObject *array = NULL;
    if (!any || !want) {
        goto done;
    }
    if (!PyTypeNum_ISINTEGER(PyArray_TYPE(any)) ||
        PyArray_ITEMSIZE(any) != PyDataType_ELSIZE(want)) {
        PyErr_Format(PyExc_TypeError, "%s: expected an array of %R, got %R", name, want,
                     PyArray_DESCR(any));
        goto done;
    }
    if (sq_py_check_ndim(any, ndim, name)) {
        goto done;
    }
    /* steals a reference; signed and unsigned of one width cast to each other bit by bit */
    array = (PyArrayObject *)PyArray_FromArray(
        any, (PyArray_Descr *)Py_NewRef(want),
        NPY_ARRAY_CARRAY_RO | NPY_ARRAY_NOTSWAPPED | NPY_ARRAY_FORCECAST);
done:
    Py_XDECREF(any);
    Py_XDECREF(want);
    return array;
}

PyArrayObject *
sq_py_copy_f64(PyObject *o, int ndim, const char *name)
{
    PyArrayObject *a = sq_py_array(o, NPY_FLOAT64, ndim, name);
    if (!a) {
        return NULL;
    }
    PyArrayObject *copy = (PyArrayObject *)PyArray_NewCopy(a, NPY_CORDER);
    Py_DECREF(a);
    return copy;
}

PyArrayObject *
sq_py_empty(int ndim, const npy_intp *dims, int type)
{
    return (PyArrayObject *)PyArray_EMPTY(ndim, dims, type, 0);
}

int
sq_py_check_dim(PyArrayObject *a, int axis, int64_t expected, const char *name)
{
    if (PyArray_DIM(a, axis) == expected) {
        return 0;
    }
    PyErr_Format(PyExc_ValueError, "%s: expected shape[%d] = %lld, got %lld", name, axis,
                 (long long)expected, (long long)PyArray_DIM(a, axis));
    return -1;
}

int
sq_py_check_weight_bits(int bits)
{
    if (sq_weight_bits_valid(bits)) {
        return 0;
    }
    PyErr_Format(PyExc_ValueError, "bits: expected 4, 5, 6 or 8, got %d", bits);
    return -1;
}

PyObject *
sq_py_raise(PyObject *module, sq_status status, const char *context)
{
    PyObject *type = PyExc_SystemError;
    switch (status) {
        case SQ_ERR_NULL:
        case SQ_ERR_SHAPE:
        case SQ_ERR_RANGE:
        case SQ_ERR_NONFINITE:
            type = PyExc_ValueError;
            break;
        case SQ_ERR_DTYPE:
            type = PyExc_TypeError;
            break;
        case SQ_ERR_NOMEM:
            type = PyExc_MemoryError;
            break;
        case SQ_ERR_FORMAT: {
            struct sq_module_state *state = PyModule_GetState(module);
            type = state->format_error;
            break;
        }
        case SQ_ERR_INTERRUPTED:
            if (PyErr_Occurred()) {
                return NULL;
            }
            type = PyExc_RuntimeError; /* in a child that a signal handler forked */
            break;
        case SQ_OK:
        case SQ_ERR_INTERNAL:
            break;
    }
    return PyErr_Format(type, "%s: %s", context, sq_status_text(status));
}
