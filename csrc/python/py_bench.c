/* SPDX-License-Identifier: Apache-2.0 */
/* Bindings of the benchmarks: peaks of the machine, the read loop, a linear's two parts timed. */
#include "python/py_args.h"

#include <stdlib.h>

#include "core/sq_internal.h"
#include "kernels/sq_peaks.h"

PyDoc_STRVAR(peak_steps_doc,
             "peak_steps()\n--\n\n"
             "Names of the multiply steps that measure_peak can run here, list of str.");

static PyObject *
peak_steps(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(args))
{
    PyObject *list = PyList_New(0);
    for (const struct sq_peak *p = sq_peaks(); list && p->name; p++) {
        if (!p->runs_here()) {
            continue;
        }
        PyObject *name = PyUnicode_FromString(p->name);
        if (!name || PyList_Append(list, name)) {
            Py_CLEAR(list);
        }
        Py_XDECREF(name);
    }
    return list;
}

PyDoc_STRVAR(measure_peak_doc,
             "measure_peak(step, seconds=0.05)\n--\n\n"
             "Operations per second of the thread's CPU time, float: a loop of the named multiply "
             "step (see peak_steps)\non registers alone, the best of runs that fill `seconds`. A "
             "multiply-add counts two. ValueError for\na step that is unknown or cannot run here "
             "and for seconds outside 0 .. 60.");

static PyObject *
measure_peak(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"step", "seconds", NULL};
    const char *step;
    double seconds = 0.05, rate = 0;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "s|d:measure_peak", names, &step, &seconds)) {
        return NULL;
    }
    const struct sq_peak *peak = sq_peak_find(step);
    if (!peak || !peak->runs_here()) {
        return PyErr_Format(PyExc_ValueError, "step: expected one of peak_steps(), got '%s'", step);
    }
    sq_status status;
    SQ_BEGIN_NOGIL(SQ_GIL_THRESHOLD);
    status = sq_peak_measure(peak, seconds, &rate);
    SQ_END_NOGIL;
    if (status != SQ_OK) {
        return sq_py_raise(module, status, "seconds");
    }
    return PyFloat_FromDouble(rate);
}

PyDoc_STRVAR(read_loop_doc,
             "read_loop(data, prefetch=0, streams=1)\n--\n\n"
             "Reads every byte of data, a uint8 array or the panels of a PackedWeight, once, on "
             "all threads of the\npool: in `streams` (1 to 16) interleaved runs, with prefetches "
             "`prefetch` bytes ahead (0: none). Returns the\nexclusive or of all 8-byte words "
             "(the last padded with zeros), so that nothing is left out. ValueError outside "
             "the\nranges. Time it: no kernel reads faster.");

static PyObject *
read_loop(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"data", "prefetch", "streams", NULL};
    PyObject *data_object, *result = NULL;
    PyArrayObject *data = NULL;
    long long prefetch = 0;
    int streams = 1;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|Li:read_loop", names, &data_object, &prefetch,
                                     &streams)) {
        return NULL;
    }
    const void *bytes;
    size_t count;
    const sq_packed_t *packed = sq_py_packed(module, data_object, "data");
    if (packed) {
        bytes = packed->panels;
        count = (size_t)(packed->n_panels * packed->panel_stride_bytes);
    }
    else {
        PyErr_Clear();
        data = sq_py_bits_array(data_object, NPY_UINT8, 1, "data");
        if (!data) {
            goto done;
        }
        bytes = PyArray_DATA(data);
        count = (size_t)PyArray_SIZE(data);
    }
    uint64_t sum = 0;
    sq_status status;
    SQ_BEGIN_NOGIL(count);
    status = sq_read_all(bytes, count, prefetch, streams, &sum);
    SQ_END_NOGIL;
    result = status == SQ_OK ? PyLong_FromUnsignedLongLong(sum)
                             : sq_py_raise(module, status, "prefetch or streams");
done:
    Py_XDECREF(data);
    return result;
}

PyDoc_STRVAR(measure_linear_doc,
             "measure_linear(x, weight, bits=4, clip=1.0, rotation=None, bias=None)\n--\n\n"
             "What linear does for x [..., k], timed in its two parts: (seconds of rotating and "
             "quantizing the activations,\nseconds of multiplying). Errors as linear's.");

static PyObject *
measure_linear(PyObject *module, PyObject *args, PyObject *kwargs)
{
    double seconds[2];
    PyObject *y = sq_py_linear(module, args, kwargs, "OO|ifOO:measure_linear", seconds);
    if (!y) {
        return NULL;
    }
    Py_DECREF(y);
    return Py_BuildValue("dd", seconds[0], seconds[1]);
}

PyMethodDef sq_py_bench_methods[] = {
    {"peak_steps", peak_steps, METH_NOARGS, peak_steps_doc},
    {"measure_peak", (PyCFunction)(void (*)(void))measure_peak, METH_VARARGS | METH_KEYWORDS,
     measure_peak_doc},
    {"read_loop", (PyCFunction)(void (*)(void))read_loop, METH_VARARGS | METH_KEYWORDS,
     read_loop_doc},
    {"measure_linear", (PyCFunction)(void (*)(void))measure_linear, METH_VARARGS | METH_KEYWORDS,
     measure_linear_doc},
    {NULL, NULL, 0, NULL},
};
