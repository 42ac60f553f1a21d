/* SPDX-License-Identifier: Apache-2.0 */
/* What binding files of the runtime stage share. */
#ifndef SQ_PY_DENSE_H
#define SQ_PY_DENSE_H

#include "python/py_args.h"

#include "core/sq_internal.h"

/* New reference to o as a C-contiguous, aligned, native array of float32, float16 or bfloat16,
 * without a copy where o is one already; ndim < 0: any. NULL with an exception naming it. */
PyArrayObject *
sq_py_dense(PyObject *o, int ndim, const char *name, sq_dtype *dtype);

/* New copy of an index [m], which nobody else can write to after the check that every entry is in
 * 0 .. limit - 1. NULL and an exception naming it if one is not. */
PyArrayObject *
sq_py_index(PyObject *o, int64_t limit, const char *name);

#endif
