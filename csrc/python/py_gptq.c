/* SPDX-License-Identifier: Apache-2.0 */
/* Bindings of GPTQ: Gram matrix, factor, rounding. */
#include "python/py_args.h"
#include "python/py_rotation.h"

/* 0 if k inputs are within what the core takes, otherwise -1 and a ValueError that names them. */
static int
check_k(int64_t k, const char *name)
{
    if (k >= 1 && k <= SQ_GPTQ_K_MAX) {
        return 0;
    }
    PyErr_Format(PyExc_ValueError, "%s: expected 1 <= k <= %d, got k = %lld", name, SQ_GPTQ_K_MAX,
                 (long long)k);
    return -1;
}

/* New reference to o itself when it can be written as [k][k] float32 in place; NULL and TypeError
 * or ValueError otherwise. k < 0: any. */
static PyArrayObject *
writable_square(PyObject *o, int64_t k, const char *name)
{
    if (!PyArray_Check(o) || PyArray_TYPE((PyArrayObject *)o) != NPY_FLOAT32 ||
        !PyArray_ISCARRAY((PyArrayObject *)o)) {
        PyErr_Format(PyExc_TypeError,
                     "%s: expected a writable, contiguous float32 array, as it is updated in place",
                     name);
        return NULL;
    }
    PyArrayObject *array = (PyArrayObject *)o; /* borrowed until returned */
    if (PyArray_NDIM(array) != 2) {
        PyErr_Format(PyExc_ValueError, "%s: expected 2 dimensions, got %d", name,
                     PyArray_NDIM(array));
        return NULL;
    }
    k = k < 0 ? PyArray_DIM(array, 0) : k;
    if (sq_py_check_dim(array, 0, k, name) || sq_py_check_dim(array, 1, k, name)) {
        return NULL;
    }
    return (PyArrayObject *)Py_NewRef(o);
}

/* 0 if a and b, contiguous, share no memory, otherwise -1 and a ValueError. */
static int
check_apart(PyArrayObject *a, PyArrayObject *b, const char *name)
{
    const uintptr_t begin_a = (uintptr_t)PyArray_DATA(a), begin_b = (uintptr_t)PyArray_DATA(b);
    if (begin_a + (size_t)PyArray_NBYTES(a) <= begin_b ||
        begin_b + (size_t)PyArray_NBYTES(b) <= begin_a) {
        return 0;
    }
    PyErr_Format(PyExc_ValueError, "%s: expected memory of its own, got some of an input's", name);
    return -1;
}

PyDoc_STRVAR(gram_doc,
             "gram(x, out=None, bits=32, rotation=None, columns=None)\n--\n\n"
             "out + x^T x for x [m, k]: float32 [k, k], the sum over tokens of x x^T. columns [k] "
             "multiplies x and\nrotation turns it first. bits=8: x is then rounded to 8 bits, one "
             "scale for an input of tokens of\nabout one size. out, which is symmetric, is "
             "updated in place and returned; None starts from zero.\nThe same bytes at any thread "
             "count. ValueError for NaN, Inf, bad shapes and an out that shares\nmemory with x "
             "(out is left as it was), TypeError for an out that cannot be written in place. A\n"
             "signal's handler that raises spoils out.");

struct gram_arguments {
    PyObject *x_object, *out_object, *rotation_object, *columns_object;
    PyArrayObject *x, *out, *columns;
    struct sq_weight_transform transform;
    int bits;
};

/* The objects of a, parsed, into its arrays. 0, or -1 with an exception. Clear them either way. */
static int
take_gram_arguments(PyObject *module, struct gram_arguments *a)
{
    if (a->bits != 8 && a->bits != 32) {
        PyErr_Format(PyExc_ValueError, "bits: expected 8 or 32, got %d", a->bits);
        return -1;
    }
    a->x = sq_py_array(a->x_object, NPY_FLOAT32, 2, "x");
    if (!a->x || check_k(PyArray_DIM(a->x, 1), "x")) {
        return -1;
    }
    const npy_intp k = PyArray_DIM(a->x, 1);
    if (a->columns_object != Py_None) {
        a->columns = sq_py_array(a->columns_object, NPY_FLOAT32, 1, "columns");
        if (!a->columns || sq_py_check_dim(a->columns, 0, k, "columns")) {
            return -1;
        }
        a->transform.columns = PyArray_DATA(a->columns);
    }
    if (a->rotation_object != Py_None) {
        a->transform.rotation = sq_py_rotation(module, a->rotation_object, k, "rotation");
        if (!a->transform.rotation) {
            return -1;
        }
    }
    a->out = a->out_object == Py_None
                 ? (PyArrayObject *)PyArray_ZEROS(2, ((npy_intp[]){k, k}), NPY_FLOAT32, 0)
                 : writable_square(a->out_object, k, "out");
    return a->out && !check_apart(a->x, a->out, "out") ? 0 : -1;
}

static PyObject *
gram(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"x", "out", "bits", "rotation", "columns", NULL};
    struct gram_arguments a = {
        .out_object = Py_None, .rotation_object = Py_None, .columns_object = Py_None, .bits = 32};
    PyObject *result = NULL;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|OiOO:gram", names, &a.x_object, &a.out_object,
                                     &a.bits, &a.rotation_object, &a.columns_object)) {
        return NULL;
    }
    if (take_gram_arguments(module, &a)) {
        goto done;
    }
    const int64_t m = PyArray_DIM(a.x, 0), k = PyArray_DIM(a.x, 1);
    const int turned = a.transform.columns || a.transform.rotation;
    sq_status status;
    SQ_BEGIN_NOGIL(m * k + k * k);
    status = sq_gram_update(a.bits, turned ? &a.transform : NULL, PyArray_DATA(a.x), m, k,
                            PyArray_DATA(a.out));
    SQ_END_NOGIL;
    if (status != SQ_OK) {
        sq_py_raise(module, status, "x");
        goto done;
    }
    result = Py_NewRef((PyObject *)a.out);
done:
    Py_XDECREF(a.x);
    Py_XDECREF(a.out);
    Py_XDECREF(a.columns);
    return result;
}

PyDoc_STRVAR(
    gptq_factor_doc,
    "gptq_factor(gram, damping=0.01, order=False, overwrite=False)\n--\n\n"
    "(factor [k, k] float32, permutation [k] int32) of a Gram matrix, for gptq_round: the lower\n"
    "triangular L with L L^T = H[p][:, p], H = gram + damping * mean(diagonal) * I, p the\n"
    "permutation. Inputs are rounded from the last row of L to the first: in their own order, or "
    "with\norder=True by falling diagonal (act order). overwrite=True makes the factor in "
    "gram's memory, which\nan error spoils. ValueError for NaN, Inf, a gram that is not square, "
    "and one that is not "
    "positive definite after\ndamping. The same bytes at any thread count. Source: GPTQ, arXiv "
    "2210.17323; LDL form: QuIP,\narXiv 2307.13304, theorem 6.");

static PyObject *
gptq_factor(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"gram", "damping", "order", "overwrite", NULL};
    PyObject *gram_object, *result = NULL;
    PyArrayObject *given = NULL, *factor = NULL, *permutation = NULL;
    float damping = 0.01f;
    int order = 0, overwrite = 0;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|fpp:gptq_factor", names, &gram_object,
                                     &damping, &order, &overwrite)) {
        return NULL;
    }
    if (!(damping >= 0.0f) || damping > 1e6f) { /* NaN too */
        PyObject *found = PyFloat_FromDouble(damping);
        PyErr_Format(PyExc_ValueError, "damping: expected a number from 0 to 1e6, got %S", found);
        Py_XDECREF(found);
        return NULL;
    }
    if (overwrite) {
        factor = writable_square(gram_object, -1, "gram");
    }
    else {
        given = sq_py_array(gram_object, NPY_FLOAT32, 2, "gram");
        factor = given && !sq_py_check_dim(given, 1, PyArray_DIM(given, 0), "gram")
                     ? (PyArrayObject *)PyArray_NewCopy(given, NPY_CORDER)
                     : NULL;
    }
    if (!factor || check_k(PyArray_DIM(factor, 0), "gram")) {
        goto done;
    }
    npy_intp k = PyArray_DIM(factor, 0);
    permutation = sq_py_empty(1, &k, NPY_INT32);
    if (!permutation) {
        goto done;
    }
    sq_status status;
    SQ_BEGIN_NOGIL(k * k);
    status = sq_gptq_factor(PyArray_DATA(factor), k, damping, order, PyArray_DATA(permutation));
    SQ_END_NOGIL;
    if (status == SQ_ERR_RANGE) { /* the rest was checked above */
        PyErr_SetString(PyExc_ValueError,
                        "gram: expected a matrix that is positive definite after damping; raise "
                        "damping or calibrate on more tokens");
        goto done;
    }
    if (status != SQ_OK) {
        sq_py_raise(module, status, "gram");
        goto done;
    }
    result = Py_BuildValue("OO", factor, permutation);
done:
    Py_XDECREF(given);
    Py_XDECREF(factor);
    Py_XDECREF(permutation);
    return result;
}

PyDoc_STRVAR(
    gptq_feedback_doc,
    "gptq_feedback(factor)\n--\n\n"
    "gptq_factor's factor [k, k] as gptq_round's error feedback in 8 bits takes it: codes, "
    "a scale for\n128 rows of a column, in the order of the kernel table that is active. "
    "An opaque object of about\nk^2 / 2 bytes. ValueError for NaN and Inf on and below "
    "the diagonal, and for bad shapes.");

static const char feedback_name[] = "singlequant.gptq_feedback";

static void
free_feedback(PyObject *capsule)
{
    sq_gptq_feedback_free(PyCapsule_GetPointer(capsule, feedback_name));
}

static PyObject *
gptq_feedback(PyObject *module, PyObject *object)
{
    PyArrayObject *factor = sq_py_array(object, NPY_FLOAT32, 2, "factor");
    PyObject *result = NULL;
    if (!factor || check_k(PyArray_DIM(factor, 0), "factor") ||
        sq_py_check_dim(factor, 1, PyArray_DIM(factor, 0), "factor")) {
        goto done;
    }
    struct sq_gptq_feedback *feedback = NULL;
    const int64_t k = PyArray_DIM(factor, 0);
    sq_status status;
    SQ_BEGIN_NOGIL(k * k);
    status = sq_gptq_feedback_make(PyArray_DATA(factor), k, &feedback);
    SQ_END_NOGIL;
    if (status != SQ_OK) {
        sq_py_raise(module, status, "factor");
        goto done;
    }
    result = PyCapsule_New(feedback, feedback_name, free_feedback);
    if (!result) {
        sq_gptq_feedback_free(feedback);
    }
done:
    Py_XDECREF(factor);
    return result;
}

/* 0 and *feedback, NULL for None; -1 with TypeError. */
static int
take_feedback(PyObject *object, const struct sq_gptq_feedback **feedback)
{
    *feedback = NULL;
    if (object == Py_None) {
        return 0;
    }
    if (!PyCapsule_IsValid(object, feedback_name)) {
        PyErr_Format(PyExc_TypeError,
                     "feedback: expected None or what gptq_feedback returns, got "
                     "%.100s",
                     Py_TYPE(object)->tp_name);
        return -1;
    }
    *feedback = PyCapsule_GetPointer(object, feedback_name);
    return 0;
}

PyDoc_STRVAR(
    gptq_round_doc,
    "gptq_round(weights, factor, permutation, bits=4, group=0, search=False, "
    "bfloat16=False,\nfeedback=None)\n--\n\n"
    "Round weights [n, k] to (codes [n, k] int8, scales [n, k / g] float32) with error feedback "
    "through\ngptq_factor's factor [k, k] and permutation [k]. Symmetric grid; bits, search and "
    "bfloat16 as "
    "in quantize. group = g\ninputs share a scale, taken when their first column is reached, of "
    "the "
    "updated weights; with act\norder of the weights as given (static groups), as are those of "
    "whole rows (group 0). feedback:\nwhat gptq_feedback makes of the factor; errors reach other "
    "blocks of 128 columns in 8 bits then,\nunless groups neither hold whole blocks nor divide "
    "one. None: in float32. The same bytes at any\nthread count; rows do not depend on each other. "
    "ValueError for NaN, Inf, bad shapes, a permutation\nor a factor that is none. Source: GPTQ, "
    "arXiv 2210.17323.");

/* 0 if the core will take bits and group, otherwise -1 with ValueError. */
static int
check_grid(const struct sq_quantizer *q, int64_t k)
{
    if (sq_py_check_weight_bits(q->bits)) {
        return -1;
    }
    if (q->group < 0 || (q->group && k % q->group)) {
        PyErr_Format(PyExc_ValueError, "group: expected 0 or a divisor of k = %lld, got %lld",
                     (long long)k, (long long)q->group);
        return -1;
    }
    return 0;
}

static PyObject *
gptq_round(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"weights", "factor",   "permutation", "bits", "group",
                            "search",  "bfloat16", "feedback",    NULL};
    PyObject *weights_object, *factor_object, *permutation_object, *result = NULL;
    PyObject *feedback_object = Py_None;
    const struct sq_gptq_feedback *feedback;
    PyArrayObject *weights = NULL, *factor = NULL, *permutation = NULL, *codes = NULL,
                  *scales = NULL;
    struct sq_quantizer q = {.bits = 4, .symmetric = 1, .clip = 1.0f};
    long long group = 0;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOO|iLppO:gptq_round", names, &weights_object,
                                     &factor_object, &permutation_object, &q.bits, &group,
                                     &q.search, &q.bfloat16_scales, &feedback_object) ||
        take_feedback(feedback_object, &feedback)) {
        return NULL;
    }
    q.group = group;
    weights = sq_py_array(weights_object, NPY_FLOAT32, 2, "weights");
    factor = weights ? sq_py_array(factor_object, NPY_FLOAT32, 2, "factor") : NULL;
    permutation = factor ? sq_py_array(permutation_object, NPY_INT32, 1, "permutation") : NULL;
    if (!permutation) {
        goto done;
    }
    const int64_t n = PyArray_DIM(weights, 0), k = PyArray_DIM(weights, 1);
    if (check_k(k, "weights") || sq_py_check_dim(factor, 0, k, "factor") ||
        sq_py_check_dim(factor, 1, k, "factor") ||
        sq_py_check_dim(permutation, 0, k, "permutation") || check_grid(&q, k)) {
        goto done;
    }
    if (feedback && sq_gptq_feedback_k(feedback) != k) {
        PyErr_Format(PyExc_ValueError,
                     "feedback: expected that of a factor with k = %lld, got "
                     "k = %lld",
                     (long long)k, (long long)sq_gptq_feedback_k(feedback));
        goto done;
    }
    npy_intp dims[2] = {n, group ? k / group : 1};
    codes = sq_py_empty(2, PyArray_DIMS(weights), NPY_INT8);
    scales = sq_py_empty(2, dims, NPY_FLOAT32);
    if (!codes || !scales) {
        goto done;
    }
    sq_status status;
    SQ_BEGIN_NOGIL(n * k + k * k);
    status = sq_gptq_round(&q, PyArray_DATA(factor), PyArray_DATA(permutation), feedback,
                           PyArray_DATA(weights), n, k, PyArray_DATA(codes), PyArray_DATA(scales));
    SQ_END_NOGIL;
    if (status == SQ_ERR_RANGE) { /* bits were checked above */
        PyErr_SetString(PyExc_ValueError,
                        "factor, permutation: expected what gptq_factor returns, got a diagonal "
                        "that is not positive or indices that are no permutation");
        goto done;
    }
    if (status != SQ_OK) {
        sq_py_raise(module, status, "weights, factor");
        goto done;
    }
    result = Py_BuildValue("OO", codes, scales);
done:
    Py_XDECREF(weights);
    Py_XDECREF(factor);
    Py_XDECREF(permutation);
    Py_XDECREF(codes);
    Py_XDECREF(scales);
    return result;
}

PyMethodDef sq_py_gptq_methods[] = {
    {"gram", (PyCFunction)(void (*)(void))gram, METH_VARARGS | METH_KEYWORDS, gram_doc},
    {"gptq_factor", (PyCFunction)(void (*)(void))gptq_factor, METH_VARARGS | METH_KEYWORDS,
     gptq_factor_doc},
    {"gptq_feedback", gptq_feedback, METH_O, gptq_feedback_doc},
    {"gptq_round", (PyCFunction)(void (*)(void))gptq_round, METH_VARARGS | METH_KEYWORDS,
     gptq_round_doc},
    {NULL, NULL, 0, NULL},
};
