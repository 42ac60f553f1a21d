/* SPDX-License-Identifier: Apache-2.0 */
/* Typed entries of a dict. */
#ifndef SQ_PY_FIELDS_H
#define SQ_PY_FIELDS_H

#include "python/py_args.h"

/* o as an integer of 64 bits, or as a finite float. 0, or -1 with TypeError or ValueError that
 * starts with `where: key: expected`. */
int
sq_py_integer(PyObject *o, const char *where, const char *key, int64_t *out);
int
sq_py_number(PyObject *o, const char *where, const char *key, float *out);

enum sq_py_field_kind {
    SQ_PY_INTEGER, /* int64_t */
    SQ_PY_NUMBER,  /* float, finite */
    SQ_PY_OBJECT,  /* PyObject *, borrowed from the copy */
    SQ_PY_PART     /* the same, but None leaves its place as it is */
};

/* One entry: where it goes. A key that may be absent leaves its place as it is. */
struct sq_py_field {
    const char *key;
    enum sq_py_field_kind kind;
    int optional;
    void *place;
};

/* Reads the entries of dict; `where` names the dict in errors. Returns a copy of dict, which keeps
 * the objects alive (__index__ and __float__ may change dict itself); release it after the last use
 * of them. NULL with TypeError or ValueError for a missing or unknown key, or one of another type.
 */
PyObject *
sq_py_fields(PyObject *dict, const char *where, const struct sq_py_field *fields, int count);

#endif
