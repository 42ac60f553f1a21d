/* SPDX-License-Identifier: Apache-2.0 */
/* Test hooks: rows of the active kernel table that no public function reaches alone.
 *
 * Outputs are the caller's arrays, written in place, so that the tests can put them against guard
 * pages. */
#include "python/py_args.h"

#include "core/sq_internal.h"
#include "kernels/sq_kernels.h"

/* o as it is, if it is a writable C-contiguous float32 array of ndim dimensions; borrowed. */
static float *
writable(PyObject *o, int ndim, const char *name)
{
    PyArrayObject *a = (PyArrayObject *)o;
    if (!PyArray_Check(o) || PyArray_TYPE(a) != NPY_FLOAT32 || PyArray_NDIM(a) != ndim ||
        !PyArray_ISCARRAY(a)) {
        PyErr_Format(PyExc_TypeError,
                     "%s: expected a writable C-contiguous float32 array of %d dimensions", name,
                     ndim);
        return NULL;
    }
    return PyArray_DATA(a);
}

PyDoc_STRVAR(gemm_f32_doc,
             "kernel_gemm_f32(a, b, out)\n--\n\n"
             "out [m, n] <- a [m, k] b [k, n], the active table's gemm_f32 (for tests).");

static PyObject *
kernel_gemm_f32(PyObject *Py_UNUSED(module), PyObject *args)
{
    PyObject *a_object, *b_object, *out, *result = NULL;
    PyArrayObject *a = NULL, *b = NULL;
    if (!PyArg_ParseTuple(args, "OOO:kernel_gemm_f32", &a_object, &b_object, &out)) {
        return NULL;
    }
    float *c = writable(out, 2, "out");
    a = c ? sq_py_array(a_object, NPY_FLOAT32, 2, "a") : NULL;
    b = a ? sq_py_array(b_object, NPY_FLOAT32, 2, "b") : NULL;
    if (!b) {
        goto done;
    }
    const int64_t m = PyArray_DIM(a, 0), k = PyArray_DIM(a, 1), n = PyArray_DIM(b, 1);
    if (sq_py_check_dim(b, 0, k, "b") || sq_py_check_dim((PyArrayObject *)out, 0, m, "out") ||
        sq_py_check_dim((PyArrayObject *)out, 1, n, "out")) {
        goto done;
    }
    sq_kernels_active()->gemm_f32(m, n, k, PyArray_DATA(a), k, PyArray_DATA(b), n, c, n);
    result = Py_NewRef(Py_None);
done:
    Py_XDECREF(a);
    Py_XDECREF(b);
    return result;
}

PyDoc_STRVAR(rms_norm_doc,
             "kernel_rms_norm(x, weight, eps, out)\n--\n\n"
             "out [n] <- the active table's rms_norm_row of x [n] (for tests).");

static PyObject *
kernel_rms_norm(PyObject *Py_UNUSED(module), PyObject *args)
{
    PyObject *x_object, *weight_object, *out, *result = NULL;
    PyArrayObject *x = NULL, *weight = NULL;
    float eps;
    if (!PyArg_ParseTuple(args, "OOfO:kernel_rms_norm", &x_object, &weight_object, &eps, &out)) {
        return NULL;
    }
    float *y = writable(out, 1, "out");
    x = y ? sq_py_array(x_object, NPY_FLOAT32, 1, "x") : NULL;
    weight = x ? sq_py_array(weight_object, NPY_FLOAT32, 1, "weight") : NULL;
    if (!weight) {
        goto done;
    }
    const int64_t n = PyArray_DIM(x, 0);
    if (sq_py_check_dim(weight, 0, n, "weight") ||
        sq_py_check_dim((PyArrayObject *)out, 0, n, "out")) {
        goto done;
    }
    sq_kernels_active()->rms_norm_row(PyArray_DATA(x), PyArray_DATA(weight), n, eps, y);
    result = Py_NewRef(Py_None);
done:
    Py_XDECREF(x);
    Py_XDECREF(weight);
    return result;
}

PyDoc_STRVAR(silu_mul_doc,
             "kernel_silu_mul(gate, up, out)\n--\n\n"
             "out [n] <- the active table's silu_mul (for tests).");

static PyObject *
kernel_silu_mul(PyObject *Py_UNUSED(module), PyObject *args)
{
    PyObject *gate_object, *up_object, *out, *result = NULL;
    PyArrayObject *gate = NULL, *up = NULL;
    if (!PyArg_ParseTuple(args, "OOO:kernel_silu_mul", &gate_object, &up_object, &out)) {
        return NULL;
    }
    float *y = writable(out, 1, "out");
    gate = y ? sq_py_array(gate_object, NPY_FLOAT32, 1, "gate") : NULL;
    up = gate ? sq_py_array(up_object, NPY_FLOAT32, 1, "up") : NULL;
    if (!up) {
        goto done;
    }
    const int64_t n = PyArray_DIM(gate, 0);
    if (sq_py_check_dim(up, 0, n, "up") || sq_py_check_dim((PyArrayObject *)out, 0, n, "out")) {
        goto done;
    }
    sq_kernels_active()->silu_mul(PyArray_DATA(gate), PyArray_DATA(up), n, y);
    result = Py_NewRef(Py_None);
done:
    Py_XDECREF(gate);
    Py_XDECREF(up);
    return result;
}

PyDoc_STRVAR(softmax_doc,
             "kernel_softmax(x, n, scale)\n--\n\n"
             "x [n_padded] <- the active table's softmax_row in place (for tests).");

static PyObject *
kernel_softmax(PyObject *Py_UNUSED(module), PyObject *args)
{
    PyObject *out;
    long long n;
    float scale;
    if (!PyArg_ParseTuple(args, "OLf:kernel_softmax", &out, &n, &scale)) {
        return NULL;
    }
    float *x = writable(out, 1, "x");
    if (!x) {
        return NULL;
    }
    const int64_t n_padded = PyArray_DIM((PyArrayObject *)out, 0);
    if (n < 1 || n > n_padded) {
        return PyErr_Format(PyExc_ValueError, "n: expected 1 to %lld, got %lld",
                            (long long)n_padded, n);
    }
    sq_kernels_active()->softmax_row(x, n, n_padded, scale);
    Py_RETURN_NONE;
}

PyDoc_STRVAR(widen_doc,
             "kernel_widen(x, bfloat16, out)\n--\n\n"
             "out [n] float32 <- x [n] uint16, bits of float16 or bfloat16; True if all "
             "are finite (for tests).");

static PyObject *
kernel_widen(PyObject *Py_UNUSED(module), PyObject *args)
{
    PyObject *x_object, *out, *result = NULL;
    PyArrayObject *x = NULL;
    int bfloat16;
    if (!PyArg_ParseTuple(args, "OpO:kernel_widen", &x_object, &bfloat16, &out)) {
        return NULL;
    }
    float *y = writable(out, 1, "out");
    x = y ? sq_py_bits_array(x_object, NPY_UINT16, 1, "x") : NULL;
    if (!x || sq_py_check_dim((PyArrayObject *)out, 0, PyArray_DIM(x, 0), "out")) {
        goto done;
    }
    const struct sq_kernels *kernels = sq_kernels_active();
    result = PyBool_FromLong((bfloat16 ? kernels->bf16_to_f32 : kernels->f16_to_f32)(
        PyArray_DATA(x), PyArray_DIM(x, 0), y));
done:
    Py_XDECREF(x);
    return result;
}

PyDoc_STRVAR(fixed_errors_doc,
             "kernel_fixed_errors(u, index)\n--\n\n"
             "(errors, clipped) of the active table's fixed_errors for u [k] int16 within the "
             "search's peak and four\ntimes the step of clip ratio index (for tests).");

static PyObject *
kernel_fixed_errors(PyObject *Py_UNUSED(module), PyObject *args)
{
    PyObject *u_object;
    int index;
    if (!PyArg_ParseTuple(args, "Oi:kernel_fixed_errors", &u_object, &index)) {
        return NULL;
    }
    if (index < 0 || index >= SQ_CLIP_RATIOS) {
        return PyErr_Format(PyExc_ValueError, "index: expected 0 to %d, got %d", SQ_CLIP_RATIOS - 1,
                            index);
    }
    PyArrayObject *given = sq_py_array(u_object, NPY_INT16, 1, "u");
    if (!given) {
        return NULL;
    }
    const int64_t k = PyArray_DIM(given, 0), padded = sq_round_up(k, SQ_FIXED_ALIGN);
    int16_t *u = sq_alloc((size_t)padded * sizeof *u);
    if (!u) {
        Py_DECREF(given);
        return PyErr_NoMemory();
    }
    memset(u, 0, (size_t)padded * sizeof *u);
    memcpy(u, PyArray_DATA(given), (size_t)k * sizeof *u);
    Py_DECREF(given);
    struct sq_fixed_steps steps;
    for (int c = 0; c < SQ_FIXED_BATCH; c++) {
        steps.step[c] = (int16_t)SQ_FIXED_STEP(index);
        steps.inverse[c] = (int16_t)SQ_FIXED_INVERSE(steps.step[c]);
    }
    struct sq_fixed_errors e;
    sq_kernels_active()->fixed_errors(u, k, &steps, &e);
    free(u);
    return Py_BuildValue("[LLLL]L", (long long)e.error[0], (long long)e.error[1],
                         (long long)e.error[2], (long long)e.error[3], (long long)e.clipped);
}

/* The same for uint16. */
static uint16_t *
writable_bits(PyObject *o, const char *name)
{
    PyArrayObject *a = (PyArrayObject *)o;
    if (!PyArray_Check(o) || PyArray_TYPE(a) != NPY_UINT16 || PyArray_NDIM(a) != 1 ||
        !PyArray_ISCARRAY(a)) {
        PyErr_Format(PyExc_TypeError,
                     "%s: expected a writable C-contiguous uint16 array of 1 dimension", name);
        return NULL;
    }
    return PyArray_DATA(a);
}

PyDoc_STRVAR(
    narrow_doc,
    "kernel_narrow(x, out)\n--\n\n"
    "out [n] uint16, bits of float16 <- the active table's f32_to_f16 of x [n] (for tests).");

static PyObject *
kernel_narrow(PyObject *Py_UNUSED(module), PyObject *args)
{
    PyObject *x_object, *out, *result = NULL;
    PyArrayObject *x = NULL;
    if (!PyArg_ParseTuple(args, "OO:kernel_narrow", &x_object, &out)) {
        return NULL;
    }
    uint16_t *y = writable_bits(out, "out");
    x = y ? sq_py_array(x_object, NPY_FLOAT32, 1, "x") : NULL;
    if (!x || sq_py_check_dim((PyArrayObject *)out, 0, PyArray_DIM(x, 0), "out")) {
        goto done;
    }
    sq_kernels_active()->f32_to_f16(PyArray_DATA(x), PyArray_DIM(x, 0), y);
    result = Py_NewRef(Py_None);
done:
    Py_XDECREF(x);
    return result;
}

PyDoc_STRVAR(kv_doc,
             "kernel_kv(codes, scales, minima, bits, by_row, out)\n--\n\n"
             "out [rows, n] <- the active table's kv8_to_f32 or kv4_to_f32 (for tests).\n\n"
             "codes: uint8 [rows, 8 ceil(n / group)], in groups of 8 codes (8 bits) or 16 (4 bits: "
             "number j in\n    the low nibble of byte j, j + 8 in the high one).\n"
             "scales, minima: float32 [rows] with by_row, otherwise [n].");

static PyObject *
kernel_kv(PyObject *Py_UNUSED(module), PyObject *args)
{
    PyObject *codes_object, *scales_object, *minima_object, *out, *result = NULL;
    PyArrayObject *codes = NULL, *scales = NULL, *minima = NULL;
    int bits, by_row;
    if (!PyArg_ParseTuple(args, "OOOipO:kernel_kv", &codes_object, &scales_object, &minima_object,
                          &bits, &by_row, &out)) {
        return NULL;
    }
    if (bits != 8 && bits != 4) {
        return PyErr_Format(PyExc_ValueError, "bits: expected 8 or 4, got %d", bits);
    }
    float *y = writable(out, 2, "out");
    codes = y ? sq_py_bits_array(codes_object, NPY_UINT8, 2, "codes") : NULL;
    scales = codes ? sq_py_array(scales_object, NPY_FLOAT, 1, "scales") : NULL;
    minima = scales ? sq_py_array(minima_object, NPY_FLOAT, 1, "minima") : NULL;
    if (!minima) {
        goto done;
    }
    const int64_t rows = PyArray_DIM((PyArrayObject *)out, 0);
    const int64_t n = PyArray_DIM((PyArrayObject *)out, 1), group = 64 / bits;
    if (sq_py_check_dim(codes, 0, rows, "codes") ||
        sq_py_check_dim(codes, 1, (n + group - 1) / group * 8, "codes") ||
        sq_py_check_dim(scales, 0, by_row ? rows : n, "scales") ||
        sq_py_check_dim(minima, 0, by_row ? rows : n, "minima")) {
        goto done;
    }
    const struct sq_kernels *kernels = sq_kernels_active();
    (bits == 8 ? kernels->kv8_to_f32 : kernels->kv4_to_f32)(
        PyArray_DATA(codes), PyArray_DATA(scales), PyArray_DATA(minima), by_row, rows, n, y);
    result = Py_NewRef(Py_None);
done:
    Py_XDECREF(codes);
    Py_XDECREF(scales);
    Py_XDECREF(minima);
    return result;
}

PyMethodDef sq_py_kernels_methods[] = {
    {"kernel_fixed_errors", kernel_fixed_errors, METH_VARARGS, fixed_errors_doc},
    {"kernel_gemm_f32", kernel_gemm_f32, METH_VARARGS, gemm_f32_doc},
    {"kernel_rms_norm", kernel_rms_norm, METH_VARARGS, rms_norm_doc},
    {"kernel_silu_mul", kernel_silu_mul, METH_VARARGS, silu_mul_doc},
    {"kernel_softmax", kernel_softmax, METH_VARARGS, softmax_doc},
    {"kernel_widen", kernel_widen, METH_VARARGS, widen_doc},
    {"kernel_narrow", kernel_narrow, METH_VARARGS, narrow_doc},
    {"kernel_kv", kernel_kv, METH_VARARGS, kv_doc},
    {NULL, NULL, 0, NULL},
};
