/* SPDX-License-Identifier: Apache-2.0 */
/* The type Rotation: parses a site's rotation, proves it, and keeps it unchanged; and rotate(). */
#include "python/py_rotation.h"

#include <math.h>
#include <string.h>

#include "core/sq_internal.h"

/* Largest |M M^T - I| of a matrix that passes for orthogonal. */
#define ORTHOGONAL_WITHIN 1e-4f
/* Largest quotient of two pivots of a matrix that passes for invertible: float32 keeps some digits
 * of what its inverse undoes. */
#define PIVOT_RATIO_MAX 1e6

/* Which factor of X it is; the right one needs its transpose too. */
enum { LEFT, RIGHT };
static const char *const side_names[2] = {"left", "right"};

typedef struct {
    PyObject_HEAD struct sq_rotation rotation;
    const double *angles[2]; /* of the factors that are chains, NULL otherwise */
    void *memory[8];         /* owned: what the rotation and the angles point to */
    int n_memory;
} Rotation;

/* Memory that lives as long as self, with a copy of data unless that is NULL. NULL with
 * MemoryError. */
static void *
keep(Rotation *self, const void *data, size_t bytes)
{
    void *memory = sq_alloc(bytes);
    if (!memory) {
        PyErr_NoMemory();
        return NULL;
    }
    if (data) {
        memcpy(memory, data, bytes);
    }
    self->memory[self->n_memory++] = memory;
    return memory;
}

/* ---- proofs ----------------------------------------------------------------------------- */

PyArrayObject *
sq_py_pairs(PyObject *o, int64_t n, const char *name)
{
    PyArrayObject *given = sq_py_array(o, NPY_INT32, 2, name);
    /* A copy: nobody else can write to it after the check. */
    PyArrayObject *pairs = given ? (PyArrayObject *)PyArray_NewCopy(given, NPY_CORDER) : NULL;
    Py_XDECREF(given);
    if (!pairs || sq_py_check_dim(pairs, 1, 2, name)) {
        Py_XDECREF(pairs);
        return NULL;
    }
    const int32_t *p = PyArray_DATA(pairs);
    for (npy_intp t = 0; t < PyArray_DIM(pairs, 0); t++) {
        const int32_t i = p[2 * t], j = p[2 * t + 1];
        if (i < 0 || j < 0 || i >= n || j >= n || i == j) {
            PyErr_Format(PyExc_ValueError,
                         "%s: expected two different indices below %lld, got (%d, %d) at step %zd",
                         name, (long long)n, (int)i, (int)j, (Py_ssize_t)t);
            Py_DECREF(pairs);
            return NULL;
        }
    }
    return pairs;
}

/* 0 if matrices [count][n][n] are orthogonal, or -1 with ValueError. */
static int
check_orthogonal(const float *matrices, int64_t count, int64_t n, const char *name)
{
    sq_status status;
    float error;
    SQ_BEGIN_NOGIL(count * n * n);
    status = sq_orthogonality_error(matrices, count, n, &error);
    SQ_END_NOGIL;
    if (status == SQ_ERR_INTERRUPTED) {
        return -1;
    }
    if (status == SQ_ERR_NOMEM) {
        PyErr_NoMemory();
        return -1;
    }
    if (status != SQ_OK || !(error < ORTHOGONAL_WITHIN)) { /* NaN as well */
        char found[32];
        PyOS_snprintf(found, sizeof found, "%.3g", (double)error);
        PyErr_Format(PyExc_ValueError, "%s: expected an orthogonal matrix, got |M M^T - I| = %s",
                     name, status == SQ_OK ? found : sq_status_text(status));
        return -1;
    }
    return 0;
}

/* 0 if matrices [count][n][n] are finite and far from singular, or -1 with ValueError. */
static int
check_invertible(const float *matrices, int64_t count, int64_t n, const char *name)
{
    sq_status status;
    double ratio;
    SQ_BEGIN_NOGIL(count * n * n);
    status = sq_pivot_ratio(matrices, count, n, &ratio);
    SQ_END_NOGIL;
    if (status == SQ_ERR_INTERRUPTED) {
        return -1;
    }
    if (status == SQ_ERR_NOMEM) {
        PyErr_NoMemory();
        return -1;
    }
    if (status != SQ_OK || !(ratio <= PIVOT_RATIO_MAX)) { /* NaN as well */
        char found[32];
        PyOS_snprintf(found, sizeof found, "%.3g", ratio);
        PyErr_Format(PyExc_ValueError,
                     "%s: expected invertible matrices (a pivot ratio of at most 1e6), got %s",
                     name, status == SQ_OK ? found : sq_status_text(status));
        return -1;
    }
    return 0;
}

/* 0 if p [k] holds each of 0 .. k - 1 once; -1 with an exception otherwise. */
static int
check_permutation(const int32_t *p, int64_t k, const char *name)
{
    char *seen = PyMem_Calloc((size_t)k, 1);
    int64_t bad = -1;
    if (!seen) {
        PyErr_NoMemory();
        return -1;
    }
    for (int64_t i = 0; i < k && bad < 0; i++) {
        if (p[i] < 0 || p[i] >= k || seen[p[i]]) {
            bad = i;
            break;
        }
        seen[p[i]] = 1;
    }
    PyMem_Free(seen);
    if (bad >= 0) {
        PyErr_Format(PyExc_ValueError,
                     "%s: expected each of 0 to %lld once, got %d out of range or again at %lld",
                     name, (long long)k - 1, (int)p[bad], (long long)bad);
        return -1;
    }
    return 0;
}

/* ---- Kronecker factors ------------------------------------------------------------------ */

/* o, a matrix [n, n], as the factor of a side. 0, or -1 with an exception. */
static int
take_matrix(Rotation *self, PyObject *o, int side, struct sq_factor *f)
{
    const char *name = side_names[side];
    PyArrayObject *a = sq_py_array(o, NPY_FLOAT32, 2, name);
    if (!a) {
        return -1;
    }
    const npy_intp n = PyArray_DIM(a, 0);
    int result = -1;
    if (n < 1 || PyArray_DIM(a, 1) != n) {
        PyErr_Format(PyExc_ValueError, "%s: expected a square matrix, got (%zd, %zd)", name,
                     (Py_ssize_t)n, (Py_ssize_t)PyArray_DIM(a, 1));
        goto done;
    }
    const size_t bytes = (size_t)PyArray_NBYTES(a);
    f->order = n;
    f->matrix = keep(self, PyArray_DATA(a), bytes);
    if (!f->matrix || check_orthogonal(f->matrix, 1, n, name)) {
        goto done;
    }
    if (side == RIGHT) {
        float *transpose = keep(self, NULL, bytes);
        if (!transpose) {
            goto done;
        }
        sq_transpose(f->matrix, n, transpose);
        f->matrix_t = transpose;
    }
    result = 0;
done:
    Py_DECREF(a);
    return result;
}

/* cos and sin of the angles, in float32. -1 with an exception. */
static int
take_angles(Rotation *self, PyArrayObject *angles, int side, struct sq_factor *f)
{
    const int64_t steps = PyArray_DIM(angles, 0);
    const double *theta = keep(self, PyArray_DATA(angles), (size_t)PyArray_NBYTES(angles));
    float *cos_sin = theta ? keep(self, NULL, (size_t)steps * 2 * sizeof *cos_sin) : NULL;
    if (!cos_sin) {
        return -1;
    }
    for (int64_t t = 0; t < steps; t++) {
        if (!isfinite(theta[t])) {
            PyErr_Format(PyExc_ValueError,
                         "%s: expected finite angles, got NaN or Inf at step %lld",
                         side_names[side], (long long)t);
            return -1;
        }
        cos_sin[2 * t] = (float)cos(theta[t]);
        cos_sin[2 * t + 1] = (float)sin(theta[t]);
    }
    self->angles[side] = theta;
    f->steps = steps;
    f->cos_sin = cos_sin;
    return 0;
}

/* The tuple (order, hadamard, pairs, angles) as the factor of a side. 0, or -1. */
static int
take_chain(Rotation *self, PyObject *tuple, int side, struct sq_factor *f)
{
    const char *name = side_names[side];
    long long order;
    PyObject *pairs_object, *angles_object;
    if (PyTuple_GET_SIZE(tuple) != 4) {
        PyErr_Format(PyExc_ValueError,
                     "%s: expected (order, hadamard, pairs, angles), got a tuple of %zd", name,
                     PyTuple_GET_SIZE(tuple));
        return -1;
    }
    if (!PyArg_ParseTuple(tuple, "LpOO", &order, &f->hadamard, &pairs_object, &angles_object)) {
        return -1;
    }
    if (order < 1 || order > INT32_MAX) {
        PyErr_Format(PyExc_ValueError, "%s: expected an order of 1 to %d, got %lld", name,
                     INT32_MAX, order);
        return -1;
    }
    int result = -1;
    PyArrayObject *pairs = sq_py_pairs(pairs_object, order, name);
    PyArrayObject *angles = pairs ? sq_py_array(angles_object, NPY_FLOAT64, 1, name) : NULL;
    if (!angles) {
        goto done;
    }
    if (PyArray_DIM(angles, 0) != PyArray_DIM(pairs, 0)) {
        PyErr_Format(PyExc_ValueError, "%s: expected as many angles as pairs = %zd, got %zd", name,
                     (Py_ssize_t)PyArray_DIM(pairs, 0), (Py_ssize_t)PyArray_DIM(angles, 0));
        goto done;
    }
    f->order = order;
    f->pairs = keep(self, PyArray_DATA(pairs), (size_t)PyArray_NBYTES(pairs));
    result = f->pairs ? take_angles(self, angles, side, f) : -1;
done:
    Py_XDECREF(pairs);
    Py_XDECREF(angles);
    return result;
}

/* The factors, of which one that is None leaves its axis as it is. 0, or -1 with an exception. */
static int
take_factors(Rotation *self, PyObject *const objects[2])
{
    struct sq_rotation *r = &self->rotation;
    struct sq_factor *const factors[2] = {&r->left, &r->right};
    r->kind = SQ_KRONECKER;
    for (int i = 0; i < 2; i++) {
        if (objects[i] == Py_None) {
            continue;
        }
        if (PyTuple_Check(objects[i]) ? take_chain(self, objects[i], i, factors[i])
                                      : take_matrix(self, objects[i], i, factors[i])) {
            return -1;
        }
        if (r->k % factors[i]->order) {
            PyErr_Format(PyExc_ValueError, "%s: expected an order that divides k = %lld, got %lld",
                         side_names[i], (long long)r->k, (long long)factors[i]->order);
            return -1;
        }
    }
    if (objects[LEFT] == Py_None) { /* an empty chain */
        r->left.order = objects[RIGHT] == Py_None ? 1 : r->k / r->right.order;
    }
    if (objects[RIGHT] == Py_None) {
        r->right.order = r->k / r->left.order;
    }
    if (r->left.order != r->k / r->right.order) {
        PyErr_Format(PyExc_ValueError,
                     "left, right: expected orders k1 * k2 = k = %lld, got %lld * %lld",
                     (long long)r->k, (long long)r->left.order, (long long)r->right.order);
        return -1;
    }
    return 0;
}

/* ---- blocks ----------------------------------------------------------------------------- */

typedef int (*check_fn)(const float *matrices, int64_t count, int64_t n, const char *name);

/* Square blocks [count][b][b] of o that pass the check, both sizes at least 1, b at most
 * SQ_DUQUANT_B_MAX: a copy that self keeps, the sizes to shape. NULL with an exception. */
static const float *
take_blocks(Rotation *self, PyObject *o, const char *name, check_fn check, npy_intp shape[2])
{
    PyArrayObject *a = sq_py_array(o, NPY_FLOAT32, 3, name);
    const float *blocks = NULL;
    if (!a) {
        return NULL;
    }
    const npy_intp count = PyArray_DIM(a, 0), b = PyArray_DIM(a, 1);
    if (count < 1 || b < 1 || b > SQ_DUQUANT_B_MAX || PyArray_DIM(a, 2) != b) {
        PyErr_Format(PyExc_ValueError,
                     "%s: expected square blocks (k / b, b, b), b <= %d, got %zd x %zd x %zd", name,
                     SQ_DUQUANT_B_MAX, (Py_ssize_t)count, (Py_ssize_t)b,
                     (Py_ssize_t)PyArray_DIM(a, 2));
        goto done;
    }
    blocks = keep(self, PyArray_DATA(a), (size_t)PyArray_NBYTES(a));
    if (blocks && check(blocks, count, b, name)) {
        blocks = NULL;
    }
    shape[0] = count;
    shape[1] = b;
done:
    Py_DECREF(a);
    return blocks;
}

/* first, permutation and second into self. 0, or -1 with an exception. */
static int
take_parts(Rotation *self, PyObject *first, PyObject *permutation, PyObject *second)
{
    struct sq_rotation *r = &self->rotation;
    npy_intp shape[2], other[2];
    r->kind = SQ_BLOCKS;
    if (!(r->blocks.first = take_blocks(self, first, "first", check_orthogonal, shape)) ||
        !(r->blocks.second = take_blocks(self, second, "second", check_orthogonal, other))) {
        return -1;
    }
    if (other[0] != shape[0] || other[1] != shape[1]) {
        PyErr_Format(PyExc_ValueError,
                     "second: expected blocks (%zd, %zd, %zd) as first, got "
                     "(%zd, %zd, %zd)",
                     (Py_ssize_t)shape[0], (Py_ssize_t)shape[1], (Py_ssize_t)shape[1],
                     (Py_ssize_t)other[0], (Py_ssize_t)other[1], (Py_ssize_t)other[1]);
        return -1;
    }
    r->k = shape[0] * shape[1];
    r->blocks.b = shape[1];
    PyArrayObject *p = sq_py_array(permutation, NPY_INT32, 1, "permutation");
    if (!p) {
        return -1;
    }
    int result = -1;
    if (sq_py_check_dim(p, 0, r->k, "permutation") == 0 &&
        check_permutation(PyArray_DATA(p), r->k, "permutation") == 0) {
        r->blocks.permutation = keep(self, PyArray_DATA(p), (size_t)PyArray_NBYTES(p));
        result = r->blocks.permutation ? 0 : -1;
    }
    Py_DECREF(p);
    return result;
}

/* The invertible blocks in front of the factors, which self has. 0, or -1 with an exception. */
static int
take_align(Rotation *self, PyObject *align)
{
    struct sq_rotation *r = &self->rotation;
    npy_intp shape[2];
    r->kind = SQ_ALIGNED;
    if (!(r->blocks.first = take_blocks(self, align, "align", check_invertible, shape))) {
        return -1;
    }
    r->blocks.b = shape[1];
    if (shape[0] != r->k / shape[1] || r->k % shape[1]) {
        PyErr_Format(PyExc_ValueError, "align: expected blocks of k = %lld channels, got %zd x %zd",
                     (long long)r->k, (Py_ssize_t)shape[0], (Py_ssize_t)shape[1]);
        return -1;
    }
    return 0;
}

/* ---- the type --------------------------------------------------------------------------- */

PyDoc_STRVAR(
    rotation_doc,
    "Rotation(k, left=None, right=None, align=None)\n--\n\n"
    "The rotation of a site's inputs, proved once and never changed.\n\n"
    "A row x [k], reshaped to X [k1, k2], becomes L X R^T. A factor is an orthogonal float32\n"
    "matrix [n, n], a tuple (order, hadamard, pairs [g, 2], angles [g] in radians) that stands\n"
    "for v -> chain(H v), or None, which leaves its axis as it is. align [k / b, b, b] float32\n"
    "are invertible blocks that multiply the row before. Rotation.blocks makes the other kind.\n"
    "The arrays are copied. ValueError names the part, what was expected and what\n"
    "was found: shapes, indices, angles, |M M^T - I| of 1e-4 or more. May be shared between\n"
    "threads.");

static PyObject *
rotation_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"k", "left", "right", "align", NULL};
    PyObject *factors[2] = {Py_None, Py_None}, *align = Py_None;
    long long k;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "L|OOO:Rotation", names, &k, &factors[LEFT],
                                     &factors[RIGHT], &align)) {
        return NULL;
    }
    if (k < 1 || k > INT32_MAX) {
        return PyErr_Format(PyExc_ValueError, "k: expected 1 to %d, got %lld", INT32_MAX, k);
    }
    Rotation *self = (Rotation *)type->tp_alloc(type, 0); /* zeroed */
    if (self) {
        self->rotation.k = k;
        if (take_factors(self, factors) || (align != Py_None && take_align(self, align))) {
            Py_CLEAR(self);
        }
    }
    return (PyObject *)self;
}

PyDoc_STRVAR(
    rotation_blocks_doc,
    "blocks($type, first, permutation, second)\n--\n\n"
    "The Rotation that multiplies a row x [k] by blockdiag(first), permutes it (place i takes\n"
    "channel permutation[i]) and multiplies it by blockdiag(second). first and second:\n"
    "[k / b, b, b] float32, orthogonal blocks; permutation [k] int32. ValueError as for\n"
    "Rotation.");

static PyObject *
rotation_blocks(PyObject *type_object, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"first", "permutation", "second", NULL};
    PyTypeObject *type = (PyTypeObject *)type_object;
    PyObject *first, *permutation, *second;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOO:blocks", names, &first, &permutation,
                                     &second)) {
        return NULL;
    }
    Rotation *self = (Rotation *)type->tp_alloc(type, 0);
    if (self && take_parts(self, first, permutation, second)) {
        Py_CLEAR(self);
    }
    return (PyObject *)self;
}

static void
rotation_dealloc(PyObject *object)
{
    Rotation *self = (Rotation *)object;
    PyTypeObject *type = Py_TYPE(object);
    for (int i = 0; i < self->n_memory; i++) {
        free(self->memory[i]);
    }
    type->tp_free(object);
    Py_DECREF(type);
}

static void
rotation_sizes(const struct sq_rotation *r, long long sizes[2])
{
    const int is_blocks = r->kind == SQ_BLOCKS;
    sizes[0] = is_blocks ? r->k / r->blocks.b : r->left.order;
    sizes[1] = is_blocks ? r->blocks.b : r->right.order;
}

static const char *
kind_name(const struct sq_rotation *r)
{
    return r->kind == SQ_BLOCKS ? "blocks" : r->kind == SQ_ALIGNED ? "aligned" : "kronecker";
}

static PyObject *
rotation_repr(PyObject *object)
{
    const struct sq_rotation *r = &((Rotation *)object)->rotation;
    long long sizes[2];
    rotation_sizes(r, sizes);
    return PyUnicode_FromFormat("Rotation(%s, %lld x %lld)", kind_name(r), sizes[0], sizes[1]);
}

static PyObject *
rotation_get_k(PyObject *object, void *Py_UNUSED(closure))
{
    return PyLong_FromLongLong(((Rotation *)object)->rotation.k);
}

static PyObject *
rotation_get_kind(PyObject *object, void *Py_UNUSED(closure))
{
    return PyUnicode_FromString(kind_name(&((Rotation *)object)->rotation));
}

static PyObject *
rotation_get_sizes(PyObject *object, void *Py_UNUSED(closure))
{
    long long sizes[2];
    rotation_sizes(&((Rotation *)object)->rotation, sizes);
    return Py_BuildValue("LL", sizes[0], sizes[1]);
}

/* A view of data that keeps self alive. Nobody can make it writable: it does not own its data, and
 * self exports no buffer. */
static PyObject *
view(Rotation *self, int ndim, const npy_intp *dims, int type, const void *data)
{
    PyObject *array = PyArray_New(&PyArray_Type, ndim, dims, type, NULL, (void *)(uintptr_t)data, 0,
                                  NPY_ARRAY_CARRAY_RO, NULL);
    if (array && PyArray_SetBaseObject((PyArrayObject *)array, Py_NewRef(self))) {
        Py_CLEAR(array);
    }
    return array;
}

/* The factor as the constructor took it. New reference. */
static PyObject *
factor_part(Rotation *self, int side)
{
    const struct sq_factor *f = side == LEFT ? &self->rotation.left : &self->rotation.right;
    if (f->matrix) {
        return view(self, 2, (npy_intp[]){f->order, f->order}, NPY_FLOAT32, f->matrix);
    }
    if (!self->angles[side]) {
        Py_RETURN_NONE;
    }
    PyObject *pairs = view(self, 2, (npy_intp[]){f->steps, 2}, NPY_INT32, f->pairs);
    PyObject *angles = view(self, 1, (npy_intp[]){f->steps}, NPY_FLOAT64, self->angles[side]);
    PyObject *hadamard = PyBool_FromLong(f->hadamard);
    /* N takes the references over; with a NULL among them it raises no other exception */
    return Py_BuildValue("LNNN", (long long)f->order, hadamard, pairs, angles);
}

static PyObject *
rotation_get_parts(PyObject *object, void *Py_UNUSED(closure))
{
    Rotation *self = (Rotation *)object;
    const struct sq_rotation *r = &self->rotation;
    if (r->kind == SQ_KRONECKER) {
        return Py_BuildValue("NN", factor_part(self, LEFT), factor_part(self, RIGHT));
    }
    const npy_intp k = r->k, blocks[] = {k / r->blocks.b, r->blocks.b, r->blocks.b};
    if (r->kind == SQ_ALIGNED) {
        return Py_BuildValue("NNN", factor_part(self, LEFT), factor_part(self, RIGHT),
                             view(self, 3, blocks, NPY_FLOAT32, r->blocks.first));
    }
    return Py_BuildValue("NNN", view(self, 3, blocks, NPY_FLOAT32, r->blocks.first),
                         view(self, 1, &k, NPY_INT32, r->blocks.permutation),
                         view(self, 3, blocks, NPY_FLOAT32, r->blocks.second));
}

static PyGetSetDef rotation_getset[] = {
    {"k", rotation_get_k, NULL, "Inputs of the site.", NULL},
    {"kind", rotation_get_kind, NULL, "\"kronecker\", \"aligned\" or \"blocks\".", NULL},
    {"sizes", rotation_get_sizes, NULL, "(k1, k2), or (k / b, b) of blocks.", NULL},
    {"parts", rotation_get_parts, NULL,
     "(left, right), (left, right, align) or (first, permutation, second), read-only arrays.",
     NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyMethodDef rotation_methods[] = {
    {"blocks", (PyCFunction)(void (*)(void))rotation_blocks,
     METH_VARARGS | METH_KEYWORDS | METH_CLASS, rotation_blocks_doc},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot rotation_slots[] = {
    {Py_tp_new, rotation_new},
    {Py_tp_dealloc, rotation_dealloc},
    {Py_tp_repr, rotation_repr},
    {Py_tp_getset, rotation_getset},
    {Py_tp_methods, rotation_methods},
    {Py_tp_doc, (void *)rotation_doc},
    {0, NULL},
};

static PyType_Spec rotation_spec = {.name = "singlequant._C.Rotation",
                                    .basicsize = sizeof(Rotation),
                                    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
                                    .slots = rotation_slots};

int
sq_py_add_rotation_type(PyObject *module)
{
    struct sq_module_state *state = PyModule_GetState(module);
    state->rotation_type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &rotation_spec, NULL);
    return state->rotation_type ? PyModule_AddType(module, state->rotation_type) : -1;
}

const struct sq_rotation *
sq_py_rotation(PyObject *module, PyObject *o, int64_t k, const char *name)
{
    static const struct sq_rotation unrotated = {.kind = SQ_UNROTATED};
    const struct sq_module_state *state = PyModule_GetState(module);
    if (o == Py_None) {
        return &unrotated;
    }
    if (!PyObject_TypeCheck(o, state->rotation_type)) {
        PyErr_Format(PyExc_TypeError, "%s: expected a Rotation or None, got %.200s", name,
                     Py_TYPE(o)->tp_name);
        return NULL;
    }
    const struct sq_rotation *rotation = &((Rotation *)o)->rotation;
    if (rotation->k != k) {
        PyErr_Format(PyExc_ValueError, "%s: expected one of k = %lld inputs, got %lld", name,
                     (long long)k, (long long)rotation->k);
        return NULL;
    }
    return rotation;
}

/* ---- rotate ----------------------------------------------------------------------------- */

PyDoc_STRVAR(
    rotate_doc,
    "rotate(x, rotation)\n--\n\n"
    "y [..., k] float32: each row of x as the Rotation turns it. A row's result depends on that\n"
    "row alone. ValueError unless the rotation is one of k inputs.");

static PyObject *
rotate(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"x", "rotation", NULL};
    const struct sq_module_state *state = PyModule_GetState(module);
    PyObject *x_object, *rotation_object, *result = NULL;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OO!:rotate", names, &x_object,
                                     state->rotation_type, &rotation_object)) {
        return NULL;
    }
    const struct sq_rotation *r = &((Rotation *)rotation_object)->rotation;
    PyArrayObject *y = NULL, *x = sq_py_array(x_object, NPY_FLOAT32, -1, "x");
    void *workspace = NULL;
    if (!x) {
        return NULL;
    }
    const int ndim = PyArray_NDIM(x);
    if (ndim < 1) {
        PyErr_SetString(PyExc_ValueError, "x: expected [..., k], got 0 dimensions");
        goto done;
    }
    if (sq_py_check_dim(x, ndim - 1, r->k, "x")) {
        goto done;
    }
    const int64_t rows = PyArray_SIZE(x) / r->k;
    y = sq_py_empty(ndim, PyArray_DIMS(x), NPY_FLOAT32);
    workspace = sq_alloc(sq_rotation_workspace_bytes(r, rows));
    if (!y || !workspace) {
        PyErr_NoMemory();
        goto done;
    }
    sq_status status;
    SQ_BEGIN_NOGIL(PyArray_SIZE(x) + r->left.steps + r->right.steps);
    status = sq_rotate(r, PyArray_DATA(x), rows, PyArray_DATA(y), workspace);
    SQ_END_NOGIL;
    if (status != SQ_OK) {
        sq_py_raise(module, status, "rotate");
        goto done;
    }
    result = Py_NewRef(y);
done:
    free(workspace);
    Py_DECREF(x);
    Py_XDECREF(y);
    return result;
}

PyMethodDef sq_py_rotation_methods[] = {
    SQ_METHOD(rotate),
    {NULL, NULL, 0, NULL},
};
