/* SPDX-License-Identifier: Apache-2.0 */
/* Parts of blocks, read from Python: what the parsers of a layer's blocks share. */
#ifndef SQ_PY_BLOCKS_H
#define SQ_PY_BLOCKS_H

#include "python/py_layer.h"

enum { SQ_PY_NAME_BYTES = 64 }; /* of an entry in an exception's text */

/* All functions below keep what they point to alive as long as self. `name` starts the text of an
 * exception. 0 or a pointer, or -1 or NULL with an exception. */

/* Keeps array (stolen); its data. */
void *
sq_py_keep(DecoderLayer *self, PyArrayObject *array);

/* o as float32 of `ndim` dimensions (any where ndim < 0). Borrowed, or NULL. */
PyArrayObject *
sq_py_take_array(DecoderLayer *self, PyObject *o, int ndim, const char *name);

/* A vector of float32, [n] or of any length where n < 0; its length in *found unless that is NULL.
 */
const float *
sq_py_take_vector(DecoderLayer *self, PyObject *o, int64_t n, const char *name, int64_t *found);

/* 0 if o is a tuple of `count`, otherwise -1 and TypeError that says `expected`. */
int
sq_py_check_tuple(PyObject *o, Py_ssize_t count, const char *name, const char *expected);

/* (site name, weight, bias or None). */
int
sq_py_take_linear(DecoderLayer *self, PyObject *module, PyObject *o, const char *name,
                  struct sq_linear *l);

/* (kind, eps, offset, weight, bias or None) of rows of n channels; NULL or None: no norm. With
 * heads > 0 the weight, and the bias with it, may also be [heads, n], a row for each, or
 * [heads * n]: one norm of all. */
int
sq_py_take_norm(DecoderLayer *self, PyObject *o, int64_t n, int64_t heads, const char *name,
                struct sq_norm *norm);

/* ---- blocks, from their dicts ----------------------------------------------------------- */

int
sq_py_take_attention(DecoderLayer *self, PyObject *module, PyObject *dict);

/* The MLP, or the experts where theirs is not None. */
int
sq_py_take_feed(DecoderLayer *self, PyObject *module, PyObject *mlp, PyObject *experts);

#endif
