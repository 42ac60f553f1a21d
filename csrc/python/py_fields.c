/* SPDX-License-Identifier: Apache-2.0 */
/* Typed entries of a dict. */
#include "python/py_fields.h"

#include <math.h>

/* Replaces a TypeError, or the OverflowError of a number too large for a double, by one that names
 * the entry; other exceptions stay. Returns -1. */
static int
name_type(const char *where, const char *key, const char *expected, PyObject *found)
{
    if (PyErr_ExceptionMatches(PyExc_TypeError)) {
        PyErr_Format(PyExc_TypeError, "%s: %s: expected %s, got %s", where, key, expected,
                     Py_TYPE(found)->tp_name);
    }
    else if (PyErr_ExceptionMatches(PyExc_OverflowError)) {
        PyErr_Format(PyExc_ValueError, "%s: %s: expected %s, got one too large", where, key,
                     expected);
    }
    return -1;
}

int
sq_py_integer(PyObject *o, const char *where, const char *key, int64_t *out)
{
    PyObject *integer = PyNumber_Index(o);
    int overflow = 0;
    if (!integer) {
        return name_type(where, key, "an integer", o);
    }
    *out = PyLong_AsLongLongAndOverflow(integer, &overflow);
    if (overflow) {
        PyErr_Format(PyExc_ValueError, "%s: %s: expected an integer of 64 bits, got %R", where, key,
                     integer);
    }
    Py_DECREF(integer);
    return overflow || (*out == -1 && PyErr_Occurred()) ? -1 : 0;
}

int
sq_py_number(PyObject *o, const char *where, const char *key, float *out)
{
    const double value = PyFloat_AsDouble(o);
    if (value == -1 && PyErr_Occurred()) {
        return name_type(where, key, "a number", o);
    }
    *out = (float)value;
    if (!isfinite(*out)) {
        PyErr_Format(PyExc_ValueError, "%s: %s: expected a finite number, got %R", where, key, o);
        return -1;
    }
    return 0;
}

static int
take_field(PyObject *value, const char *where, const struct sq_py_field *field)
{
    switch (field->kind) {
        case SQ_PY_INTEGER:
            return sq_py_integer(value, where, field->key, field->place);
        case SQ_PY_NUMBER:
            return sq_py_number(value, where, field->key, field->place);
        default:
            if (field->kind == SQ_PY_OBJECT || value != Py_None) {
                *(PyObject **)field->place = value;
            }
            return 0;
    }
}

/* 0 if every key of dict is a field's, otherwise -1 and ValueError. */
static int
check_keys(PyObject *dict, const char *where, const struct sq_py_field *fields, int count)
{
    PyObject *key, *value;
    Py_ssize_t position = 0;
    while (PyDict_Next(dict, &position, &key, &value)) {
        int known = 0;
        for (int i = 0; i < count && !known; i++) {
            known = PyUnicode_Check(key) && !PyUnicode_CompareWithASCIIString(key, fields[i].key);
        }
        if (!known) {
            PyErr_Format(PyExc_ValueError, "%s: unknown key %R", where, key);
            return -1;
        }
    }
    return 0;
}

PyObject *
sq_py_fields(PyObject *dict, const char *where, const struct sq_py_field *fields, int count)
{
    if (!PyDict_Check(dict)) {
        return PyErr_Format(PyExc_TypeError, "%s: expected a dict, got %s", where,
                            Py_TYPE(dict)->tp_name);
    }
    PyObject *copy = PyDict_Copy(dict);
    if (!copy || check_keys(copy, where, fields, count)) {
        goto fail;
    }
    for (int i = 0; i < count; i++) {
        PyObject *value = PyDict_GetItemString(copy, fields[i].key);
        if (!value && !fields[i].optional) {
            PyErr_Format(PyExc_ValueError, "%s: '%s' is missing", where, fields[i].key);
            goto fail;
        }
        if (value && take_field(value, where, &fields[i])) {
            goto fail;
        }
    }
    return copy;
fail:
    Py_XDECREF(copy);
    return NULL;
}
