/* SPDX-License-Identifier: Apache-2.0 */
/* The DecoderLayer type, and Decoder: layers that run one after the other in one call. */
#include "python/py_layer.h"

#include "core/sq_internal.h"
#include "python/py_cache.h"

/* Positions by which the workspace grows: not with each token. */
enum { WORKSPACE_STEP = 256 };
_Static_assert(((int64_t)1 << 31) % WORKSPACE_STEP == 0, "a cache's capacity, rounded up, is one");

/* ---- DecoderLayer ----------------------------------------------------------------------- */

PyDoc_STRVAR(
    layer_doc,
    "DecoderLayer(hidden, sites, attention, mlp, norms, parallel=False, residual_scale=1.0)\n"
    "--\n\n"
    "One decoder layer, proved once and ready to run.\n\n"
    "hidden: channels of the residual stream.\n"
    "sites: dict name -> (k, rotation or None, bits, clip). A site is one value that linears read, "
    "of k\n    channels. Packed linears read it rotated, in 4, 8 or 16 bits, its largest absolute "
    "value times\n    clip (more than 0, at most 1) being the largest code. The rotation is "
    "a Rotation of\n    k inputs.\n"
    "attention: dict of heads, kv_heads, head_dim, window (positions that a token sees, 0: all "
    "before it),\n    scale (of the scores), rotary (inv_freq [dim / 2], scale) or None, where "
    "channels from dim on\n    stay as they are, the linears q, k, v, o, and optionally q_norm "
    "and k_norm, of each head.\n"
    "mlp: dict of activation ('silu', 'gelu', 'gelu_tanh', 'relu', 'relu2': max(x, 0)^2) and the "
    "linears\n    gate (None: the activation is of up), up, down.\n"
    "norms: dict of before_attention, after_attention, before_mlp, after_mlp: those that exist.\n"
    "parallel: attention and MLP read the same x; without before_mlp both read "
    "before_attention(x).\n"
    "residual_scale: multiplies what attention and the MLP add.\n\n"
    "A linear is (site, weight, bias or None): the weight a PackedWeight or an array [n, k] of "
    "float32,\nfloat16 or bfloat16, which is kept and read in place. Dense linears read a site as "
    "it is. A norm is\n(kind, eps, offset, weight, bias or None) with kind 'rms' or 'layer'; it "
    "multiplies by offset + weight.\n\n"
    "ValueError and TypeError name the entry, the expected and the found. May be shared between "
    "threads.");

static PyObject *
layer_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"hidden", "sites",    "attention",      "mlp",
                            "norms",  "parallel", "residual_scale", NULL};
    struct sq_py_blocks_of_layer blocks;
    long long hidden;
    int parallel = 0;
    float residual_scale = 1.0f;
    PyObject *module = PyType_GetModule(type);
    if (!module || !PyArg_ParseTupleAndKeywords(
                       args, kwargs, "LOOOO|pf:DecoderLayer", names, &hidden, &blocks.sites,
                       &blocks.attention, &blocks.mlp, &blocks.norms, &parallel, &residual_scale)) {
        return NULL;
    }
    DecoderLayer *self = (DecoderLayer *)type->tp_alloc(type, 0); /* zeroed */
    if (!self) {
        return NULL;
    }
    self->layer.hidden = hidden;
    self->layer.parallel = parallel;
    self->layer.residual_scale = residual_scale;
    self->owned = PyList_New(0);
    if (!self->owned || sq_py_parse_layer(self, module, &blocks)) {
        Py_CLEAR(self);
    }
    return (PyObject *)self;
}

static void
layer_dealloc(PyObject *object)
{
    DecoderLayer *self = (DecoderLayer *)object;
    PyTypeObject *type = Py_TYPE(object);
    PyMem_Free(self->sites);
    Py_XDECREF(self->names);
    Py_XDECREF(self->owned);
    type->tp_free(object);
    Py_DECREF(type);
}

static PyObject *
layer_repr(PyObject *object)
{
    const DecoderLayer *self = (const DecoderLayer *)object;
    const struct sq_layer *l = &self->layer;
    return PyUnicode_FromFormat(
        "DecoderLayer(hidden=%lld, intermediate=%lld, heads=%lld, kv_heads=%lld, %d of %d packed)",
        (long long)l->hidden, (long long)l->mlp.up.n, (long long)l->attention.heads,
        (long long)l->attention.kv_heads, self->packed, self->linears);
}

/* ---- one call over layers --------------------------------------------------------------- */

/* Layers that run on the same tokens, layer i with layer first + i of the cache. */
struct run {
    PyObject *const *layers; /* borrowed, [count], of DecoderLayer */
    Py_ssize_t count;
    KVCache *cache;
    int64_t first;
    float *const *record; /* of the one layer's sites, or NULL */
};

static const struct sq_layer *
layer_of(const struct run *run, Py_ssize_t i)
{
    return &((const DecoderLayer *)run->layers[i])->layer;
}

/* hidden is written in place, so nothing but the very array will do. Borrowed, or NULL. */
static PyArrayObject *
writable_hidden(PyObject *o, int64_t width)
{
    if (!PyArray_Check(o) || PyArray_TYPE((PyArrayObject *)o) != NPY_FLOAT) {
        PyErr_SetString(PyExc_TypeError,
                        "hidden: expected a float32 array, which is updated in place");
        return NULL;
    }
    PyArrayObject *a = (PyArrayObject *)o;
    if (PyArray_NDIM(a) != 2) {
        PyErr_Format(PyExc_ValueError, "hidden: expected 2 dimensions, got %d", PyArray_NDIM(a));
        return NULL;
    }
    if (sq_py_check_dim(a, 1, width, "hidden")) {
        return NULL;
    }
    if (!PyArray_ISCARRAY(a)) { /* contiguous, aligned, writable, native */
        PyErr_SetString(PyExc_ValueError,
                        "hidden: expected a C-contiguous, writable, native array, which is updated "
                        "in place");
        return NULL;
    }
    if (PyArray_DIM(a, 0) > SQ_TOKENS_MAX) {
        PyErr_Format(PyExc_ValueError, "hidden: expected at most %lld tokens, got %lld",
                     (long long)SQ_TOKENS_MAX, (long long)PyArray_DIM(a, 0));
        return NULL;
    }
    return a;
}

/* 0 if keys and values of the layer fit the cache, otherwise -1 and ValueError. */
static int
check_cache(const struct sq_layer *layer, const KVCache *cache)
{
    const struct sq_attention *a = &layer->attention;
    const struct sq_kv_shape *shape = sq_kv_cache_shape(cache->cache);
    if (shape->kv_heads == a->kv_heads && shape->head_dim == a->head_dim) {
        return 0;
    }
    PyErr_Format(PyExc_ValueError,
                 "cache: expected (kv_heads, head_dim) = (%lld, %lld), got (%lld, %lld)",
                 (long long)a->kv_heads, (long long)a->head_dim, (long long)shape->kv_heads,
                 (long long)shape->head_dim);
    return -1;
}

static size_t
workspace_bytes(const struct run *run, int64_t m, int64_t length)
{
    size_t most = 0;
    for (Py_ssize_t i = 0; i < run->count; i++) {
        const size_t bytes = sq_layer_workspace_bytes(layer_of(run, i), m, length);
        most = bytes > most ? bytes : most;
    }
    return most;
}

/* Without the GIL. Pages of all the layers, or of none, and then the layers. */
static sq_status
run_layers(const struct run *run, struct sq_pass *pass)
{
    const struct sq_tokens *t = &pass->tokens;
    SQ_TRY(sq_kv_cache_reserve(pass->cache, run->first, run->first + run->count, t->sequence,
                               t->position, t->m));
    for (Py_ssize_t i = 0; i < run->count; i++) {
        SQ_TRY(sq_layer_forward(layer_of(run, i), pass, run->first + i, run->record));
    }
    return SQ_OK;
}

/* hidden was checked, and the layers against the cache. 0, or -1 with an exception. */
static int
forward(const struct run *run, PyObject *module, PyArrayObject *hidden, PyObject *sequence,
        PyObject *position)
{
    const int64_t m = PyArray_DIM(hidden, 0);
    KVCache *cache = run->cache;
    struct sq_py_tokens tokens;
    int result = -1;
    if (sq_py_tokens(cache, sequence, position, m, &tokens) || sq_py_cache_lock(cache)) {
        goto done;
    }
    const int64_t length = sq_round_up(tokens.length, WORKSPACE_STEP);
    if (sq_py_cache_workspace(cache, workspace_bytes(run, m, length))) {
        sq_py_cache_unlock(cache);
        goto done;
    }
    struct sq_pass pass = {.tokens = {.m = m,
                                      .length = tokens.length,
                                      .sequence = tokens.sequence,
                                      .position = tokens.position},
                           .cache = cache->cache,
                           .hidden = PyArray_DATA(hidden),
                           .workspace = cache->workspace};
    sq_status status;
    SQ_BEGIN_NOGIL(SQ_GIL_THRESHOLD) /* a layer is always work enough */
    status = run_layers(run, &pass);
    SQ_END_NOGIL;
    sq_py_cache_unlock(cache);
    if (status == SQ_OK) {
        result = 0;
    }
    else {
        sq_py_cache_raise(module, cache, status, "forward");
    }
done:
    sq_py_tokens_clear(&tokens);
    return result;
}

/* ---- DecoderLayer.forward --------------------------------------------------------------- */

/* New dict of the arrays that receive the sites' inputs, whose data goes to inputs [n_sites]. */
static PyObject *
new_record(const DecoderLayer *self, int64_t m, float **inputs)
{
    PyObject *dict = PyDict_New();
    for (int i = 0; dict && i < self->layer.n_sites; i++) {
        const npy_intp dims[2] = {m, self->sites[i].k};
        PyArrayObject *array = sq_py_empty(2, dims, NPY_FLOAT);
        if (!array || PyDict_SetItem(dict, PyTuple_GET_ITEM(self->names, i), (PyObject *)array)) {
            Py_CLEAR(dict);
        }
        else {
            inputs[i] = PyArray_DATA(array);
        }
        Py_XDECREF(array); /* the dict holds it */
    }
    return dict;
}

PyDoc_STRVAR(
    forward_doc,
    "forward($self, /, hidden, sequence, position, cache, layer, record=False)\n--\n\n"
    "Update hidden [m, h] float32 IN PLACE by this layer (the one function here that writes "
    "its input).\n\n"
    "Token t belongs to sequence[t] and stands at position[t]; its key and value are stored "
    "in cache at\nlayer, and it attends to positions 0 to position[t] (the last "
    "`window` of them) of its\nsequence. (sequence, position) must differ from token "
    "to token. With record, returns a dict of each\nsite's input [m, k] before any rotation, in "
    "the order of the sites, otherwise None.\n\n"
    "ValueError if hidden is not C-contiguous and writable, or a shape, sequence or position "
    "does not fit;\nTypeError if hidden is not float32; MemoryError at the cache's limit, with "
    "nothing updated. After\nanother error hidden and cache may be partly updated.");

static PyObject *
layer_forward(PyObject *object, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"hidden", "sequence", "position", "cache", "layer", "record", NULL};
    const DecoderLayer *self = (const DecoderLayer *)object;
    PyObject *module = PyType_GetModule(Py_TYPE(object));
    const struct sq_module_state *state = module ? PyModule_GetState(module) : NULL;
    PyObject *hidden_object, *sequence, *position, *cache_object, *recorded = NULL, *result = NULL;
    float **inputs = NULL;
    long long index;
    int wants_record = 0;
    if (!state || !PyArg_ParseTupleAndKeywords(
                      args, kwargs, "OOOO!L|p:forward", names, &hidden_object, &sequence, &position,
                      state->cache_type, &cache_object, &index, &wants_record)) {
        return NULL;
    }
    KVCache *cache = (KVCache *)cache_object;
    PyArrayObject *hidden = writable_hidden(hidden_object, self->layer.hidden);
    if (!hidden || check_cache(&self->layer, cache)) {
        return NULL;
    }
    const int64_t layers = sq_kv_cache_shape(cache->cache)->layers;
    if (index < 0 || index >= layers) {
        return PyErr_Format(PyExc_ValueError, "layer: expected 0 to %lld, got %lld",
                            (long long)layers - 1, index);
    }
    if (wants_record) {
        inputs = PyMem_Calloc((size_t)self->layer.n_sites, sizeof *inputs);
        recorded = inputs ? new_record(self, PyArray_DIM(hidden, 0), inputs) : PyErr_NoMemory();
        if (!recorded) {
            goto done;
        }
    }
    const struct run run = {
        .layers = &object, .count = 1, .cache = cache, .first = index, .record = inputs};
    if (!forward(&run, module, hidden, sequence, position)) {
        result = Py_NewRef(recorded ? recorded : Py_None);
    }
done:
    PyMem_Free(inputs);
    Py_XDECREF(recorded);
    return result;
}

static PyMethodDef layer_methods[] = {
    {"forward", (PyCFunction)(void (*)(void))layer_forward, METH_VARARGS | METH_KEYWORDS,
     forward_doc},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot layer_slots[] = {
    {Py_tp_new, layer_new},         {Py_tp_dealloc, layer_dealloc}, {Py_tp_repr, layer_repr},
    {Py_tp_methods, layer_methods}, {Py_tp_doc, (void *)layer_doc}, {0, NULL},
};

static PyType_Spec layer_spec = {.name = "singlequant._C.DecoderLayer",
                                 .basicsize = sizeof(DecoderLayer),
                                 .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
                                 .slots = layer_slots};

/* ---- Decoder ---------------------------------------------------------------------------- */

typedef struct {
    PyObject_HEAD PyObject *layers; /* owned tuple of DecoderLayer, one at least */
} Decoder;

PyDoc_STRVAR(decoder_doc,
             "Decoder(layers)\n--\n\n"
             "DecoderLayers that run one after the other, in one call for all of them.\n\n"
             "They must agree on hidden, kv_heads and head_dim. ValueError names the layer that "
             "does not.\nMay be shared between threads.");

/* 0 if all layers have the first one's sizes, otherwise -1 with an exception. */
static int
check_layers(PyObject *layers, PyTypeObject *layer_type)
{
    if (PyTuple_GET_SIZE(layers) == 0) {
        PyErr_SetString(PyExc_ValueError, "layers: expected at least one, got none");
        return -1;
    }
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(layers); i++) {
        PyObject *o = PyTuple_GET_ITEM(layers, i);
        if (!PyObject_TypeCheck(o, layer_type)) {
            PyErr_Format(PyExc_TypeError, "layers[%zd]: expected a DecoderLayer, got %s", i,
                         Py_TYPE(o)->tp_name);
            return -1;
        }
        const struct sq_layer *first = &((DecoderLayer *)PyTuple_GET_ITEM(layers, 0))->layer;
        const struct sq_layer *own = &((DecoderLayer *)o)->layer;
        const struct sq_attention *a = &first->attention, *b = &own->attention;
        if (first->hidden != own->hidden || a->kv_heads != b->kv_heads ||
            a->head_dim != b->head_dim) {
            PyErr_Format(
                PyExc_ValueError,
                "layers[%zd]: expected (hidden, kv_heads, head_dim) = (%lld, %lld, %lld) as in the "
                "first, got (%lld, %lld, %lld)",
                i, (long long)first->hidden, (long long)a->kv_heads, (long long)a->head_dim,
                (long long)own->hidden, (long long)b->kv_heads, (long long)b->head_dim);
            return -1;
        }
    }
    return 0;
}

static PyObject *
decoder_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"layers", NULL};
    PyObject *object, *module = PyType_GetModule(type);
    const struct sq_module_state *state = module ? PyModule_GetState(module) : NULL;
    if (!state || !PyArg_ParseTupleAndKeywords(args, kwargs, "O:Decoder", names, &object)) {
        return NULL;
    }
    PyObject *layers = PySequence_Tuple(object);
    Decoder *self = layers && !check_layers(layers, state->layer_type)
                        ? (Decoder *)type->tp_alloc(type, 0)
                        : NULL;
    if (self) {
        self->layers = Py_NewRef(layers);
    }
    Py_XDECREF(layers);
    return (PyObject *)self;
}

static void
decoder_dealloc(PyObject *object)
{
    PyTypeObject *type = Py_TYPE(object);
    Py_XDECREF(((Decoder *)object)->layers);
    type->tp_free(object);
    Py_DECREF(type);
}

static PyObject *
decoder_repr(PyObject *object)
{
    PyObject *layers = ((Decoder *)object)->layers;
    return PyUnicode_FromFormat("Decoder(%zd x %R)", PyTuple_GET_SIZE(layers),
                                PyTuple_GET_ITEM(layers, 0));
}

PyDoc_STRVAR(
    decoder_forward_doc,
    "forward($self, /, hidden, sequence, position, cache)\n--\n\n"
    "Update hidden [m, h] float32 IN PLACE by all layers, layer i with layer i of the cache.\n\n"
    "The arguments are those of DecoderLayer.forward(). The pages of all layers are taken before "
    "anything\nis updated. MemoryError at the cache's limit: nothing is updated then. ValueError "
    "and TypeError as there.");

static PyObject *
decoder_forward(PyObject *object, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"hidden", "sequence", "position", "cache", NULL};
    PyObject *layers = ((Decoder *)object)->layers, *module = PyType_GetModule(Py_TYPE(object));
    const struct sq_module_state *state = module ? PyModule_GetState(module) : NULL;
    PyObject *hidden_object, *sequence, *position, *cache;
    if (!state || !PyArg_ParseTupleAndKeywords(args, kwargs, "OOOO!:forward", names, &hidden_object,
                                               &sequence, &position, state->cache_type, &cache)) {
        return NULL;
    }
    const struct run run = {.layers = PySequence_Fast_ITEMS(layers),
                            .count = PyTuple_GET_SIZE(layers),
                            .cache = (KVCache *)cache};
    const int64_t found = sq_kv_cache_shape(run.cache->cache)->layers;
    PyArrayObject *hidden = writable_hidden(hidden_object, layer_of(&run, 0)->hidden);
    if (!hidden || check_cache(layer_of(&run, 0), run.cache)) {
        return NULL;
    }
    if (found < run.count) {
        return PyErr_Format(PyExc_ValueError, "cache: expected at least %zd layers, got %lld",
                            run.count, (long long)found);
    }
    return forward(&run, module, hidden, sequence, position) ? NULL : Py_NewRef(Py_None);
}

static PyMethodDef decoder_methods[] = {
    {"forward", (PyCFunction)(void (*)(void))decoder_forward, METH_VARARGS | METH_KEYWORDS,
     decoder_forward_doc},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot decoder_slots[] = {
    {Py_tp_new, decoder_new},         {Py_tp_dealloc, decoder_dealloc}, {Py_tp_repr, decoder_repr},
    {Py_tp_methods, decoder_methods}, {Py_tp_doc, (void *)decoder_doc}, {0, NULL},
};

static PyType_Spec decoder_spec = {.name = "singlequant._C.Decoder",
                                   .basicsize = sizeof(Decoder),
                                   .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
                                   .slots = decoder_slots};

int
sq_py_add_runtime_types(PyObject *module)
{
    struct sq_module_state *state = PyModule_GetState(module);
    state->layer_type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &layer_spec, NULL);
    if (sq_py_add_cache_type(module) || !state->layer_type ||
        PyModule_AddType(module, state->layer_type)) {
        return -1;
    }
    PyObject *decoder = PyType_FromModuleAndSpec(module, &decoder_spec, NULL);
    const int failed = !decoder || PyModule_AddType(module, (PyTypeObject *)decoder);
    Py_XDECREF(decoder); /* the module holds it */
    return failed ? -1 : 0;
}
