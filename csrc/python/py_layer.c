/* SPDX-License-Identifier: Apache-2.0 */
/* The DecoderLayer type, and Decoder: layers that run one after the other in one call. */
#include "python/py_layer.h"

#include "core/sq_internal.h"
#include "core/sq_states.h"
#include "python/py_cache.h"

/* Positions by which the workspace grows: not with each token. */
enum { WORKSPACE_STEP = 256 };
_Static_assert(((int64_t)1 << 31) % WORKSPACE_STEP == 0, "a cache's capacity, rounded up, is one");

/* ---- DecoderLayer ----------------------------------------------------------------------- */

PyDoc_STRVAR(
    layer_doc,
    "DecoderLayer(hidden, sites, attention, mlp, norms, parallel=False, residual_scale=1.0, "
    "experts=None, norm_sums=False)\n"
    "--\n\n"
    "One decoder layer, proved once and ready to run.\n\n"
    "hidden: channels of the residual stream.\n"
    "sites: dict name -> (k, rotation or None, bits, clip). A site is one value that linears read, "
    "of k\n    channels. Packed linears read it rotated, in 4, 8 or 16 bits, its largest absolute "
    "value times\n    clip (more than 0, at most 1) being the largest code. The rotation is "
    "a Rotation of\n    k inputs.\n"
    "attention: dict of heads, kv_heads, head_dim, window (positions that a token sees, 0: all "
    "before it),\n    scale (of the scores), rotary (below) or None, the linears q, k, v, o, and "
    "optionally:\n    q_norm, k_norm: weight [head_dim] for all heads, [heads, head_dim] a row for "
    "each, or\n        [heads * head_dim] one norm of all of them;\n"
    "    qkv_clip: q, k and v are clamped to +-qkv_clip behind the norms (0: they are not);\n"
    "    softcap: scores become softcap tanh(scale q.k / softcap) (0: they do not);\n"
    "    slopes [heads]: scores get slope * (position of the key - that of the query);\n"
    "    slopes_bfloat16: they get scale * slope * position of the key instead, in bfloat16;\n"
    "    query_growth, query_original (1 or more): q is multiplied by 1 + query_growth ln(1 +\n"
    "        floor(position / query_original)) behind the rotary embedding (growth 0: it is not);\n"
    "    sinks [heads]: one more score in each softmax, whose value is 0.\n"
    "    In latent attention kv_a, kv_b and value_dim are in place of k and v, q_a and q_b may be "
    "in "
    "place of\n        q, and q_a_norm and kv_a_norm norm their inner vectors. kv_a gives [kv_rank "
    "+ "
    "rope], kv_b\n        [heads, nope + value_dim] from the first kv_rank of them, with rope = "
    "dim "
    "of the rotary and\n        nope = head_dim - rope. A key is a head's nope channels and the "
    "rope "
    "channels that all heads\n        share; those are turned. kv_heads is heads; o reads [heads * "
    "value_dim].\n"
    "rotary: dict of inv_freq [dim / 2] and optionally scale=1.0 (of cos and sin), "
    "interleaved=False (pairs\n    are channels i, i + dim / 2; if so, 2 i, 2 i + 1), and one of\n"
    "    long_inv_freq [dim / 2], original: the frequencies of a token whose sequence reaches a "
    "length\n        L > original in this call (L is one more than its largest position);\n"
    "    dynamic (s), theta, original: they are then theta'^(-2 i / dim), where theta' is\n"
    "        theta (s L / original - (s - 1))^(dim / (dim - 2)).\n"
    "    Channels of a head from dim on stay as they are, in latent attention those before the "
    "last "
    "dim.\n"
    "mlp: dict of activation ('silu', 'gelu', 'gelu_tanh', 'relu', 'relu2': max(x, 0)^2, "
    "'quick_gelu':\n    x sigmoid(1.702 x), or 'swiglu_clamped': (up + 1) gate sigmoid(1.702 "
    "gate) with gate at most\n    `limit` and up within +-limit), limit (0 for the others), "
    "and the linears gate (None: the\n    activation is of up), up, down. None where there are "
    "experts.\n"
    "norms: dict of before_attention, after_attention, before_mlp, after_mlp: those that exist.\n"
    "parallel: attention and MLP read the same x; without before_mlp both read "
    "before_attention(x).\n"
    "residual_scale: multiplies what attention and the MLP add.\n"
    "norm_sums: the norms after_attention and after_mlp are of the sum with the residual stream; "
    "not in a\n    parallel layer.\n"
    "experts: None, or dict of count, chosen, scoring ('softmax', 'sigmoid', or 'chosen': the "
    "softmax\n    of the chosen logits), normalize=False (divide by the sum of the chosen), "
    "scale=1.0, groups=1,\n    chosen_groups=1, group_score='max' (or 'top2', the sum of two), "
    "router [count, hidden],\n    router_bias=None, correction=None ([count], added for choosing "
    "only), activation, limit=0.0,\n    each: (gate, up, down) of each expert at sites of its own, "
    "shared=None (a dict as mlp, of all\n    tokens), shared_gate=None ([1, hidden]: its sigmoid "
    "multiplies the shared MLP). Equal scores: the\n    lower index.\n\n"
    "A linear is (site, weight, bias or None): the weight a PackedWeight or an array [n, k] of "
    "float32,\nfloat16 or bfloat16, which is kept and read in place. Dense linears read a site as "
    "it is. A norm is\n(kind, eps, offset, weight, bias or None) with kind 'rms' or 'layer'; it "
    "multiplies by offset + weight.\n\n"
    "ValueError and TypeError name the entry, the expected and the found. May be shared between "
    "threads.");

static PyObject *
layer_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"hidden",   "sites",          "attention", "mlp",       "norms",
                            "parallel", "residual_scale", "experts",   "norm_sums", NULL};
    struct sq_py_blocks_of_layer blocks = {.experts = Py_None};
    long long hidden;
    int parallel = 0, norm_sums = 0;
    float residual_scale = 1.0f;
    PyObject *module = PyType_GetModule(type);
    if (!module ||
        !PyArg_ParseTupleAndKeywords(args, kwargs, "LOOOO|pfOp:DecoderLayer", names, &hidden,
                                     &blocks.sites, &blocks.attention, &blocks.mlp, &blocks.norms,
                                     &parallel, &residual_scale, &blocks.experts, &norm_sums)) {
        return NULL;
    }
    DecoderLayer *self = (DecoderLayer *)type->tp_alloc(type, 0); /* zeroed */
    if (!self) {
        return NULL;
    }
    self->layer.hidden = hidden;
    self->layer.parallel = parallel;
    self->layer.residual_scale = residual_scale;
    self->layer.norm_sums = norm_sums;
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
    PyMem_Free(self->mlps);
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
    const struct sq_router *r = &l->experts.router;
    char experts[64] = "";
    if (r->count) {
        PyOS_snprintf(experts, sizeof experts, "experts=%d of %d, ", (int)r->chosen, (int)r->count);
    }
    return PyUnicode_FromFormat(
        "DecoderLayer(hidden=%lld, %sintermediate=%lld, heads=%lld, kv_heads=%lld, %d of %d "
        "packed)",
        (long long)l->hidden, experts,
        (long long)(r->count ? l->experts.each[0].up.n : l->mlp.up.n),
        (long long)l->attention.heads, (long long)l->attention.kv_heads, self->packed,
        self->linears);
}

/* ---- one call over layers --------------------------------------------------------------- */

/* Layers that run on the same tokens, layer i with layer first + i of the cache. */
struct run {
    PyObject *const *layers; /* borrowed, [count], of DecoderLayer */
    Py_ssize_t count;
    KVCache *cache;
    int64_t first;
    struct sq_record *record; /* of the one layer's sites, or NULL */
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

static void
free_rows(PyObject *capsule)
{
    sq_states_free(PyCapsule_GetPointer(capsule, NULL), (size_t)PyCapsule_GetContext(capsule));
}

/* New array of a record's rows [count][k], which it takes over. */
static PyObject *
take_record(struct sq_record *record, int64_t k)
{
    const npy_intp dims[2] = {record->count, k};
    if (!record->rows) {
        return (PyObject *)sq_py_empty(2, dims, NPY_FLOAT);
    }
    if (!record->mapped) {
        float *rows = realloc(record->rows, (size_t)(record->count * k) * sizeof *rows);
        record->rows = rows ? rows : record->rows; /* shrunk, if that was possible */
    }
    PyObject *owner = PyCapsule_New(record->rows, NULL, free_rows);
    if (!owner) {
        return NULL;
    }
    (void)PyCapsule_SetContext(owner, (void *)record->mapped); /* never fails for a capsule */
    float *rows = record->rows;
    record->rows = NULL; /* the capsule's */
    PyObject *array = PyArray_SimpleNewFromData(2, dims, NPY_FLOAT, rows);
    if (!array) {
        Py_DECREF(owner);
        return NULL;
    }
    if (PyArray_SetBaseObject((PyArrayObject *)array, owner)) { /* steals owner either way */
        Py_CLEAR(array);
    }
    return array;
}

/* New dict of the records [n_sites] by the names of their sites. */
static PyObject *
record_dict(const DecoderLayer *self, struct sq_record *records)
{
    PyObject *dict = PyDict_New();
    for (int i = 0; dict && i < self->layer.n_sites; i++) {
        PyObject *array = take_record(&records[i], self->sites[i].k);
        if (!array || PyDict_SetItem(dict, PyTuple_GET_ITEM(self->names, i), array)) {
            Py_CLEAR(dict);
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
    "the order of the sites, otherwise None. The input of an\nexpert's site has the rows of the "
    "tokens that were routed to it, in their order.\n\n"
    "ValueError if hidden is not C-contiguous and writable, or a shape, sequence or position "
    "does not fit;\nTypeError if hidden is not float32; MemoryError at the cache's limit, with "
    "nothing updated. After\nanother error, or a signal's handler that raises, hidden and cache "
    "may be partly updated.");

static PyObject *
layer_forward(PyObject *object, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"hidden", "sequence", "position", "cache", "layer", "record", NULL};
    const DecoderLayer *self = (const DecoderLayer *)object;
    PyObject *module = PyType_GetModule(Py_TYPE(object));
    const struct sq_module_state *state = module ? PyModule_GetState(module) : NULL;
    PyObject *hidden_object, *sequence, *position, *cache_object, *result = NULL;
    struct sq_record *records = NULL;
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
        records = PyMem_Calloc((size_t)self->layer.n_sites, sizeof *records);
        if (!records) {
            return PyErr_NoMemory();
        }
    }
    const struct run run = {
        .layers = &object, .count = 1, .cache = cache, .first = index, .record = records};
    if (!forward(&run, module, hidden, sequence, position)) {
        result = records ? record_dict(self, records) : Py_NewRef(Py_None);
    }
    for (int i = 0; records && i < self->layer.n_sites; i++) {
        sq_states_free(records[i].rows, records[i].mapped);
    }
    PyMem_Free(records);
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
