/* SPDX-License-Identifier: Apache-2.0 */
/* A layer's MLP or experts from their dicts: types and lengths of arrays. sq_layer_seal checks all
 * that the block must agree on. */
#include "python/py_blocks.h"

#include "core/sq_internal.h"
#include "python/py_dense.h"
#include "python/py_fields.h"

/* ---- words ------------------------------------------------------------------------------ */

static const char *const activations[SQ_N_ACTIVATIONS] = {[SQ_SILU] = "silu",
                                                          [SQ_GELU] = "gelu",
                                                          [SQ_GELU_TANH] = "gelu_tanh",
                                                          [SQ_RELU] = "relu",
                                                          [SQ_RELU2] = "relu2",
                                                          [SQ_QUICK_GELU] = "quick_gelu",
                                                          [SQ_SWIGLU_CLAMPED] = "swiglu_clamped"};
static const char *const scorings[SQ_N_SCORINGS] = {[SQ_SCORING_SOFTMAX] = "softmax",
                                                    [SQ_SCORING_SIGMOID] = "sigmoid",
                                                    [SQ_SCORING_CHOSEN] = "chosen"};
static const char *const group_scores[SQ_N_GROUP_SCORES] = {
    [SQ_GROUP_MAX] = "max", [SQ_GROUP_TOP2] = "top2"};

/* Which of the words o is, or -1 and ValueError that lists them. */
static int
take_word(PyObject *o, const char *where, const char *key, const char *const *words, int count)
{
    char text[160] = "";
    size_t used = 0;
    for (int i = 0; i < count; i++) {
        if (PyUnicode_Check(o) && !PyUnicode_CompareWithASCIIString(o, words[i])) {
            return i;
        }
        const char *before = !i ? "" : i < count - 1 ? ", " : " or ";
        PyOS_snprintf(text + used, sizeof text - used, "%s'%s'", before, words[i]);
        used = strlen(text);
    }
    PyErr_Format(PyExc_ValueError, "%s: %s: expected %s, got %R", where, key, text, o);
    return -1;
}

static int
take_activation(PyObject *o, const char *where, enum sq_activation *activation)
{
    const int word = take_word(o, where, "activation", activations, SQ_N_ACTIVATIONS);
    *activation = word < 0 ? 0 : word;
    return word < 0 ? -1 : 0;
}

/* ---- MLPs ------------------------------------------------------------------------------- */

/* gate (None: not gated), up and down. */
static int
take_linears(DecoderLayer *self, PyObject *module, PyObject *const *roles, const char *where,
             struct sq_mlp *mlp)
{
    static const char *const names[3] = {"gate", "up", "down"};
    struct sq_linear *const linears[3] = {&mlp->gate, &mlp->up, &mlp->down};
    mlp->gated = roles[0] != Py_None;
    for (int i = !mlp->gated; i < 3; i++) {
        char name[SQ_PY_NAME_BYTES];
        PyOS_snprintf(name, sizeof name, "%s.%s", where, names[i]);
        if (sq_py_take_linear(self, module, roles[i], name, linears[i])) {
            return -1;
        }
    }
    return 0;
}

static int
take_mlp(DecoderLayer *self, PyObject *module, PyObject *dict, const char *where,
         struct sq_mlp *mlp)
{
    PyObject *activation, *roles[3];
    const struct sq_py_field fields[] = {
        {"activation", SQ_PY_OBJECT, 0, &activation}, {"limit", SQ_PY_NUMBER, 1, &mlp->limit},
        {"gate", SQ_PY_OBJECT, 0, &roles[0]},         {"up", SQ_PY_OBJECT, 0, &roles[1]},
        {"down", SQ_PY_OBJECT, 0, &roles[2]},
    };
    PyObject *copy = sq_py_fields(dict, where, fields, sizeof fields / sizeof *fields);
    const int failed = !copy || take_activation(activation, where, &mlp->activation) ||
                       take_linears(self, module, roles, where, mlp);
    Py_XDECREF(copy);
    return failed ? -1 : 0;
}

/* ---- experts ---------------------------------------------------------------------------- */

/* An array [rows, hidden] that is read in place. */
static const void *
take_dense(DecoderLayer *self, PyObject *o, int64_t rows, const char *name, sq_dtype *dtype)
{
    PyArrayObject *array = sq_py_dense(o, 2, name, dtype);
    if (array && (sq_py_check_dim(array, 0, rows, name) ||
                  sq_py_check_dim(array, 1, self->layer.hidden, name))) {
        Py_CLEAR(array);
    }
    return sq_py_keep(self, array);
}

/* A vector [n], or none. */
static int
take_optional(DecoderLayer *self, PyObject *o, int64_t n, const char *name, const float **out)
{
    if (o != Py_None) {
        *out = sq_py_take_vector(self, o, n, name, NULL);
    }
    return o == Py_None || *out ? 0 : -1;
}

/* The entries of an experts' dict that are objects. Borrowed from a copy of it. */
struct entries {
    PyObject *scoring, *group_score, *router, *router_bias, *correction;
    PyObject *activation, *each, *shared, *shared_gate;
};

static int
take_router(DecoderLayer *self, const struct entries *in, struct sq_router *r)
{
    const char *const where = "experts";
    if (r->count < 1 || r->count > SQ_EXPERTS_MAX) { /* before memory is asked for */
        PyErr_Format(PyExc_ValueError, "experts.count: expected 1 to %d, got %lld", SQ_EXPERTS_MAX,
                     (long long)r->count);
        return -1;
    }
    const int scoring = take_word(in->scoring, where, "scoring", scorings, SQ_N_SCORINGS);
    if (scoring < 0) {
        return -1;
    }
    r->scoring = scoring;
    if (in->group_score) {
        const int word =
            take_word(in->group_score, where, "group_score", group_scores, SQ_N_GROUP_SCORES);
        if (word < 0) {
            return -1;
        }
        r->group_score = word;
    }
    r->weight = take_dense(self, in->router, r->count, "experts.router", &r->dtype);
    return !r->weight ||
                   take_optional(self, in->router_bias, r->count, "experts.router_bias",
                                 &r->bias) ||
                   take_optional(self, in->correction, r->count, "experts.correction",
                                 &r->correction)
               ? -1
               : 0;
}

/* each: mlps [count], whose activation is there. */
static int
take_each(DecoderLayer *self, PyObject *module, PyObject *o, int64_t count, struct sq_mlp *mlps)
{
    int result = -1;
    if (!PyList_Check(o) && !PyTuple_Check(o)) {
        PyErr_Format(PyExc_TypeError, "experts.each: expected a list, got %s", Py_TYPE(o)->tp_name);
        return -1;
    }
    PyObject *each = PySequence_Tuple(o); /* parsing may run code that changes a list */
    if (!each) {
        return -1;
    }
    if (PyTuple_GET_SIZE(each) != count) {
        PyErr_Format(PyExc_ValueError, "experts.each: expected count = %lld experts, got %zd",
                     (long long)count, PyTuple_GET_SIZE(each));
        goto done;
    }
    for (Py_ssize_t i = 0; i < count; i++) {
        PyObject *one = PyTuple_GET_ITEM(each, i);
        char name[SQ_PY_NAME_BYTES];
        PyOS_snprintf(name, sizeof name, "experts.each[%zd]", i);
        if (sq_py_check_tuple(one, 3, name, "(gate or None, up, down)")) {
            goto done;
        }
        PyObject *const roles[3] = {PyTuple_GET_ITEM(one, 0), PyTuple_GET_ITEM(one, 1),
                                    PyTuple_GET_ITEM(one, 2)};
        mlps[i] = mlps[count];
        if (take_linears(self, module, roles, name, &mlps[i])) {
            goto done;
        }
    }
    result = 0;
done:
    Py_DECREF(each);
    return result;
}

/* The experts and what all tokens share. mlps is [count + 1]: its last is first what the experts
 * have in common, then the shared one. */
static int
take_mlps(DecoderLayer *self, PyObject *module, const struct entries *in, float limit)
{
    struct sq_experts *e = &self->layer.experts;
    const int64_t count = e->router.count;
    struct sq_mlp *mlps = PyMem_Calloc((size_t)count + 1, sizeof *mlps);
    self->mlps = mlps;
    if (!mlps) {
        PyErr_NoMemory();
        return -1;
    }
    e->each = mlps;
    mlps[count].limit = limit;
    if (take_activation(in->activation, "experts", &mlps[count].activation) ||
        take_each(self, module, in->each, count, mlps)) {
        return -1;
    }
    if (in->shared != Py_None) {
        mlps[count] = (struct sq_mlp){0};
        e->shared = &mlps[count];
        if (take_mlp(self, module, in->shared, "experts.shared", &mlps[count])) {
            return -1;
        }
    }
    if (in->shared_gate == Py_None) {
        return 0;
    }
    e->shared_gate = take_dense(self, in->shared_gate, 1, "experts.shared_gate", &e->gate_dtype);
    return e->shared_gate ? 0 : -1;
}

static int
take_experts(DecoderLayer *self, PyObject *module, PyObject *dict)
{
    struct sq_router *r = &self->layer.experts.router;
    struct entries in = {
        .router_bias = Py_None, .correction = Py_None, .shared = Py_None, .shared_gate = Py_None};
    int64_t normalize = 0;
    float limit = 0;
    const struct sq_py_field fields[] = {
        {"count", SQ_PY_INTEGER, 0, &r->count},
        {"chosen", SQ_PY_INTEGER, 0, &r->chosen},
        {"scoring", SQ_PY_OBJECT, 0, &in.scoring},
        {"normalize", SQ_PY_INTEGER, 1, &normalize},
        {"scale", SQ_PY_NUMBER, 1, &r->scale},
        {"groups", SQ_PY_INTEGER, 1, &r->groups},
        {"chosen_groups", SQ_PY_INTEGER, 1, &r->chosen_groups},
        {"group_score", SQ_PY_OBJECT, 1, &in.group_score},
        {"router", SQ_PY_OBJECT, 0, &in.router},
        {"router_bias", SQ_PY_OBJECT, 1, &in.router_bias},
        {"correction", SQ_PY_OBJECT, 1, &in.correction},
        {"activation", SQ_PY_OBJECT, 0, &in.activation},
        {"limit", SQ_PY_NUMBER, 1, &limit},
        {"each", SQ_PY_OBJECT, 0, &in.each},
        {"shared", SQ_PY_OBJECT, 1, &in.shared},
        {"shared_gate", SQ_PY_OBJECT, 1, &in.shared_gate},
    };
    r->scale = 1.0f;
    r->groups = r->chosen_groups = 1;
    PyObject *copy = sq_py_fields(dict, "experts", fields, sizeof fields / sizeof *fields);
    int failed = !copy;
    if (!failed && normalize != 0 && normalize != 1) {
        PyErr_Format(PyExc_ValueError, "experts: normalize: expected True or False, got %lld",
                     (long long)normalize);
        failed = 1;
    }
    r->normalize = (int)normalize;
    failed = failed || take_router(self, &in, r) || take_mlps(self, module, &in, limit);
    Py_XDECREF(copy);
    return failed ? -1 : 0;
}

int
sq_py_take_feed(DecoderLayer *self, PyObject *module, PyObject *mlp, PyObject *experts)
{
    if (experts == Py_None) {
        return take_mlp(self, module, mlp, "mlp", &self->layer.mlp);
    }
    if (mlp != Py_None) {
        PyErr_Format(PyExc_ValueError, "mlp: expected None, as there are experts, got %s",
                     Py_TYPE(mlp)->tp_name);
        return -1;
    }
    return take_experts(self, module, experts);
}

/* ---- the activation alone --------------------------------------------------------------- */

PyDoc_STRVAR(activate_doc,
             "activate(activation, gate, up, limit=0.0)\n--\n\n"
             "What the last linear of an MLP reads, float32 [m, n]: activation(gate) * up, or "
             "activation(up)\nwhere gate is None.\n\n"
             "activation and limit as in DecoderLayer; gate and up [m, n]. ValueError if the "
             "shapes differ, or for\na limit that the activation does not have.");

static PyObject *
activate(PyObject *Py_UNUSED(module), PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"activation", "gate", "up", "limit", NULL};
    PyObject *word, *gate_object, *up_object;
    PyArrayObject *gate = NULL, *up = NULL, *y = NULL;
    enum sq_activation activation;
    struct sq_fault fault;
    float limit = 0.0f;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOO|f:activate", names, &word, &gate_object,
                                     &up_object, &limit) ||
        take_activation(word, "activate", &activation)) {
        return NULL;
    }
    const int gated = gate_object != Py_None;
    if (sq_activation_check(activation, limit, gated, "activate", &fault) != SQ_OK) {
        PyErr_SetString(PyExc_ValueError, fault.text);
        return NULL;
    }
    up = sq_py_array(up_object, NPY_FLOAT, 2, "up");
    gate = up && gated ? sq_py_array(gate_object, NPY_FLOAT, 2, "gate") : NULL;
    if (!up || (gated && (!gate || sq_py_check_dim(gate, 0, PyArray_DIM(up, 0), "gate") ||
                          sq_py_check_dim(gate, 1, PyArray_DIM(up, 1), "gate")))) {
        goto done;
    }
    y = sq_py_empty(2, PyArray_DIMS(up), NPY_FLOAT);
    if (y) {
        sq_status status = SQ_OK;
        SQ_BEGIN_NOGIL(PyArray_SIZE(up))
        sq_activate(activation, limit, gate ? PyArray_DATA(gate) : NULL, PyArray_DATA(up),
                    PyArray_DIM(up, 0), PyArray_DIM(up, 1), PyArray_DATA(y));
        SQ_END_NOGIL;
        if (status != SQ_OK) {
            Py_CLEAR(y);
        }
    }
done:
    Py_XDECREF(gate);
    Py_XDECREF(up);
    return (PyObject *)y;
}

PyMethodDef sq_py_experts_methods[] = {
    SQ_METHOD(activate),
    {NULL, NULL, 0, NULL},
};
