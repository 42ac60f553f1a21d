/* SPDX-License-Identifier: Apache-2.0 */
/* Rotations as Python gives them: factors (a matrix, or a chain behind a Hadamard matrix), blocks.
 */
#ifndef SQ_PY_FACTOR_H
#define SQ_PY_FACTOR_H

#include "python/py_args.h"

/* A factor and what keeps its arrays alive; zero it before use. */
struct sq_py_factor {
    struct sq_factor factor;
    PyArrayObject *matrix, *pairs; /* owned */
    float *matrix_t, *cos_sin;     /* owned */
};

/* Which side of X it multiplies. The transpose that a right matrix needs is made here, once. */
enum sq_py_side { SQ_PY_LEFT, SQ_PY_RIGHT };

/* o, a matrix [n, n] or a tuple (order, hadamard, pairs [g, 2], angles [g]), into f. 0, or -1 with
 * an exception whose text starts with name. Clear f either way. */
int
sq_py_factor(PyObject *o, enum sq_py_side side, const char *name, struct sq_py_factor *f);

void
sq_py_factor_clear(struct sq_py_factor *f);

/* A block rotation and what keeps its arrays alive; zero it before use. */
struct sq_py_blocks {
    struct sq_block_rotation rotation;
    PyArrayObject *first, *permutation, *second; /* owned */
};

/* objects, first [k / b, b, b], permutation [k] and second like first, into b. 0, or -1 with an
 * exception whose text starts with prefix. Clear b either way. */
int
sq_py_blocks(PyObject *const objects[3], const char *prefix, struct sq_py_blocks *b);

void
sq_py_blocks_clear(struct sq_py_blocks *b);

/* A site's rotation and what keeps its arrays alive; zero it before use. */
struct sq_py_rotation {
    struct sq_rotation rotation;
    struct sq_py_factor factors[2]; /* left, right */
    struct sq_py_blocks blocks;
};

/* left and right, of which one or both may be None, or blocks (first, permutation, second) in
 * left's place, as the rotation of rows of k into r. 0, or -1 with an exception whose text starts
 * with name. Clear r either way. */
int
sq_py_rotation(PyObject *left, PyObject *right, int64_t k, const char *name,
               struct sq_py_rotation *r);

/* The same from the argument `rotation`: None, (left, right) or (first, permutation, second). */
int
sq_py_rotation_argument(PyObject *o, int64_t k, struct sq_py_rotation *r);

void
sq_py_rotation_clear(struct sq_py_rotation *r);

/* New reference to o as pairs [g][2] of int32, each two different indices below n. NULL with
 * TypeError or ValueError. */
PyArrayObject *
sq_py_pairs(PyObject *o, int64_t n, const char *name);

#endif
