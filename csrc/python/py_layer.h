/* SPDX-License-Identifier: Apache-2.0 */
/* The DecoderLayer type as its parsers (py_blocks.c, py_experts.c) and its methods (py_layer.c) use
 * it. */
#ifndef SQ_PY_LAYER_H
#define SQ_PY_LAYER_H

#include "python/py_args.h"

typedef struct {
    PyObject_HEAD struct sq_layer layer;
    PyObject *owned;       /* list of the arrays and weights that layer points into */
    PyObject *names;       /* tuple of the sites' names, in their order */
    struct sq_site *sites; /* owned, what layer.sites is */
    struct sq_mlp *mlps;   /* owned, of the experts and the shared one, or NULL */
    int linears, packed;   /* how many there are, for repr */
} DecoderLayer;

/* What the constructor gets. Borrowed. */
struct sq_py_blocks_of_layer {
    PyObject *sites, *attention, *mlp, *norms, *experts;
};

/* Fills self->layer, whose hidden, parallel and residual_scale are there, and seals it. 0, or -1
 * with an exception that names the entry, the expected and the found. */
int
sq_py_parse_layer(DecoderLayer *self, PyObject *module, const struct sq_py_blocks_of_layer *blocks);

#endif
