/* SPDX-License-Identifier: Apache-2.0 */
/* The KVCache type, and the tokens of a call that uses one. */
#include "python/py_cache.h"

#include <stddef.h>
#include <unistd.h>

#include "core/sq_internal.h"

/* ---- KVCache ---------------------------------------------------------------------------- */

PyDoc_STRVAR(
    cache_doc,
    "KVCache(layers, sequences, kv_heads, head_dim, capacity, bits=32, hadamard=True, limit=0,\n"
    "        bfloat16=False)\n"
    "--\n\n"
    "Keys and values of every layer: at most capacity positions for each of the sequences.\n\n"
    "bits: 32, 16 (floats; the latter clamped to finite values), 8 or 4 (codes without sign, with "
    "a\n    float16 scale and minimum per token and head).\n"
    "hadamard: with 8 and 4 bits queries and keys take a Hadamard after the rotary embedding.\n"
    "limit: bytes of pages that may be held, 0 for no limit.\n"
    "bfloat16: in place of float16, for keys and values beyond 65504.\n\n"
    "largest is the largest magnitude that was stored, NaN left out. clamped counts the numbers "
    "that were\nbeyond what the cache can hold.\n\n"
    "A page is page_tokens positions of one sequence in one layer. It is taken, as zeros, when a\n"
    "position is first written, and given back by release(); nbytes counts the pages in memory: "
    "those of\nsequences and at most as many free ones. May be shared between threads: calls that "
    "use one cache\nwait for each other, whatever their layers are. In a forked child, a "
    "RuntimeError where a "
    "call used\nthe cache at the fork.\n"
    "ValueError names a size that is out of range; MemoryError if there is not enough.");

/* A child process inherits the lock: where it is taken, the thread that would give it back exists
 * in the parent alone, and what that thread wrote is half done. */
int
sq_py_cache_lock(KVCache *self)
{
    const pid_t process = getpid();
    if (!PyThread_acquire_lock(self->lock, NOWAIT_LOCK)) {
        if (self->process != process) {
            PyErr_SetString(PyExc_RuntimeError,
                            "cache: expected one that no call used when this process was forked");
            return -1;
        }
        if (self->holder == PyThread_get_thread_ident()) {
            PyErr_SetString(PyExc_RuntimeError,
                            "cache: expected one that no call uses, got that of the call that this "
                            "signal handler interrupts");
            return -1;
        }
        Py_BEGIN_ALLOW_THREADS;
        PyThread_acquire_lock(self->lock, WAIT_LOCK);
        Py_END_ALLOW_THREADS;
    }
    self->process = process;
    self->holder = PyThread_get_thread_ident();
    return 0;
}

void
sq_py_cache_unlock(KVCache *self)
{
    self->holder = 0; /* who takes the lock next says so only with the GIL */
    PyThread_release_lock(self->lock);
}

static void
drop_workspace(KVCache *self)
{
    free(self->workspace);
    self->workspace = NULL;
    self->workspace_bytes = 0;
}

/* Kept from call to call, because a fresh one costs page faults in every step. */
int
sq_py_cache_workspace(KVCache *self, size_t bytes)
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
                            "bits",   "hadamard",  "limit",    "bfloat16", NULL};
    long long sizes[5], limit = 0;
    int bits = 32, hadamard = 1, bfloat16 = 0;
    PyObject *module = PyType_GetModule(type);
    if (!module || !PyArg_ParseTupleAndKeywords(args, kwargs, "LLLLL|ipLp:KVCache", names,
                                                &sizes[0], &sizes[1], &sizes[2], &sizes[3],
                                                &sizes[4], &bits, &hadamard, &limit, &bfloat16)) {
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
                                      .hadamard = hadamard,
                                      .bfloat16 = bfloat16};
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
        "bits=%d%s%s)",
        (long long)s->layers, (long long)s->sequences, (long long)s->kv_heads,
        (long long)s->head_dim, (long long)s->capacity, s->bits, s->hadamard ? ", hadamard" : "",
        s->bfloat16 ? ", bfloat16" : "");
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
cache_get_bfloat16(PyObject *object, void *Py_UNUSED(closure))
{
    return PyBool_FromLong(sq_kv_cache_shape(((const KVCache *)object)->cache)->bfloat16);
}

static PyObject *
cache_get_largest(PyObject *object, void *Py_UNUSED(closure))
{
    return PyFloat_FromDouble((double)sq_kv_cache_largest(((const KVCache *)object)->cache));
}

static PyObject *
cache_get_clamped(PyObject *object, void *Py_UNUSED(closure))
{
    return PyLong_FromLongLong(sq_kv_cache_clamped(((const KVCache *)object)->cache));
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
    {"bfloat16", cache_get_bfloat16, NULL, "whether 16-bit floats are bfloat16", NULL},
    {"largest", cache_get_largest, NULL, "largest magnitude that was stored, NaN left out", NULL},
    {"clamped", cache_get_clamped, NULL, "how many numbers the cache could not hold", NULL},
    {"nbytes", cache_get_nbytes, NULL, "bytes of the pages in memory", NULL},
    {"page_bytes", cache_get_page_bytes, NULL, "bytes of one page", NULL},
    {"page_tokens", cache_get_page_tokens, NULL, "positions of one page", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

/* ---- the tokens of a call --------------------------------------------------------------- */

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

int
sq_py_tokens(const KVCache *self, PyObject *sequence_object, PyObject *position_object, int64_t m,
             struct sq_py_tokens *tokens)
{
    const struct sq_kv_shape *shape = sq_kv_cache_shape(self->cache);
    PyArrayObject *position = NULL;
    PyArrayObject *sequence = index_array(sequence_object, m, shape->sequences, "sequence");
    int result = -1;
    *tokens = (struct sq_py_tokens){.m = sequence ? PyArray_DIM(sequence, 0) : 0};
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

void
sq_py_tokens_clear(struct sq_py_tokens *tokens)
{
    free(tokens->sequence);
    free(tokens->position);
}

PyObject *
sq_py_cache_raise(PyObject *module, const KVCache *self, sq_status status, const char *context)
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
    struct sq_py_tokens tokens;
    if (!module ||
        !PyArg_ParseTupleAndKeywords(args, kwargs, "OO:reserve", names, &sequence, &position)) {
        return NULL;
    }
    if (sq_py_tokens(self, sequence, position, -1, &tokens) || sq_py_cache_lock(self)) {
        sq_py_tokens_clear(&tokens);
        return NULL;
    }
    sq_status status;
    SQ_BEGIN_NOGIL(SQ_GIL_THRESHOLD)
    status = sq_kv_cache_reserve(self->cache, 0, sq_kv_cache_shape(self->cache)->layers,
                                 tokens.sequence, tokens.position, tokens.m);
    SQ_END_NOGIL;
    sq_py_cache_unlock(self);
    sq_py_tokens_clear(&tokens);
    return status == SQ_OK ? Py_NewRef(Py_None)
                           : sq_py_cache_raise(module, self, status, "reserve");
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
    if (sq_py_cache_lock(self)) {
        return NULL;
    }
    const sq_status status = sq_kv_cache_release(self->cache, sequence);
    if (sq_kv_cache_bytes(self->cache) == 0) { /* nothing is being decoded */
        drop_workspace(self);
    }
    sq_py_cache_unlock(self);
    if (status != SQ_OK) {
        return sq_py_raise(PyType_GetModule(Py_TYPE(object)), status, "release");
    }
    Py_RETURN_NONE;
}

/* found <- a layer, a sequence and a position of the cache. 0, or -1 with an exception. */
static int
take_place(const KVCache *self, PyObject *args, PyObject *kwargs, const char *format, char **names,
           long long found[3])
{
    const struct sq_kv_shape *shape = sq_kv_cache_shape(self->cache);
    const long long most[3] = {shape->layers - 1, shape->sequences - 1, shape->capacity};
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, format, names, &found[0], &found[1],
                                     &found[2])) {
        return -1;
    }
    for (int i = 0; i < 3; i++) {
        if (found[i] < 0 || found[i] > most[i]) {
            PyErr_Format(PyExc_ValueError, "%s: expected 0 to %lld, got %lld", names[i], most[i],
                         found[i]);
            return -1;
        }
    }
    return 0;
}

PyDoc_STRVAR(forget_doc,
             "forget($self, /, layer, sequence, position)\n--\n\n"
             "Give the pages of a sequence back that end before a position, in one layer: no later "
             "token may see\nthem, as in a layer with a window. Their positions hold zeros "
             "again.\n\nValueError names what is out of range.");

static PyObject *
cache_forget(PyObject *object, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"layer", "sequence", "position", NULL};
    KVCache *self = (KVCache *)object;
    long long found[3];
    if (take_place(self, args, kwargs, "LLL:forget", names, found)) {
        return NULL;
    }
    if (sq_py_cache_lock(self)) {
        return NULL;
    }
    const sq_status status = sq_kv_cache_forget(self->cache, found[0], found[1], found[2]);
    sq_py_cache_unlock(self);
    if (status != SQ_OK) {
        return sq_py_raise(PyType_GetModule(Py_TYPE(object)), status, "forget");
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
    long long found[3];
    PyObject *result = NULL;
    if (take_place(self, args, kwargs, "LLL:read", names, found)) {
        return NULL;
    }
    const npy_intp dims[3] = {found[2], shape->kv_heads, shape->head_dim};
    PyArrayObject *keys = sq_py_empty(3, dims, NPY_FLOAT);
    PyArrayObject *values = keys ? sq_py_empty(3, dims, NPY_FLOAT) : NULL;
    if (!values || sq_py_cache_lock(self)) {
        goto done;
    }
    sq_status status;
    SQ_BEGIN_NOGIL(PyArray_SIZE(keys))
    status = sq_kv_cache_read(self->cache, found[0], found[1], found[2], PyArray_DATA(keys),
                              PyArray_DATA(values));
    SQ_END_NOGIL;
    sq_py_cache_unlock(self);
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
    {"forget", (PyCFunction)(void (*)(void))cache_forget, METH_VARARGS | METH_KEYWORDS, forget_doc},
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

int
sq_py_add_cache_type(PyObject *module)
{
    struct sq_module_state *state = PyModule_GetState(module);
    state->cache_type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &cache_spec, NULL);
    return state->cache_type ? PyModule_AddType(module, state->cache_type) : -1;
}
