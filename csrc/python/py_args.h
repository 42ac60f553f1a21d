/* SPDX-License-Identifier: Apache-2.0 */
/* What every binding shares: array converters, status to exception, the GIL threshold, state.
 *
 * Every function of the module goes: parse, convert, check shapes, allocate outputs, drop the GIL,
 * one core call, retake it, map the status, one done: label that releases everything. */
#ifndef SQ_PY_ARGS_H
#define SQ_PY_ARGS_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#ifndef SQ_PY_MODULE
#define NO_IMPORT_ARRAY
#endif
#define PY_ARRAY_UNIQUE_SYMBOL singlequant_ARRAY_API
#include <numpy/arrayobject.h>

#include "singlequant.h"

struct sq_module_state {
    PyObject *format_error; /* owned, like the types */
    PyTypeObject *rotation_type, *packed_type, *layer_type, *cache_type;
};

/* One call of the core. */
struct sq_py_call {
    PyThreadState *saved; /* NULL: the GIL is held */
    struct sq_watch watch;
};

/* Work (in elements touched) from which a call releases the GIL. */
#define SQ_GIL_THRESHOLD 4096
/* Opens a block that SQ_END_NOGIL closes, so the pair is kept from the formatter. In between a call
 * on the main thread runs the handlers of signals that come; once one raises, the core is stopped.
 * SQ_END_NOGIL then sets `status` to SQ_ERR_INTERRUPTED, whatever the core returned, and the
 * exception is set. */
/* clang-format off */
#define SQ_BEGIN_NOGIL(work)                                                 \
    do {                                                                     \
        struct sq_py_call sq_call_;                                          \
        sq_py_call_begin(&sq_call_, (int64_t)(work));
#define SQ_END_NOGIL                         \
        if (sq_py_call_end(&sq_call_)) {     \
            status = SQ_ERR_INTERRUPTED;     \
        }                                    \
    }                                        \
    while (0)
/* clang-format on */

void
sq_py_call_begin(struct sq_py_call *call, int64_t work);

/* 1 if a signal handler raised. */
int
sq_py_call_end(struct sq_py_call *call);

/* A row of a method table: the function `name`, its text `name_doc`. */
/* clang-format off */
#define SQ_METHOD(name) \
    {#name, (PyCFunction)(void (*)(void))name, METH_VARARGS | METH_KEYWORDS, name##_doc}
/* clang-format on */

/* New reference to o as a C-contiguous, aligned, native array of the given type and number of
 * dimensions (ndim < 0: any); copies when it must. float32 and float64 accept any real number type;
 * integer types accept integers only. NULL and TypeError or ValueError that names the argument. */
PyArrayObject *
sq_py_array(PyObject *o, int type, int ndim, const char *name);

/* The same for arrays whose integers are bit patterns (codes, packed words): the element must be an
 * integer of type's width, signed or not; another width is a TypeError, as it could lose bits. */
PyArrayObject *
sq_py_bits_array(PyObject *o, int type, int ndim, const char *name);

/* New reference to a writable copy of o as float64, never o itself. */
PyArrayObject *
sq_py_copy_f64(PyObject *o, int ndim, const char *name);

/* New array; NULL with MemoryError. */
PyArrayObject *
sq_py_empty(int ndim, const npy_intp *dims, int type);

/* 0 if a has ndim dimensions (ndim < 0: any), otherwise -1 with ValueError. */
int
sq_py_check_ndim(PyArrayObject *a, int ndim, const char *name);

/* 0 if dimension axis of a is expected, otherwise -1 and a ValueError `name: expected shape[axis] =
 * expected, got found`. */
int
sq_py_check_dim(PyArrayObject *a, int axis, int64_t expected, const char *name);

/* 0 if bits is a width of weight codes, otherwise -1 with ValueError. */
int
sq_py_check_weight_bits(int bits);

/* Sets the exception of a status (not SQ_OK), its text prefixed with context; returns NULL. Of
 * SQ_ERR_INTERRUPTED it is set already: it is the signal handler's. */
PyObject *
sq_py_raise(PyObject *module, sq_status status, const char *context);

/* PyModule_AddType-style registration for the types of one binding file. 0 or -1. */
int
sq_py_add_rotation_type(PyObject *module);
int
sq_py_add_pack_types(PyObject *module);
int
sq_py_add_activations_type(PyObject *module);
int
sq_py_add_runtime_types(PyObject *module);

/* Each binding file's functions; {NULL}-terminated. */
extern PyMethodDef sq_py_transform_methods[];
extern PyMethodDef sq_py_solve_methods[];
extern PyMethodDef sq_py_rotation_methods[];
extern PyMethodDef sq_py_statistics_methods[];
extern PyMethodDef sq_py_alignment_methods[];
extern PyMethodDef sq_py_duquant_methods[];
extern PyMethodDef sq_py_quantize_methods[];
extern PyMethodDef sq_py_gptq_methods[];
extern PyMethodDef sq_py_decode_methods[];
extern PyMethodDef sq_py_pack_methods[];
extern PyMethodDef sq_py_runtime_methods[];
extern PyMethodDef sq_py_rows_methods[];
extern PyMethodDef sq_py_experts_methods[];
extern PyMethodDef sq_py_outliers_methods[];
extern PyMethodDef sq_py_bench_methods[];
extern PyMethodDef sq_py_kernels_methods[]; /* test hooks */
extern PyMethodDef sq_py_mapped_methods[];

/* linear(x, weight, bits=4, clip=1.0, rotation=None, bias=None): y, and in seconds, unless NULL,
 * what preparing the activations and multiplying took. format ends in the function's name. */
PyObject *
sq_py_linear(PyObject *module, PyObject *args, PyObject *kwargs, const char *format,
             double seconds[2]);

/* The PackedWeight behind o, borrowed, or NULL with TypeError naming the argument. */
const sq_packed_t *
sq_py_packed(PyObject *module, PyObject *o, const char *name);

#endif
