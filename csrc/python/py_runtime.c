/* SPDX-License-Identifier: Apache-2.0 */
/* Bindings of the runtime stage: dense linears, conversions, sampling, figures; the types are in
 * py_cache.c and py_layer.c. */
#include "core/sq_scratch.h"
#include "core/sq_threads.h"
#include "python/py_dense.h"

#include <string.h>

static const char *
dtype_name(PyArrayObject *a)
{
    const char *name = PyArray_DESCR(a)->typeobj->tp_name;
    const char *dot = strrchr(name, '.');
    return dot ? dot + 1 : name;
}

PyArrayObject *
sq_py_dense(PyObject *o, int ndim, const char *name, sq_dtype *dtype)
{
    PyArrayObject *any = (PyArrayObject *)PyArray_FromAny(o, NULL, 0, 0, 0, NULL);
    if (!any) {
        return NULL;
    }
    PyArray_Descr *want = NULL;
    if (PyArray_TYPE(any) == NPY_FLOAT || PyArray_TYPE(any) == NPY_HALF) {
        *dtype = PyArray_TYPE(any) == NPY_FLOAT ? SQ_F32 : SQ_F16;
        want = PyArray_DescrFromType(PyArray_TYPE(any)); /* native byte order */
    }
    else if (PyTypeNum_ISUSERDEF(PyArray_TYPE(any)) && PyArray_ITEMSIZE(any) == 2 &&
             !strcmp(dtype_name(any), "bfloat16")) {
        *dtype = SQ_BF16;
        want = PyArray_DescrFromType(PyArray_TYPE(any)); /* native byte order */
    }
    else {
        PyErr_Format(PyExc_TypeError, "%s: expected float32, float16 or bfloat16, got %R", name,
                     PyArray_DESCR(any));
        Py_DECREF(any);
        return NULL;
    }
    if (sq_py_check_ndim(any, ndim, name)) {
        Py_DECREF(want);
        Py_DECREF(any);
        return NULL;
    }
    PyArrayObject *array = (PyArrayObject *)PyArray_FromArray(
        any, want, NPY_ARRAY_CARRAY_RO | NPY_ARRAY_NOTSWAPPED); /* steals want */
    Py_DECREF(any);
    return array;
}

/* x as float32 [..., k] and its number of rows in *m; NULL with an exception. */
static PyArrayObject *
rows_of(PyObject *o, int64_t k, const char *name, int64_t *m)
{
    PyArrayObject *x = sq_py_array(o, NPY_FLOAT, -1, name);
    if (!x) {
        return NULL;
    }
    const int last = PyArray_NDIM(x) - 1;
    if (last < 0) {
        PyErr_Format(PyExc_ValueError, "%s: expected at least 1 dimension, got 0", name);
        Py_DECREF(x);
        return NULL;
    }
    if (sq_py_check_dim(x, last, k, name)) {
        Py_DECREF(x);
        return NULL;
    }
    *m = 1;
    for (int i = 0; i < last; i++) {
        *m *= PyArray_DIM(x, i);
    }
    return x;
}

PyDoc_STRVAR(
    linear_dense_doc,
    "linear_dense(x, weight)\n--\n\n"
    "y [..., n] = x [..., k] weight^T in float32, weight [n, k] in float32, float16 or "
    "bfloat16.\n\n"
    "weight is read in place when it is contiguous (a read-only memory map is welcome). The "
    "result does\nnot depend on the number of threads. ValueError if the shapes disagree, "
    "TypeError for another dtype.");

static PyObject *
linear_dense(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"x", "weight", NULL};
    PyObject *x_object, *w_object;
    PyArrayObject *x = NULL, *w = NULL, *y = NULL;
    npy_intp dims[NPY_MAXDIMS];
    sq_dtype dtype;
    int64_t m;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OO:linear_dense", names, &x_object,
                                     &w_object)) {
        return NULL;
    }
    w = sq_py_dense(w_object, 2, "weight", &dtype);
    if (!w) {
        goto done;
    }
    const int64_t n = PyArray_DIM(w, 0), k = PyArray_DIM(w, 1);
    x = rows_of(x_object, k, "x", &m);
    if (!x) {
        goto done;
    }
    const int ndim = PyArray_NDIM(x);
    memcpy(dims, PyArray_DIMS(x), (size_t)ndim * sizeof *dims);
    dims[ndim - 1] = n;
    y = sq_py_empty(ndim, dims, NPY_FLOAT);
    if (!y) {
        goto done;
    }
    sq_status status;
    SQ_BEGIN_NOGIL(n * k + m * (n + k))
    status = sq_linear_dense(dtype, PyArray_DATA(w), PyArray_DATA(x), m, n, k, PyArray_DATA(y), n);
    SQ_END_NOGIL;
    if (status != SQ_OK) {
        sq_py_raise(module, status, "linear_dense");
        Py_CLEAR(y);
    }
done:
    Py_XDECREF(x);
    Py_XDECREF(w);
    return (PyObject *)y;
}

PyDoc_STRVAR(
    to_float32_doc,
    "to_float32(x, reject=False)\n--\n\n"
    "A float32 copy of x (float32, float16 or bfloat16, any shape).\n\n"
    "With reject, ValueError if an element is NaN or infinite. TypeError for another dtype.");

static PyObject *
to_float32(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"x", "reject", NULL};
    PyObject *object;
    PyArrayObject *x = NULL, *y = NULL;
    sq_dtype dtype;
    int reject = 0;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|p:to_float32", names, &object, &reject)) {
        return NULL;
    }
    x = sq_py_dense(object, -1, "x", &dtype);
    if (!x) {
        goto done;
    }
    y = sq_py_empty(PyArray_NDIM(x), PyArray_DIMS(x), NPY_FLOAT);
    if (!y) {
        goto done;
    }
    sq_status status;
    SQ_BEGIN_NOGIL(PyArray_SIZE(x))
    status = sq_to_float32(dtype, PyArray_DATA(x), PyArray_SIZE(x), reject, PyArray_DATA(y));
    SQ_END_NOGIL;
    if (status != SQ_OK) {
        sq_py_raise(module, status, "x");
        Py_CLEAR(y);
    }
done:
    Py_XDECREF(x);
    return (PyObject *)y;
}

PyArrayObject *
sq_py_index(PyObject *o, int64_t limit, const char *name)
{
    PyArrayObject *given = sq_py_array(o, NPY_INT64, 1, name);
    PyArrayObject *index = given ? (PyArrayObject *)PyArray_NewCopy(given, NPY_CORDER) : NULL;
    Py_XDECREF(given);
    if (!index) {
        return NULL;
    }
    const int64_t *p = PyArray_DATA(index);
    for (npy_intp i = 0; i < PyArray_SIZE(index); i++) {
        if (p[i] < 0 || p[i] >= limit) {
            PyErr_Format(PyExc_ValueError, "%s[%lld]: expected 0 to %lld, got %lld", name,
                         (long long)i, (long long)limit - 1, (long long)p[i]);
            Py_DECREF(index);
            return NULL;
        }
    }
    return index;
}

PyDoc_STRVAR(gather_rows_doc,
             "gather_rows(table, index)\n--\n\n"
             "Rows index [m] of table [v, h] (float32, float16 or bfloat16) as float32 [m, h].\n\n"
             "Only the rows asked for are read. ValueError if an index is outside 0 to v - 1.");

static PyObject *
gather_rows(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"table", "index", NULL};
    PyObject *table_object, *index_object;
    PyArrayObject *table = NULL, *index = NULL, *out = NULL;
    sq_dtype dtype;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OO:gather_rows", names, &table_object,
                                     &index_object)) {
        return NULL;
    }
    table = sq_py_dense(table_object, 2, "table", &dtype);
    index = table ? sq_py_index(index_object, PyArray_DIM(table, 0), "index") : NULL;
    if (!index) {
        goto done;
    }
    const npy_intp dims[2] = {PyArray_DIM(index, 0), PyArray_DIM(table, 1)};
    out = sq_py_empty(2, dims, NPY_FLOAT);
    if (!out) {
        goto done;
    }
    sq_status status;
    SQ_BEGIN_NOGIL(dims[0] * dims[1])
    status = sq_gather_rows(dtype, PyArray_DATA(table), PyArray_DIM(table, 0), dims[1],
                            PyArray_DATA(index), dims[0], PyArray_DATA(out));
    SQ_END_NOGIL;
    if (status != SQ_OK) {
        sq_py_raise(module, status, "gather_rows");
        Py_CLEAR(out);
    }
done:
    Py_XDECREF(table);
    Py_XDECREF(index);
    return (PyObject *)out;
}

PyDoc_STRVAR(
    rms_norm_doc,
    "rms_norm(x, weight, eps)\n--\n\n"
    "x [..., n] / sqrt(mean(x^2) + eps) * weight [n], row by row, float32.\n\n"
    "ValueError if the shapes disagree or eps is negative. Source: Zhang and Sennrich, Root "
    "Mean Square\nLayer Normalization, arXiv 1910.07467.");

/* x [..., n] normalized row by row; bias NULL or None: none. Borrows all. */
static PyObject *
normalize(enum sq_norm_kind kind, PyObject *x_object, PyObject *w_object, PyObject *b_object,
          float eps)
{
    PyArrayObject *x = NULL, *w = NULL, *b = NULL, *y = NULL;
    const int biased = b_object && b_object != Py_None;
    struct sq_fault fault;
    int64_t m;
    w = sq_py_array(w_object, NPY_FLOAT, 1, "weight");
    b = w && biased ? sq_py_array(b_object, NPY_FLOAT, 1, "bias") : NULL;
    if (!w || (biased && (!b || sq_py_check_dim(b, 0, PyArray_DIM(w, 0), "bias")))) {
        goto done;
    }
    x = rows_of(x_object, PyArray_DIM(w, 0), "x", &m);
    const struct sq_norm norm = {.kind = kind,
                                 .eps = eps,
                                 .n = PyArray_DIM(w, 0),
                                 .rows = 1,
                                 .weight = PyArray_DATA(w),
                                 .bias = b ? PyArray_DATA(b) : NULL};
    if (x &&
        sq_norm_seal(&norm, kind == SQ_NORM_RMS ? "rms_norm" : "layer_norm", &fault) != SQ_OK) {
        PyErr_SetString(PyExc_ValueError, fault.text);
        goto done;
    }
    y = x ? sq_py_empty(PyArray_NDIM(x), PyArray_DIMS(x), NPY_FLOAT) : NULL;
    if (!y) {
        goto done;
    }
    sq_status status = SQ_OK;
    SQ_BEGIN_NOGIL(PyArray_SIZE(x))
    sq_norm_rows(&norm, PyArray_DATA(x), m, PyArray_DATA(y));
    SQ_END_NOGIL;
    if (status != SQ_OK) {
        Py_CLEAR(y);
    }
done:
    Py_XDECREF(x);
    Py_XDECREF(w);
    Py_XDECREF(b);
    return (PyObject *)y;
}

static PyObject *
rms_norm(PyObject *Py_UNUSED(module), PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"x", "weight", "eps", NULL};
    PyObject *x, *w;
    float eps;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOf:rms_norm", names, &x, &w, &eps)) {
        return NULL;
    }
    return normalize(SQ_NORM_RMS, x, w, NULL, eps);
}

PyDoc_STRVAR(layer_norm_doc,
             "layer_norm(x, weight, bias, eps)\n--\n\n"
             "x [..., n] less its mean, over its standard deviation, times weight [n] plus bias "
             "[n] or None.\n\n"
             "Row by row, float32. ValueError if the shapes disagree or eps is negative. Source: "
             "Ba, Kiros and\nHinton, Layer Normalization, arXiv 1607.06450.");

static PyObject *
layer_norm(PyObject *Py_UNUSED(module), PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"x", "weight", "bias", "eps", NULL};
    PyObject *x, *w, *b;
    float eps;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOOf:layer_norm", names, &x, &w, &b, &eps)) {
        return NULL;
    }
    return normalize(SQ_NORM_LAYER, x, w, b, eps);
}

PyDoc_STRVAR(
    sample_rows_doc,
    "sample_rows(logits, temperature, top_k, top_p, uniform)\n--\n\n"
    "Next tokens, int64 [m], of logits [m, v] by uniform [m]: `sample` of each row, on all "
    "threads.");

static PyObject *
sample_rows(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"logits", "temperature", "top_k", "top_p", "uniform", NULL};
    PyObject *logits_object, *uniform_object, *result = NULL;
    PyArrayObject *logits = NULL, *uniform = NULL, *tokens = NULL;
    void *workspace = NULL;
    float temperature, top_p;
    long long top_k;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OfLfO:sample_rows", names, &logits_object,
                                     &temperature, &top_k, &top_p, &uniform_object)) {
        return NULL;
    }
    logits = sq_py_array(logits_object, NPY_FLOAT, 2, "logits");
    uniform = logits ? sq_py_array(uniform_object, NPY_DOUBLE, 1, "uniform") : NULL;
    if (!uniform || sq_py_check_dim(uniform, 0, PyArray_DIM(logits, 0), "uniform")) {
        goto done;
    }
    const int64_t m = PyArray_DIM(logits, 0), v = PyArray_DIM(logits, 1);
    const int64_t workers = sq_max_i64(1, sq_min_i64(sq_get_num_threads(), m));
    tokens = sq_py_empty(1, PyArray_DIMS(logits), NPY_INT64);
    if (!tokens) {
        goto done;
    }
    workspace = sq_alloc((size_t)(workers * v) * SQ_SAMPLE_BYTES);
    if (!workspace) {
        PyErr_NoMemory();
        goto done;
    }
    sq_status status;
    SQ_BEGIN_NOGIL(PyArray_SIZE(logits))
    status = sq_sample_rows(PyArray_DATA(logits), m, v, temperature, top_k, top_p,
                            PyArray_DATA(uniform), workers, workspace, PyArray_DATA(tokens));
    SQ_END_NOGIL;
    result = status == SQ_OK ? Py_NewRef(tokens) : sq_py_raise(module, status, "sample_rows");
done:
    free(workspace);
    Py_XDECREF(logits);
    Py_XDECREF(uniform);
    Py_XDECREF(tokens);
    return result;
}

PyDoc_STRVAR(
    sample_doc,
    "sample(logits, temperature, top_k, top_p, uniform)\n--\n\n"
    "The next token from logits [v], as an int.\n\n"
    "temperature 0 takes the largest logit, the lowest index among equals. Otherwise the "
    "softmax of\nlogits / temperature is cut to the top_k most probable tokens (0: all) and "
    "then to the smallest set\nwhose mass reaches top_p (1: all); uniform in [0, 1), the "
    "caller's random number, picks one by walking\nthe distribution in descending order. "
    "ValueError for values out of range, NaN or +inf logits.\nSource: Holtzman et al., "
    "arXiv 1904.09751 (top_p).");

static PyObject *
sample(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"logits", "temperature", "top_k", "top_p", "uniform", NULL};
    PyObject *object, *result = NULL;
    PyArrayObject *logits = NULL;
    float temperature, top_p;
    long long top_k;
    double uniform;
    int64_t token;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OfLfd:sample", names, &object, &temperature,
                                     &top_k, &top_p, &uniform)) {
        return NULL;
    }
    logits = sq_py_array(object, NPY_FLOAT, 1, "logits");
    if (!logits) {
        goto done;
    }
    const int64_t v = PyArray_DIM(logits, 0);
    void *workspace = sq_thread_scratch((size_t)sq_max_i64(1, v) * SQ_SAMPLE_BYTES);
    if (!workspace) {
        PyErr_NoMemory();
        goto done;
    }
    sq_status status;
    SQ_BEGIN_NOGIL(v)
    status =
        sq_sample(PyArray_DATA(logits), v, temperature, top_k, top_p, uniform, workspace, &token);
    SQ_END_NOGIL;
    result = status == SQ_OK ? PyLong_FromLongLong(token) : sq_py_raise(module, status, "sample");
done:
    Py_XDECREF(logits);
    return result;
}

PyDoc_STRVAR(negative_log_likelihood_doc,
             "negative_log_likelihood(logits, target)\n--\n\n"
             "-log softmax(logits [m, v])[target [m]] in nats, float64 [m].\n\n"
             "ValueError if the shapes disagree or a target is outside 0 to v - 1.");

static PyObject *
negative_log_likelihood(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"logits", "target", NULL};
    PyObject *logits_object, *target_object;
    PyArrayObject *logits = NULL, *target = NULL, *nll = NULL;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OO:negative_log_likelihood", names,
                                     &logits_object, &target_object)) {
        return NULL;
    }
    logits = sq_py_array(logits_object, NPY_FLOAT, 2, "logits");
    target = logits ? sq_py_index(target_object, PyArray_DIM(logits, 1), "target") : NULL;
    if (!target || sq_py_check_dim(target, 0, PyArray_DIM(logits, 0), "target")) {
        goto done;
    }
    nll = sq_py_empty(1, PyArray_DIMS(logits), NPY_DOUBLE);
    if (!nll) {
        goto done;
    }
    sq_status status;
    SQ_BEGIN_NOGIL(PyArray_SIZE(logits))
    status = sq_negative_log_likelihood(PyArray_DATA(logits), PyArray_DATA(target),
                                        PyArray_DIM(logits, 0), PyArray_DIM(logits, 1),
                                        PyArray_DATA(nll));
    SQ_END_NOGIL;
    if (status != SQ_OK) {
        sq_py_raise(module, status, "negative_log_likelihood");
        Py_CLEAR(nll);
    }
done:
    Py_XDECREF(logits);
    Py_XDECREF(target);
    return (PyObject *)nll;
}

PyDoc_STRVAR(
    kl_divergence_doc,
    "kl_divergence(p, q)\n--\n\n"
    "(KL(softmax(p) || softmax(q)) in nats, float64 [m]; whether the largest logits agree, "
    "bool [m]) of\nlogits p and q [m, v]. ValueError if the shapes disagree.");

static PyObject *
kl_divergence(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"p", "q", NULL};
    PyObject *p_object, *q_object, *result = NULL;
    PyArrayObject *p = NULL, *q = NULL, *kl = NULL, *same = NULL;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OO:kl_divergence", names, &p_object,
                                     &q_object)) {
        return NULL;
    }
    p = sq_py_array(p_object, NPY_FLOAT, 2, "p");
    q = p ? sq_py_array(q_object, NPY_FLOAT, 2, "q") : NULL;
    if (!q || sq_py_check_dim(q, 0, PyArray_DIM(p, 0), "q") ||
        sq_py_check_dim(q, 1, PyArray_DIM(p, 1), "q")) {
        goto done;
    }
    kl = sq_py_empty(1, PyArray_DIMS(p), NPY_DOUBLE);
    same = sq_py_empty(1, PyArray_DIMS(p), NPY_BOOL);
    if (!kl || !same) {
        goto done;
    }
    sq_status status;
    SQ_BEGIN_NOGIL(PyArray_SIZE(p))
    status = sq_kl_divergence(PyArray_DATA(p), PyArray_DATA(q), PyArray_DIM(p, 0),
                              PyArray_DIM(p, 1), PyArray_DATA(kl), PyArray_DATA(same));
    SQ_END_NOGIL;
    result =
        status == SQ_OK ? PyTuple_Pack(2, kl, same) : sq_py_raise(module, status, "kl_divergence");
done:
    Py_XDECREF(p);
    Py_XDECREF(q);
    Py_XDECREF(kl);
    Py_XDECREF(same);
    return result;
}

PyDoc_STRVAR(
    kv_quantize_doc,
    "kv_quantize(x, bits=4)\n--\n\n"
    "(codes uint8 [m, n], scales float16 [m], minima float16 [m]) of heads x [m, n], as the KV "
    "cache\nrounds them: x is about scale * code + minimum.\n\n"
    "bits: 8 or 4, codes 0 to 2^bits - 1. The minimum is rounded down and the scale up, so that "
    "every x\nwithin +-65504 is off by half a scale at most. A row with NaN or Inf gets NaN for "
    "both.\n"
    "ValueError for other bits or rows without elements.");

static PyObject *
kv_quantize(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"x", "bits", NULL};
    PyObject *x_object, *result = NULL;
    PyArrayObject *codes = NULL, *scales = NULL, *minima = NULL;
    int bits = 4;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|i:kv_quantize", names, &x_object, &bits)) {
        return NULL;
    }
    if (bits != 8 && bits != 4) {
        return PyErr_Format(PyExc_ValueError, "bits: expected 8 or 4, got %d", bits);
    }
    PyArrayObject *x = sq_py_array(x_object, NPY_FLOAT, 2, "x");
    if (!x) {
        return NULL;
    }
    if (PyArray_DIM(x, 1) < 1) {
        PyErr_SetString(PyExc_ValueError, "x: expected rows of at least one element, got none");
        goto done;
    }
    codes = sq_py_empty(2, PyArray_DIMS(x), NPY_UINT8);
    scales = sq_py_empty(1, PyArray_DIMS(x), NPY_HALF);
    minima = sq_py_empty(1, PyArray_DIMS(x), NPY_HALF);
    if (!codes || !scales || !minima) {
        goto done;
    }
    sq_status status;
    SQ_BEGIN_NOGIL(PyArray_SIZE(x))
    status = sq_kv_quantize(bits, PyArray_DATA(x), PyArray_DIM(x, 0), PyArray_DIM(x, 1),
                            PyArray_DATA(codes), PyArray_DATA(scales), PyArray_DATA(minima));
    SQ_END_NOGIL;
    result = status == SQ_OK ? PyTuple_Pack(3, codes, scales, minima)
                             : sq_py_raise(module, status, "kv_quantize");
done:
    Py_XDECREF(x);
    Py_XDECREF(codes);
    Py_XDECREF(scales);
    Py_XDECREF(minima);
    return result;
}

PyMethodDef sq_py_runtime_methods[] = {
    SQ_METHOD(linear_dense),  SQ_METHOD(to_float32),
    SQ_METHOD(gather_rows),   SQ_METHOD(rms_norm),
    SQ_METHOD(layer_norm),    SQ_METHOD(kv_quantize),
    SQ_METHOD(sample),        SQ_METHOD(sample_rows),
    SQ_METHOD(kl_divergence), SQ_METHOD(negative_log_likelihood),
    {NULL, NULL, 0, NULL},
};
