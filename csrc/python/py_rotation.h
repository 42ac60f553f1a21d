/* SPDX-License-Identifier: Apache-2.0 */
/* The type Rotation: a site's rotation, parsed and proved once, and what other bindings need of it.
 */
#ifndef SQ_PY_ROTATION_H
#define SQ_PY_ROTATION_H

#include "python/py_args.h"

/* The rotation behind o, borrowed: it lives as long as o. An unrotated one where o is None. NULL
 * with TypeError if o is neither None nor a Rotation, or with ValueError if it is one of other than
 * k inputs; the text starts with name. */
const struct sq_rotation *
sq_py_rotation(PyObject *module, PyObject *o, int64_t k, const char *name);

/* New reference to o as pairs [g][2] of int32, each two different indices below n. NULL with
 * TypeError or ValueError. */
PyArrayObject *
sq_py_pairs(PyObject *o, int64_t n, const char *name);

#endif
