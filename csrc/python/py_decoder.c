/* SPDX-License-Identifier: Apache-2.0 */
/* The KVCache and DecoderLayer types. */
#include "python/py_decoder.h"

#include <math.h>
#include <stddef.h>
#include <sys/types.h>
#include <unistd.h>

#include "python/py_rotation.h"

/* ---- KVCache ---------------------------------------------------------------------------- */

typedef struct {
    PyObject_HEAD sq_kv_cache_t *cache; /* owned */
    PyThread_type_lock lock;            /* held by the call that uses cache */
    pid_t process;                      /* the one that the lock was last seen free in */
    void *workspace;                    /* owned: of the last forward(), for the next one */
    size_t workspace_bytes;
} KVCache;

PyDoc_STRVAR(
    cache_doc,
    "KVCache(layers, sequences, kv_heads, head_dim, capacity, bits=32, hadamard=True, limit=0)\n"
    "--\n\n"
    "Keys and values of every layer: at most capacity positions for each of the sequences.\n\n"
    "bits: 32, 16 (floats; the latter clamped to finite values), 8 or 4 (codes without sign, with "
    "a\n    float16 scale and minimum per token and head).\n"
    "hadamard: with 8 and 4 bits queries and keys take a Hadamard after the rotary embedding.\n"
    "limit: bytes of pages that may be held, 0 for no limit.\n\n"
    "A page is page_tokens positions of one sequence in one layer. It is taken, as zeros, when a\n"
    "position is first written, and given back by release(); nbytes counts the pages in memory: "
    "those of\nsequences and at most as many free ones. May be shared between threads: calls that "
    "use one cache\nwait for each other, whatever their layers are. In a forked child, a "
    "RuntimeError where a "
    "call used\nthe cache at the fork.\n"
    "ValueError names a size that is out of range; MemoryError if there is not enough.");

/* 0, or -1 with RuntimeError. A child process inherits the lock: where it is taken, the thread that
 * would give it back exists in the parent alone, and what that thread wrote is half done. */
static int
cache_lock(KVCache *self)
{
    const pid_t process = getpid();
    if (!PyThread_acquire_lock(self->lock, NOWAIT_LOCK)) {
        if (self->process != process) {
            PyErr_SetString(PyExc_RuntimeError,
                            "cache: expected one that no call used when this process was forked");
            return -1;
        }
        Py_BEGIN_ALLOW_THREADS;
        PyThread_acquire_lock(self->lock, WAIT_LOCK);
        Py_END_ALLOW_THREADS;
    }
    self->process = process;
    return 0;
}

static void
cache_unlock(const KVCache *self)
{
    PyThread_release_lock(self->lock);
}

static void
drop_workspace(KVCache *self)
{
    free(self->workspace);
    self->workspace = NULL;
    self->workspace_bytes = 0;
}

/* With the lock held: workspace of at least `bytes`, kept because a fresh one costs page faults in
 * every layer of every step. 0, or -1 with MemoryError. */
static int
cache_workspace(KVCache *self, size_t bytes)
{
    if (bytes > self->workspace_bytes) {
        drop_workspace(self);
        self->workspace = sq_alloc(bytes);
        self->workspace_bytes = self->workspace ? bytes : 0;
    }
    if (!self->workspace) {
        PyErr_NoMemory();
        return -1;
    }
    return 0;
}

/* 0, or -1 with ValueError. */
static int
check_sizes(const long long sizes[5], const char *const *names, int bits, long long limit)
{
    for (int i = 4; i >= 0; i--) {
        if (sizes[i] < 1) {
            PyErr_Format(PyExc_ValueError, "%s: expected at least 1, got %lld", names[i], sizes[i]);
            return -1;
        }
    }
    if (bits != 4 && bits != 8 && bits != 16 && bits != 32) {
        PyErr_Format(PyExc_ValueError, "bits: expected 4, 8, 16 or 32, got %d", bits);
        return -1;
    }
    if (limit < 0) {
        PyErr_Format(PyExc_ValueError, "limit: expected at least 0, got %lld", limit);
        return -1;
    }
    return 0;
}

static PyObject *
cache_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"layers", "sequences", "kv_heads", "head_dim", "capacity",
                            "bits",   "hadamard",  "limit",    NULL};
    long long sizes[5], limit = 0;
    int bits = 32, hadamard = 1;
    PyObject *module = PyType_GetModule(type);
    if (!module ||
        !PyArg_ParseTupleAndKeywords(args, kwargs, "LLLLL|ipL:KVCache", names, &sizes[0], &sizes[1],
                                     &sizes[2], &sizes[3], &sizes[4], &bits, &hadamard, &limit)) {
        return NULL;
    }
    if (check_sizes(sizes, (const char *const *)names, bits, limit)) {
        return NULL;
    }
    const struct sq_kv_shape shape = {.layers = sizes[0],
                                      .sequences = sizes[1],
                                      .kv_heads = sizes[2],
                                      .head_dim = sizes[3],
                                      .capacity = sizes[4],
                                      .limit_bytes = limit,
                                      .bits = bits,
                                      .hadamard = hadamard};
    KVCache *self = (KVCache *)type->tp_alloc(type, 0);
    if (!self) {
        return NULL;
    }
    self->lock = PyThread_allocate_lock();
    self->process = getpid();
    const sq_status status = self->lock ? sq_kv_cache_create(&shape, &self->cache) : SQ_ERR_NOMEM;
    if (status == SQ_OK) {
        return (PyObject *)self;
    }
    Py_DECREF(self);
    if (status == SQ_ERR_RANGE) {
        return PyErr_Format(PyExc_ValueError,
                            "expected at most 2^31 - 1 sequences, 2^31 positions and a head_dim of "
                            "2^24, got %lld, %lld and %lld",
                            sizes[1], sizes[4], sizes[3]);
    }
    return status == SQ_ERR_NOMEM ? PyErr_NoMemory() : sq_py_raise(module, status, "KVCache");
}

static void
cache_dealloc(PyObject *object)
{
    KVCache *self = (KVCache *)object;
    PyTypeObject *type = Py_TYPE(object);
    sq_kv_cache_destroy(self->cache);
    drop_workspace(self);
    if (self->lock) {
        PyThread_free_lock(self->lock);
    }
    type->tp_free(object);
    Py_DECREF(type);
}

static PyObject *
cache_repr(PyObject *object)
{
    const struct sq_kv_shape *s = sq_kv_cache_shape(((const KVCache *)object)->cache);
    return PyUnicode_FromFormat(
        "KVCache(layers=%lld, sequences=%lld, kv_heads=%lld, head_dim=%lld, capacity=%lld, "
        "bits=%d%s)",
        (long long)s->layers, (long long)s->sequences, (long long)s->kv_heads,
        (long long)s->head_dim, (long long)s->capacity, s->bits, s->hadamard ? ", hadamard" : "");
}

/* A field of struct sq_kv_shape, at the offset that the closure is. */
static PyObject *
cache_get_size(PyObject *object, void *closure)
{
    const struct sq_kv_shape *s = sq_kv_cache_shape(((const KVCache *)object)->cache);
    return PyLong_FromLongLong(
        *(const int64_t *)(const void *)((const char *)s + (intptr_t)closure));
}

static PyObject *
cache_get_bits(PyObject *object, void *Py_UNUSED(closure))
{
    return PyLong_FromLong(sq_kv_cache_shape(((const KVCache *)object)->cache)->bits);
}

static PyObject *
cache_get_hadamard(PyObject *object, void *Py_UNUSED(closure))
{
    return PyBool_FromLong(sq_kv_cache_shape(((const KVCache *)object)->cache)->hadamard);
}

static PyObject *
cache_get_nbytes(PyObject *object, void *Py_UNUSED(closure))
{
    return PyLong_FromLongLong(sq_kv_cache_bytes(((const KVCache *)object)->cache));
}

static PyObject *
cache_get_page_bytes(PyObject *object, void *Py_UNUSED(closure))
{
    return PyLong_FromLongLong(sq_kv_cache_page_bytes(((const KVCache *)object)->cache));
}

static PyObject *
cache_get_page_tokens(PyObject *Py_UNUSED(object), void *Py_UNUSED(closure))
{
    return PyLong_FromLong(SQ_PAGE_TOKENS);
}

#define SIZE_OF(field) (void *)(intptr_t)offsetof(struct sq_kv_shape, field)
static PyGetSetDef cache_attributes[] = {
    {"layers", cache_get_size, NULL, "number of layers", SIZE_OF(layers)},
    {"sequences", cache_get_size, NULL, "number of sequences", SIZE_OF(sequences)},
    {"kv_heads", cache_get_size, NULL, "key and value heads", SIZE_OF(kv_heads)},
    {"head_dim", cache_get_size, NULL, "width of a head", SIZE_OF(head_dim)},
    {"capacity", cache_get_size, NULL, "positions per sequence", SIZE_OF(capacity)},
    {"limit", cache_get_size, NULL, "bytes of pages that may be held, 0: any",
     SIZE_OF(limit_bytes)},
    {"bits", cache_get_bits, NULL, "32, 16, 8 or 4", NULL},
    {"hadamard", cache_get_hadamard, NULL, "whether queries and keys are rotated", NULL},
    {"nbytes", cache_get_nbytes, NULL, "bytes of the pages in memory", NULL},
    {"page_bytes", cache_get_page_bytes, NULL, "bytes of one page", NULL},
    {"page_tokens", cache_get_page_tokens, NULL, "positions of one page", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

/* ---- the tokens of a call --------------------------------------------------------------- */

/* Copies, as the arrays may change while the GIL is free. */
struct tokens {
    int64_t m, length; /* length: one more than the largest position */
    int32_t *sequence; /* owned */
    int64_t *position; /* owned */
};

/* o as an int64 array [m] with entries in 0 .. limit - 1; m < 0: of any length. */
static PyArrayObject *
index_array(PyObject *o, int64_t m, int64_t limit, const char *name)
{
    PyArrayObject *array = sq_py_array(o, NPY_INT64, 1, name);
    if (!array || (m >= 0 && sq_py_check_dim(array, 0, m, name))) {
        Py_XDECREF(array);
        return NULL;
    }
    const int64_t *p = PyArray_DATA(array);
    for (int64_t i = 0; i < PyArray_DIM(array, 0); i++) {
        if (p[i] < 0 || p[i] >= limit) {
            PyErr_Format(PyExc_ValueError, "%s[%lld]: expected 0 to %lld, got %lld", name,
                         (long long)i, (long long)limit - 1, (long long)p[i]);
            Py_DECREF(array);
            return NULL;
        }
    }
    return array;
}

/* 0, or -1 with an exception that names the argument. */
static int
parse_tokens(const KVCache *self, PyObject *sequence_object, PyObject *position_object, int64_t m,
             struct tokens *tokens)
{
    const struct sq_kv_shape *shape = sq_kv_cache_shape(self->cache);
    PyArrayObject *position = NULL;
    PyArrayObject *sequence = index_array(sequence_object, m, shape->sequences, "sequence");
    int result = -1;
    *tokens = (struct tokens){.m = sequence ? PyArray_DIM(sequence, 0) : 0};
    position =
        sequence ? index_array(position_object, tokens->m, shape->capacity, "position") : NULL;
    if (!position) {
        goto done;
    }
    tokens->sequence = sq_alloc((size_t)tokens->m * sizeof *tokens->sequence);
    tokens->position = sq_alloc((size_t)tokens->m * sizeof *tokens->position);
    if (!tokens->sequence || !tokens->position) {
        PyErr_NoMemory();
        goto done;
    }
    for (int64_t t = 0; t < tokens->m; t++) {
        tokens->sequence[t] = (int32_t)((const int64_t *)PyArray_DATA(sequence))[t];
        tokens->position[t] = ((const int64_t *)PyArray_DATA(position))[t];
        tokens->length = sq_max_i64(tokens->length, tokens->position[t] + 1);
    }
    result = 0;
done:
    Py_XDECREF(sequence);
    Py_XDECREF(position);
    return result;
}

static void
free_tokens(struct tokens *tokens)
{
    free(tokens->sequence);
    free(tokens->position);
}

/* The exception of a status that a cache gave; returns NULL. */
static PyObject *
raise_cache(PyObject *module, const KVCache *self, sq_status status, const char *context)
{
    const long long limit = sq_kv_cache_shape(self->cache)->limit_bytes;
    if (status == SQ_ERR_NOMEM && limit) {
        return PyErr_Format(PyExc_MemoryError,
                            "limit: expected room for more pages of %lld bytes, found %lld of %lld "
                            "bytes taken",
                            (long long)sq_kv_cache_page_bytes(self->cache),
                            (long long)sq_kv_cache_bytes(self->cache), limit);
    }
    return sq_py_raise(module, status, context);
}

/* ---- KVCache: methods ------------------------------------------------------------------- */

PyDoc_STRVAR(
    reserve_doc,
    "reserve($self, /, sequence, position)\n--\n\n"
    "Take the pages that tokens at (sequence[t], position[t]) need, in all layers.\n\n"
    "forward() takes those of its layer by itself; after reserve() it cannot fail for want "
    "of them.\nValueError names what is out of range; MemoryError at the limit: nothing is "
    "taken then.");

static PyObject *
cache_reserve(PyObject *object, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"sequence", "position", NULL};
    KVCache *self = (KVCache *)object;
    PyObject *module = PyType_GetModule(Py_TYPE(object)), *sequence, *position;
    struct tokens tokens;
    if (!module ||
        !PyArg_ParseTupleAndKeywords(args, kwargs, "OO:reserve", names, &sequence, &position)) {
        return NULL;
    }
    if (parse_tokens(self, sequence, position, -1, &tokens) || cache_lock(self)) {
        free_tokens(&tokens);
        return NULL;
    }
    sq_status status;
    SQ_BEGIN_NOGIL(SQ_GIL_THRESHOLD)
    status = sq_kv_cache_reserve(self->cache, 0, sq_kv_cache_shape(self->cache)->layers,
                                 tokens.sequence, tokens.position, tokens.m);
    SQ_END_NOGIL;
    cache_unlock(self);
    free_tokens(&tokens);
    return status == SQ_OK ? Py_NewRef(Py_None) : raise_cache(module, self, status, "reserve");
}

PyDoc_STRVAR(release_doc,
             "release($self, sequence, /)\n--\n\n"
             "Give the pages of a sequence back, in all layers; its positions hold zeros again.\n\n"
             "ValueError when there is no such sequence.");

static PyObject *
cache_release(PyObject *object, PyObject *arg)
{
    KVCache *self = (KVCache *)object;
    const long long sequences = sq_kv_cache_shape(self->cache)->sequences;
    const long long sequence = PyLong_AsLongLong(arg);
    if (sequence == -1 && PyErr_Occurred()) {
        return NULL;
    }
    if (sequence < 0 || sequence >= sequences) {
        return PyErr_Format(PyExc_ValueError, "sequence: expected 0 to %lld, got %lld",
                            sequences - 1, sequence);
    }
    if (cache_lock(self)) {
        return NULL;
    }
    const sq_status status = sq_kv_cache_release(self->cache, sequence);
    if (sq_kv_cache_bytes(self->cache) == 0) { /* nothing is being decoded */
        drop_workspace(self);
    }
    cache_unlock(self);
    if (status != SQ_OK) {
        return sq_py_raise(PyType_GetModule(Py_TYPE(object)), status, "release");
    }
    Py_RETURN_NONE;
}

PyDoc_STRVAR(read_doc,
             "read($self, /, layer, sequence, count)\n--\n\n"
             "Positions 0 to count - 1 of a sequence as a layer's attention sees them: keys (after "
             "the rotary\nembedding and the Hadamard) and values, float32 [count, kv_heads, "
             "head_dim] each.\n\n"
             "ValueError names what is out of range.");

static PyObject *
cache_read(PyObject *object, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"layer", "sequence", "count", NULL};
    KVCache *self = (KVCache *)object;
    const struct sq_kv_shape *shape = sq_kv_cache_shape(self->cache);
    const long long most[3] = {shape->layers - 1, shape->sequences - 1, shape->capacity};
    long long found[3];
    PyObject *result = NULL;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "LLL:read", names, &found[0], &found[1],
                                     &found[2])) {
        return NULL;
    }
    for (int i = 0; i < 3; i++) {
        if (found[i] < 0 || found[i] > most[i]) {
            return PyErr_Format(PyExc_ValueError, "%s: expected 0 to %lld, got %lld", names[i],
                                most[i], found[i]);
        }
    }
    const npy_intp dims[3] = {found[2], shape->kv_heads, shape->head_dim};
    PyArrayObject *keys = sq_py_empty(3, dims, NPY_FLOAT);
    PyArrayObject *values = keys ? sq_py_empty(3, dims, NPY_FLOAT) : NULL;
    if (!values || cache_lock(self)) {
        goto done;
    }
    sq_status status;
    SQ_BEGIN_NOGIL(PyArray_SIZE(keys))
    status = sq_kv_cache_read(self->cache, found[0], found[1], found[2], PyArray_DATA(keys),
                              PyArray_DATA(values));
    SQ_END_NOGIL;
    cache_unlock(self);
    if (status != SQ_OK) {
        sq_py_raise(PyType_GetModule(Py_TYPE(object)), status, "read");
        goto done;
    }
    result = PyTuple_Pack(2, keys, values);
done:
    Py_XDECREF(keys);
    Py_XDECREF(values);
    return result;
}

static PyMethodDef cache_methods[] = {
    {"reserve", (PyCFunction)(void (*)(void))cache_reserve, METH_VARARGS | METH_KEYWORDS,
     reserve_doc},
    {"release", cache_release, METH_O, release_doc},
    {"read", (PyCFunction)(void (*)(void))cache_read, METH_VARARGS | METH_KEYWORDS, read_doc},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot cache_slots[] = {
    {Py_tp_new, cache_new},
    {Py_tp_dealloc, cache_dealloc},
    {Py_tp_repr, cache_repr},
    {Py_tp_getset, cache_attributes},
    {Py_tp_methods, cache_methods},
    {Py_tp_doc, (void *)cache_doc},
    {0, NULL},
};

static PyType_Spec cache_spec = {.name = "singlequant._C.KVCache",
                                 .basicsize = sizeof(KVCache),
                                 .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
                                 .slots = cache_slots};

/* ---- DecoderLayer ----------------------------------------------------------------------- */

typedef struct {
    PyObject_HEAD struct sq_architecture architecture;
    struct sq_layer layer;
    PyObject *owned; /* list of the arrays and weights that the structs point into */
} DecoderLayer;

static const char *const linear_names[SQ_N_LINEARS] = {"q", "k", "v", "o", "gate", "up", "down"};
static const char *const site_names[SQ_N_SITES] = {"qkv", "o", "gate_up", "down"};

/* Keeps array (stolen) alive as long as self; its data, or NULL with an exception. */
static void *
keep(DecoderLayer *self, PyArrayObject *array)
{
    if (!array) {
        return NULL;
    }
    const int failed = PyList_Append(self->owned, (PyObject *)array);
    Py_DECREF(array); /* the list holds it */
    return failed ? NULL : PyArray_DATA(array);
}

/* A vector [n] of float32, kept. */
static const float *
parse_vector(DecoderLayer *self, PyObject *o, int64_t n, const char *name)
{
    PyArrayObject *array = sq_py_array(o, NPY_FLOAT, 1, name);
    if (array && sq_py_check_dim(array, 0, n, name)) {
        Py_CLEAR(array);
    }
    return keep(self, array);
}

/* ---- architecture ----------------------------------------------------------------------- */

enum {
    KEY_HIDDEN,
    KEY_INTERMEDIATE,
    KEY_HEADS,
    KEY_KV_HEADS,
    KEY_HEAD_DIM,
    KEY_SLIDING_WINDOW,
    N_INTEGER_KEYS,
    KEY_RMS_EPS = N_INTEGER_KEYS,
    KEY_ROPE_SCALE,
    N_NUMBER_KEYS,
    KEY_INV_FREQ = N_NUMBER_KEYS,
    N_KEYS
};

static const char *const keys[N_KEYS] = {"hidden",   "intermediate", "heads",
                                         "kv_heads", "head_dim",     "sliding_window",
                                         "rms_eps",  "rope_scale",   "inv_freq"};

/* The values, borrowed, in the order of keys. 0, or -1 with ValueError or TypeError. */
static int
parse_keys(PyObject *dict, PyObject *values[N_KEYS])
{
    if (!PyDict_Check(dict)) {
        PyErr_Format(PyExc_TypeError, "architecture: expected a dict, got %s",
                     Py_TYPE(dict)->tp_name);
        return -1;
    }
    for (int i = 0; i < N_KEYS; i++) {
        values[i] = PyDict_GetItemString(dict, keys[i]);
        if (!values[i]) {
            PyErr_Format(PyExc_ValueError, "architecture: '%s' is missing", keys[i]);
            return -1;
        }
    }
    if (PyDict_Size(dict) != N_KEYS) {
        PyErr_Format(PyExc_ValueError, "architecture: expected %d keys, got %zd: %R", N_KEYS,
                     PyDict_Size(dict), dict);
        return -1;
    }
    return 0;
}

static int
check_architecture(const struct sq_architecture *a)
{
    if (a->heads * a->head_dim > SQ_WIDTH_MAX) {
        PyErr_Format(PyExc_ValueError,
                     "architecture: expected heads * head_dim of at most %lld, got %lld * %lld",
                     (long long)SQ_WIDTH_MAX, (long long)a->heads, (long long)a->head_dim);
        return -1;
    }
    if (a->head_dim % 2) {
        PyErr_Format(PyExc_ValueError, "architecture: expected an even head_dim, got %lld",
                     (long long)a->head_dim);
        return -1;
    }
    if (a->heads % a->kv_heads) {
        PyErr_Format(PyExc_ValueError,
                     "architecture: expected heads to be a multiple of kv_heads, got %lld and %lld",
                     (long long)a->heads, (long long)a->kv_heads);
        return -1;
    }
    return 0;
}

static int
parse_values(DecoderLayer *self, PyObject *dict)
{
    PyObject *values[N_KEYS];
    struct sq_architecture *a = &self->architecture;
    int64_t *const integers[N_INTEGER_KEYS] = {&a->hidden,   &a->intermediate, &a->heads,
                                               &a->kv_heads, &a->head_dim,     &a->sliding_window};
    const int64_t most[N_INTEGER_KEYS] = {SQ_WIDTH_MAX, SQ_WIDTH_MAX, SQ_HEADS_MAX,
                                          SQ_HEADS_MAX, SQ_WIDTH_MAX, INT32_MAX};
    float *const numbers[] = {&a->rms_eps, &a->rope_scale};
    if (parse_keys(dict, values)) {
        return -1;
    }
    for (int i = 0; i < N_NUMBER_KEYS; i++) {
        if (i >= N_INTEGER_KEYS) {
            const double value = PyFloat_AsDouble(values[i]);
            if (value == -1 && PyErr_Occurred()) {
                return -1;
            }
            if (!(value >= 0 && value < (double)INFINITY)) {
                PyErr_Format(PyExc_ValueError, "architecture: %s: expected at least 0, got %R",
                             keys[i], values[i]);
                return -1;
            }
            *numbers[i - N_INTEGER_KEYS] = (float)value;
            continue;
        }
        *integers[i] = PyLong_AsLongLong(values[i]);
        if (*integers[i] == -1 && PyErr_Occurred()) {
            return -1;
        }
        const int least = i == KEY_SLIDING_WINDOW ? 0 : 1;
        if (*integers[i] < least || *integers[i] > most[i]) {
            PyErr_Format(PyExc_ValueError, "architecture: %s: expected %d to %lld, got %R", keys[i],
                         least, (long long)most[i], values[i]);
            return -1;
        }
    }
    if (check_architecture(a)) {
        return -1;
    }
    a->inv_freq = parse_vector(self, values[KEY_INV_FREQ], a->head_dim / 2, "inv_freq");
    return a->inv_freq ? 0 : -1;
}

/* A copy of dict holds its values while __index__ and __float__ run code that may change dict. */
static int
parse_architecture(DecoderLayer *self, PyObject *dict)
{
    PyObject *copy = PyDict_Check(dict) ? PyDict_Copy(dict) : Py_NewRef(dict);
    const int result = copy ? parse_values(self, copy) : -1;
    Py_XDECREF(copy);
    return result;
}

/* ---- linears ---------------------------------------------------------------------------- */

static int
check_shape(int64_t n, int64_t k, int64_t found_n, int64_t found_k, const char *name)
{
    if (n == found_n && k == found_k) {
        return 0;
    }
    PyErr_Format(PyExc_ValueError, "%s weight: expected (n, k) = (%lld, %lld), got (%lld, %lld)",
                 name, (long long)n, (long long)k, (long long)found_n, (long long)found_k);
    return -1;
}

static int
parse_weight(DecoderLayer *self, PyObject *module, PyObject *o, struct sq_linear *l,
             const char *name)
{
    const struct sq_module_state *state = PyModule_GetState(module);
    int64_t n, k, g;
    if (state->packed_type && PyObject_TypeCheck(o, state->packed_type)) {
        l->packed = sq_py_packed(module, o, name);
        if (!l->packed || PyList_Append(self->owned, o)) {
            return -1;
        }
        sq_packed_shape(l->packed, &n, &k, &g);
        return check_shape(l->n, l->k, n, k, name);
    }
    PyArrayObject *array = sq_py_dense(o, 2, name, &l->dtype);
    if (!array) {
        return -1;
    }
    n = PyArray_DIM(array, 0);
    k = PyArray_DIM(array, 1);
    l->dense = keep(self, array);
    return l->dense ? check_shape(l->n, l->k, n, k, name) : -1;
}

static int
parse_linears(DecoderLayer *self, PyObject *module, PyObject *linears)
{
    const struct sq_architecture *a = &self->architecture;
    const int64_t q = a->heads * a->head_dim, kv = a->kv_heads * a->head_dim, h = a->hidden;
    const int64_t n[SQ_N_LINEARS] = {q, kv, kv, h, a->intermediate, a->intermediate, h};
    const int64_t k[SQ_N_LINEARS] = {h, h, h, q, h, h, a->intermediate};
    PyObject *list = PySequence_Tuple(linears);
    int result = -1;
    if (!list) {
        return -1;
    }
    if (PyTuple_GET_SIZE(list) != SQ_N_LINEARS) {
        PyErr_Format(PyExc_ValueError, "linears: expected %d (q, k, v, o, gate, up, down), got %zd",
                     SQ_N_LINEARS, PyTuple_GET_SIZE(list));
        goto done;
    }
    for (int i = 0; i < SQ_N_LINEARS; i++) {
        struct sq_linear *l = &self->layer.linears[i];
        PyObject *entry = PyTuple_GET_ITEM(list, i);
        l->n = n[i];
        l->k = k[i];
        if (!PyTuple_Check(entry) || PyTuple_GET_SIZE(entry) != 2) {
            PyErr_Format(PyExc_TypeError, "%s: expected (weight, bias or None), got %s",
                         linear_names[i], Py_TYPE(entry)->tp_name);
            goto done;
        }
        if (parse_weight(self, module, PyTuple_GET_ITEM(entry, 0), l, linear_names[i])) {
            goto done;
        }
        if (PyTuple_GET_ITEM(entry, 1) != Py_None &&
            !(l->bias = parse_vector(self, PyTuple_GET_ITEM(entry, 1), n[i], linear_names[i]))) {
            goto done;
        }
    }
    result = 0;
done:
    Py_DECREF(list);
    return result;
}

/* ---- sites ------------------------------------------------------------------------------ */

/* (left, right, bits, clip), new reference, from a tuple or a dict with these keys. */
static PyObject *
site_tuple(PyObject *o, const char *name)
{
    static const char *const names[3] = {"rotation", "bits", "clip"};
    if (!PyDict_Check(o)) {
        return PySequence_Tuple(o);
    }
    PyObject *tuple = PyTuple_New(3);
    for (int i = 0; tuple && i < 3; i++) {
        PyObject *value = PyDict_GetItemString(o, names[i]);
        if (!value) {
            PyErr_Format(PyExc_ValueError, "site %s: '%s' is missing", name, names[i]);
            Py_CLEAR(tuple);
            break;
        }
        Py_INCREF(value);
        PyTuple_SET_ITEM(tuple, i, value);
    }
    return tuple;
}

static int
parse_site(DecoderLayer *self, PyObject *module, int site, PyObject *o, int64_t k)
{
    struct sq_site *s = &self->layer.sites[site];
    const struct sq_rotation *rotation;
    PyObject *rotation_object;
    s->bits = 16;
    s->clip = 1;
    if (o == Py_None) {
        return 0;
    }
    PyObject *tuple = site_tuple(o, site_names[site]);
    if (!tuple) {
        return -1;
    }
    int result = -1;
    if (!PyArg_ParseTuple(tuple, "Oif;site: expected (rotation, bits, clip)", &rotation_object,
                          &s->bits, &s->clip)) {
        goto done;
    }
    if (s->bits != 4 && s->bits != 8 && s->bits != 16) {
        PyErr_Format(PyExc_ValueError, "site %s: bits: expected 4, 8 or 16, got %d",
                     site_names[site], s->bits);
        goto done;
    }
    if (!(s->clip > 0 && s->clip <= 1)) {
        PyErr_Format(PyExc_ValueError, "site %s: clip: expected more than 0 and at most 1, got %R",
                     site_names[site], PyTuple_GET_ITEM(tuple, 2));
        goto done;
    }
    char name[16];
    PyOS_snprintf(name, sizeof name, "site %s", site_names[site]);
    rotation = sq_py_rotation(module, rotation_object, k, name);
    if (rotation && PyList_Append(self->owned, rotation_object) == 0) { /* keeps its arrays */
        s->rotation = *rotation;
        result = 0;
    }
done:
    Py_DECREF(tuple);
    return result;
}

/* The packed linears of a site share their codes: 0 if they agree on which inputs have 8 bits. */
static int
check_high(const DecoderLayer *self, int site)
{
    long long high = -1;
    for (int i = sq_site_first[site]; i < sq_site_first[site + 1]; i++) {
        const sq_packed_t *packed = self->layer.linears[i].packed;
        const long long own = packed ? sq_packed_int8_inputs(packed) : high;
        if (own > 0 && self->layer.sites[site].bits != 4) {
            PyErr_Format(PyExc_ValueError,
                         "site %s: bits: expected 4, as linear %s has high inputs, got %d",
                         site_names[site], linear_names[i], self->layer.sites[site].bits);
            return -1;
        }
        if (high >= 0 && own != high) {
            PyErr_Format(PyExc_ValueError,
                         "site %s: expected high = %lld as the linears before, got %lld in %s",
                         site_names[site], high, own, linear_names[i]);
            return -1;
        }
        high = own;
    }
    return 0;
}

static int
parse_sites(DecoderLayer *self, PyObject *module, PyObject *sites)
{
    PyObject *list = PySequence_Tuple(sites);
    if (!list) {
        return -1;
    }
    int result = 0;
    if (PyTuple_GET_SIZE(list) != SQ_N_SITES) {
        PyErr_Format(PyExc_ValueError, "sites: expected %d (qkv, o, gate_up, down), got %zd",
                     SQ_N_SITES, PyTuple_GET_SIZE(list));
        result = -1;
    }
    for (int i = 0; i < SQ_N_SITES && !result; i++) {
        result = parse_site(self, module, i, PyTuple_GET_ITEM(list, i),
                            self->layer.linears[sq_site_first[i]].k);
        if (!result) {
            result = check_high(self, i);
        }
    }
    Py_DECREF(list);
    return result;
}

/* ---- DecoderLayer: the type ------------------------------------------------------------- */

PyDoc_STRVAR(
    layer_doc,
    "DecoderLayer(architecture, norms, linears, sites)\n--\n\n"
    "One LLaMA-like decoder layer, ready to run.\n\n"
    "architecture: dict of hidden, intermediate, heads, kv_heads, head_dim, rms_eps,\n"
    "    sliding_window (0: none), inv_freq [head_dim / 2] and rope_scale (multiplies cos and "
    "sin).\n"
    "norms: (attention, mlp), [hidden] each.\n"
    "linears: q, k, v, o, gate, up, down, each (weight, bias or None); a weight is a "
    "PackedWeight or\n    an array [n, k] of float32, float16 or bfloat16, which is kept and "
    "read in place.\n"
    "sites: qkv, o, gate_up, down, each None or (rotation, bits, clip), or a dict of these: "
    "the\n    Rotation (or None) of the input of packed linears, and the bits (4, 8, 16) and clip "
    "of their\n    activations. Dense linears read the input as it is.\n\n"
    "ValueError and TypeError name what disagrees. May be shared between threads.");

static PyObject *
layer_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"architecture", "norms", "linears", "sites", NULL};
    PyObject *architecture, *norms_object, *linears, *sites;
    PyObject *module = PyType_GetModule(type);
    if (!module || !PyArg_ParseTupleAndKeywords(args, kwargs, "OOOO:DecoderLayer", names,
                                                &architecture, &norms_object, &linears, &sites)) {
        return NULL;
    }
    PyObject *norms = PySequence_Tuple(norms_object); /* owned: keeps the two alive */
    if (!norms) {
        return NULL;
    }
    if (PyTuple_GET_SIZE(norms) != 2) {
        PyErr_Format(PyExc_ValueError, "norms: expected 2 (attention, mlp), got %zd",
                     PyTuple_GET_SIZE(norms));
        Py_DECREF(norms);
        return NULL;
    }
    DecoderLayer *self = (DecoderLayer *)type->tp_alloc(type, 0); /* zeroed */
    if (!self) {
        Py_DECREF(norms);
        return NULL;
    }
    self->owned = PyList_New(0);
    struct sq_layer *layer = &self->layer;
    const struct sq_architecture *a = &self->architecture;
    if (!self->owned || parse_architecture(self, architecture) ||
        !(layer->norm_attention =
              parse_vector(self, PyTuple_GET_ITEM(norms, 0), a->hidden, "norms[0]")) ||
        !(layer->norm_mlp =
              parse_vector(self, PyTuple_GET_ITEM(norms, 1), a->hidden, "norms[1]")) ||
        parse_linears(self, module, linears) || parse_sites(self, module, sites)) {
        Py_CLEAR(self);
    }
    Py_DECREF(norms);
    return (PyObject *)self;
}

static void
layer_dealloc(PyObject *object)
{
    DecoderLayer *self = (DecoderLayer *)object;
    PyTypeObject *type = Py_TYPE(object);
    Py_XDECREF(self->owned);
    type->tp_free(object);
    Py_DECREF(type);
}

static PyObject *
layer_repr(PyObject *object)
{
    const DecoderLayer *self = (const DecoderLayer *)object;
    const struct sq_architecture *a = &self->architecture;
    int packed = 0;
    for (int i = 0; i < SQ_N_LINEARS; i++) {
        packed += self->layer.linears[i].packed != NULL;
    }
    return PyUnicode_FromFormat(
        "DecoderLayer(hidden=%lld, intermediate=%lld, heads=%lld, kv_heads=%lld, %d of %d packed)",
        (long long)a->hidden, (long long)a->intermediate, (long long)a->heads,
        (long long)a->kv_heads, packed, SQ_N_LINEARS);
}

/* ---- forward ---------------------------------------------------------------------------- */

/* Positions by which the workspace grows: not with each token. */
enum { WORKSPACE_STEP = 256 };
_Static_assert(((int64_t)1 << 31) % WORKSPACE_STEP == 0, "a cache's capacity, rounded up, is one");

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
    return a;
}

static int
check_cache(const struct sq_architecture *a, const struct sq_kv_shape *cache, long long layer)
{
    if (cache->kv_heads != a->kv_heads || cache->head_dim != a->head_dim) {
        PyErr_Format(PyExc_ValueError,
                     "cache: expected (kv_heads, head_dim) = (%lld, %lld), got (%lld, %lld)",
                     (long long)a->kv_heads, (long long)a->head_dim, (long long)cache->kv_heads,
                     (long long)cache->head_dim);
        return -1;
    }
    if (layer < 0 || layer >= cache->layers) {
        PyErr_Format(PyExc_ValueError, "layer: expected 0 to %lld, got %lld",
                     (long long)cache->layers - 1, layer);
        return -1;
    }
    return 0;
}

/* New tuple of the arrays that receive the sites' inputs. */
static PyObject *
new_record(const struct sq_layer *layer, int64_t m, struct sq_record *record)
{
    PyObject *tuple = PyTuple_New(SQ_N_SITES);
    for (int i = 0; tuple && i < SQ_N_SITES; i++) {
        const npy_intp dims[2] = {m, layer->linears[sq_site_first[i]].k};
        PyArrayObject *array = sq_py_empty(2, dims, NPY_FLOAT);
        if (!array) {
            Py_CLEAR(tuple);
            break;
        }
        record->inputs[i] = PyArray_DATA(array);
        PyTuple_SET_ITEM(tuple, i, (PyObject *)array);
    }
    return tuple;
}

PyDoc_STRVAR(
    forward_doc,
    "forward($self, /, hidden, sequence, position, cache, layer, record=False)\n--\n\n"
    "Update hidden [m, h] float32 IN PLACE by this layer (the one function here that writes "
    "its input).\n\n"
    "Token t belongs to sequence[t] and stands at position[t]; its key and value are stored "
    "in cache at\nlayer, and it attends to positions 0 to position[t] (the last "
    "sliding_window of them) of its\nsequence. (sequence, position) must differ from token "
    "to token. With record, returns the four\nsites' inputs [m, k] (qkv, o, gate_up, down) "
    "before any rotation, otherwise None.\n\n"
    "ValueError if hidden is not C-contiguous and writable, or a shape, sequence or position "
    "does not fit;\nTypeError if hidden is not float32; MemoryError at the cache's limit, with "
    "nothing updated. After\nanother error hidden and cache may be partly updated.");

static PyObject *
layer_forward(PyObject *object, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"hidden", "sequence", "position", "cache", "layer", "record", NULL};
    DecoderLayer *self = (DecoderLayer *)object;
    const struct sq_architecture *a = &self->architecture;
    PyObject *module = PyType_GetModule(Py_TYPE(object));
    const struct sq_module_state *state = module ? PyModule_GetState(module) : NULL;
    PyObject *hidden_object, *sequence_object, *position_object, *cache_object;
    PyObject *recorded = NULL, *result = NULL;
    struct sq_record record = {{NULL}};
    struct tokens tokens;
    long long layer;
    int wants_record = 0;
    if (!state || !PyArg_ParseTupleAndKeywords(
                      args, kwargs, "OOOO!L|p:forward", names, &hidden_object, &sequence_object,
                      &position_object, state->cache_type, &cache_object, &layer, &wants_record)) {
        return NULL;
    }
    KVCache *cache = (KVCache *)cache_object;
    PyArrayObject *hidden = writable_hidden(hidden_object, a->hidden);
    if (!hidden || check_cache(a, sq_kv_cache_shape(cache->cache), layer)) {
        return NULL;
    }
    const int64_t m = PyArray_DIM(hidden, 0);
    if (m > SQ_TOKENS_MAX) {
        return PyErr_Format(PyExc_ValueError, "hidden: expected at most %lld tokens, got %lld",
                            (long long)SQ_TOKENS_MAX, (long long)m);
    }
    if (parse_tokens(cache, sequence_object, position_object, m, &tokens)) {
        goto done;
    }
    if (wants_record && !(recorded = new_record(&self->layer, m, &record))) {
        goto done;
    }
    if (cache_lock(cache)) {
        goto done;
    }
    sq_status status;
    const int64_t length = sq_round_up(tokens.length, WORKSPACE_STEP);
    if (cache_workspace(cache, sq_layer_workspace_bytes(a, &self->layer, m, length))) {
        cache_unlock(cache);
        goto done;
    }
    SQ_BEGIN_NOGIL(SQ_GIL_THRESHOLD) /* a layer is always work enough */
    status = sq_layer_forward(a, &self->layer, cache->cache, layer, tokens.sequence,
                              tokens.position, m, PyArray_DATA(hidden), &record, cache->workspace);
    SQ_END_NOGIL;
    cache_unlock(cache);
    if (status != SQ_OK) {
        raise_cache(module, cache, status, "forward");
        goto done;
    }
    result = recorded ? recorded : Py_None;
    Py_INCREF(result);
done:
    free_tokens(&tokens);
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

int
sq_py_add_runtime_types(PyObject *module)
{
    struct sq_module_state *state = PyModule_GetState(module);
    state->cache_type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &cache_spec, NULL);
    if (!state->cache_type || PyModule_AddType(module, state->cache_type)) {
        return -1;
    }
    state->layer_type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &layer_spec, NULL);
    if (!state->layer_type || PyModule_AddType(module, state->layer_type)) {
        return -1;
    }
    return 0;
}
