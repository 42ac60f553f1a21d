/* SPDX-License-Identifier: Apache-2.0 */
/* The extension module: method table, slots, module state, runtime switches. */
#define SQ_PY_MODULE
#include "python/py_args.h"

#include <stdatomic.h>
#include <stdlib.h>

#include "core/sq_blas.h"
#include "core/sq_cgroup.h"
#include "core/sq_cpu.h"
#include "core/sq_huge.h"
#include "kernels/sq_kernels.h"
#include "core/sq_threads.h"

/* Names of the features that a table requires and this machine lacks. */
static PyObject *
missing_features(const struct sq_kernels *table)
{
    PyObject *names = PyList_New(0);
    const uint32_t missing = sq_kernels_missing_features(table);
    for (int bit = 0; names && sq_cpu_feature_name(bit); bit++) {
        if (missing >> bit & 1) {
            PyObject *name = PyUnicode_FromString(sq_cpu_feature_name(bit));
            if (!name || PyList_Append(names, name)) {
                Py_CLEAR(names);
            }
            Py_XDECREF(name);
        }
    }
    return names;
}

/* {4: step, 8: step, 16: step}, None where the compiler chooses. */
static PyObject *
steps_of(const struct sq_kernels *table)
{
    return Py_BuildValue("{i:z,i:z,i:z}", 4, table->steps[0], 8, table->steps[1], 16,
                         table->steps[2]);
}

/* Enters one table into the lists and the dict that kernels() returns. 0, or -1. */
static int
enter_table(const struct sq_kernels *table, PyObject *compiled, PyObject *runnable,
            PyObject *missing, PyObject *disabled, PyObject *steps)
{
    PyObject *name = PyUnicode_FromString(table->name), *features = NULL;
    PyObject *own_steps = steps_of(table);
    int failed = !name || !own_steps || PyList_Append(compiled, name) ||
                 PyDict_SetItem(steps, name, own_steps);
    if (!failed && sq_kernels_runnable(table)) {
        failed = PyList_Append(runnable, name);
    }
    else if (!failed) {
        features = missing_features(table);
        failed = !features || PyDict_SetItem(missing, name, features);
    }
    if (!failed && sq_kernels_disabled(table)) {
        failed = PyList_Append(disabled, name);
    }
    Py_XDECREF(name);
    Py_XDECREF(features);
    Py_XDECREF(own_steps);
    return failed ? -1 : 0;
}

PyDoc_STRVAR(kernels_doc,
             "kernels()\n--\n\n"
             "Kernel tables as a dict: compiled (list of names, best first), runnable (list), "
             "missing (table "
             "that\ncannot run -> list of the CPU features it lacks), disabled (list: off through "
             "SINGLEQUANT_DISABLE_CPU,\nwith what is built on them), active, and steps: name -> "
             "{bits of the "
             "activations: multiply step of that\nkernel, a name for measure_peak, or None}.");

static PyObject *
kernels(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(args))
{
    PyObject *compiled = PyList_New(0), *runnable = PyList_New(0), *missing = PyDict_New();
    PyObject *disabled = PyList_New(0), *steps = PyDict_New(), *result = NULL;
    if (!compiled || !runnable || !missing || !disabled || !steps) {
        goto done;
    }
    for (const struct sq_kernels *const *t = sq_kernels_compiled(); *t; t++) {
        if (enter_table(*t, compiled, runnable, missing, disabled, steps)) {
            goto done;
        }
    }
    result = Py_BuildValue("{s:O,s:O,s:O,s:O,s:O,s:s}", "compiled", compiled, "runnable", runnable,
                           "missing", missing, "disabled", disabled, "steps", steps, "active",
                           sq_kernels_active()->name);
done:
    Py_XDECREF(compiled);
    Py_XDECREF(runnable);
    Py_XDECREF(missing);
    Py_XDECREF(disabled);
    Py_XDECREF(steps);
    return result;
}

PyDoc_STRVAR(use_kernels_doc,
             "use_kernels(name)\n--\n\n"
             "Switch the kernel table (for tests). ValueError if the name is unknown or cannot run "
             "here.\nPacked weights keep the table that made them.");

static PyObject *
use_kernels(PyObject *Py_UNUSED(module), PyObject *arg)
{
    const char *name = PyUnicode_AsUTF8(arg);
    if (!name) {
        return NULL;
    }
    if (sq_kernels_use(name)) {
        return PyErr_Format(PyExc_ValueError, "use_kernels: '%s' is unknown or cannot run here",
                            name);
    }
    Py_RETURN_NONE;
}

PyDoc_STRVAR(
    set_num_threads_doc,
    "set_num_threads(count)\n--\n\n"
    "Number of threads of the pool, 1 to 256. ValueError outside, RuntimeError in a signal "
    "handler that\ninterrupts a call.");

static PyObject *
set_num_threads(PyObject *Py_UNUSED(module), PyObject *arg)
{
    const long count = PyLong_AsLong(arg);
    if (count == -1 && PyErr_Occurred()) {
        return NULL;
    }
    if (count < 1 || count > SQ_THREADS_MAX) {
        return PyErr_Format(PyExc_ValueError, "num_threads: expected 1 to %d, got %ld",
                            SQ_THREADS_MAX, count);
    }
    int refused;
    Py_BEGIN_ALLOW_THREADS; /* waits for a running job */
    refused = sq_set_num_threads((int)count);
    Py_END_ALLOW_THREADS;
    if (refused) {
        PyErr_SetString(PyExc_RuntimeError,
                        "set_num_threads: expected no running call, got one that a signal handler "
                        "interrupts");
        return NULL;
    }
    Py_RETURN_NONE;
}

PyDoc_STRVAR(get_num_threads_doc, "get_num_threads()\n--\n\nNumber of threads of the pool.");

static PyObject *
get_num_threads(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(args))
{
    return PyLong_FromLong(sq_get_num_threads());
}

PyDoc_STRVAR(cgroup_cpus_doc,
             "cgroup_cpus(root)\n--\n\n"
             "CPUs that the quotas of this process' cgroups amount to, rounded up, or 0 without "
             "one. root\nstands before every path that is read (for tests); '' reads the "
             "machine's own.");

static PyObject *
cgroup_cpus(PyObject *Py_UNUSED(module), PyObject *arg)
{
    PyObject *root = NULL;
    if (!PyUnicode_FSConverter(arg, &root)) {
        return NULL;
    }
    const int cpus = sq_cgroup_cpus(PyBytes_AS_STRING(root));
    Py_DECREF(root);
    return PyLong_FromLong(cpus);
}

PyDoc_STRVAR(blas_info_doc, "blas_info()\n--\n\nOpenBLAS version, target and build options.");

static PyObject *
blas_info(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(args))
{
    return PyUnicode_FromString(sq_blas_info());
}

static PyMethodDef module_methods[] = {
    {"kernels", kernels, METH_NOARGS, kernels_doc},
    {"use_kernels", use_kernels, METH_O, use_kernels_doc},
    {"set_num_threads", set_num_threads, METH_O, set_num_threads_doc},
    {"get_num_threads", get_num_threads, METH_NOARGS, get_num_threads_doc},
    {"cgroup_cpus", cgroup_cpus, METH_O, cgroup_cpus_doc},
    {"blas_info", blas_info, METH_NOARGS, blas_info_doc},
    {NULL, NULL, 0, NULL},
};

/* SINGLEQUANT_NUM_THREADS, or one per CPU that this process may use. 0, or -1 with ImportError. */
static int
threads_from_environment(void)
{
    const char *text = getenv("SINGLEQUANT_NUM_THREADS");
    if (!text || !*text) {
        sq_set_num_threads(sq_available_cpus());
        return 0;
    }
    char *end;
    const long count = strtol(text, &end, 10);
    if (*end || count < 1 || count > SQ_THREADS_MAX) {
        PyErr_Format(PyExc_ImportError, "SINGLEQUANT_NUM_THREADS: expected 1 to %d, got '%s'",
                     SQ_THREADS_MAX, text);
        return -1;
    }
    sq_set_num_threads((int)count);
    return 0;
}

/* Once per process: the tables and the pool are global. 0, or -1 with ImportError. */
static int
init_process(void)
{
    static atomic_flag entered = ATOMIC_FLAG_INIT;
    if (atomic_flag_test_and_set(&entered)) {
        return 0;
    }
    const char *disabled = getenv("SINGLEQUANT_DISABLE_CPU");
    if (sq_kernels_init(disabled)) {
        atomic_flag_clear(&entered);
        PyErr_Format(PyExc_ImportError,
                     "SINGLEQUANT_DISABLE_CPU: unknown name in '%s' (see "
                     "singlequant.show_runtime())",
                     disabled);
        return -1;
    }
    if (threads_from_environment()) {
        atomic_flag_clear(&entered);
        return -1;
    }
    sq_threads_init();
    sq_huge_init();
    sq_blas_init();
    return 0;
}

/* The core's constants that Python needs. */
static int
add_constants(PyObject *module)
{
    static const struct {
        const char *name;
        long value;
    } constants[] = {{"FACTOR_DENSE_MAX", SQ_FACTOR_DENSE_MAX},
                     {"INT8_STEP", SQ_K_ALIGN},
                     {"DENSE_FEW", SQ_DENSE_FEW},
                     {"PACKED_K_MAX_W8", SQ_PACKED_K_MAX_W8},
                     {"PAGE_TOKENS", SQ_PAGE_TOKENS}};
    for (size_t i = 0; i < sizeof constants / sizeof constants[0]; i++) {
        if (PyModule_AddIntConstant(module, constants[i].name, constants[i].value)) {
            return -1;
        }
    }
    return 0;
}

static int
module_exec(PyObject *module)
{
    if (PyArray_ImportNumPyAPI() < 0 || init_process()) {
        return -1;
    }
    struct sq_module_state *state = PyModule_GetState(module);
    state->format_error =
        PyErr_NewExceptionWithDoc("singlequant.FormatError",
                                  "A file is not what its format says: truncated, hostile or of "
                                  "another version.",
                                  PyExc_ValueError, NULL);
    if (!state->format_error || PyModule_AddObjectRef(module, "FormatError", state->format_error)) {
        return -1;
    }
    PyMethodDef *const tables[] = {
        module_methods,          sq_py_transform_methods,  sq_py_solve_methods,
        sq_py_rotation_methods,  sq_py_statistics_methods, sq_py_duquant_methods,
        sq_py_quantize_methods,  sq_py_gptq_methods,       sq_py_decode_methods,
        sq_py_pack_methods,      sq_py_runtime_methods,    sq_py_rows_methods,
        sq_py_alignment_methods, sq_py_experts_methods,    sq_py_outliers_methods,
        sq_py_bench_methods,     sq_py_kernels_methods,    sq_py_mapped_methods};
    for (size_t i = 0; i < sizeof tables / sizeof tables[0]; i++) {
        if (PyModule_AddFunctions(module, tables[i])) {
            return -1;
        }
    }
    if (add_constants(module) || sq_py_add_rotation_type(module) || sq_py_add_pack_types(module) ||
        sq_py_add_activations_type(module) || sq_py_add_runtime_types(module)) {
        return -1;
    }
    return 0;
}

static int
module_traverse(PyObject *module, visitproc visit, void *arg)
{
    struct sq_module_state *state = PyModule_GetState(module);
    Py_VISIT(state->format_error);
    Py_VISIT(state->rotation_type);
    Py_VISIT(state->packed_type);
    Py_VISIT(state->layer_type);
    Py_VISIT(state->cache_type);
    return 0;
}

static int
module_clear(PyObject *module)
{
    struct sq_module_state *state = PyModule_GetState(module);
    Py_CLEAR(state->format_error);
    Py_CLEAR(state->rotation_type);
    Py_CLEAR(state->packed_type);
    Py_CLEAR(state->layer_type);
    Py_CLEAR(state->cache_type);
    return 0;
}

static PyModuleDef_Slot module_slots[] = {
    {Py_mod_exec, module_exec},
#ifdef Py_mod_multiple_interpreters
    {Py_mod_multiple_interpreters, Py_MOD_MULTIPLE_INTERPRETERS_NOT_SUPPORTED},
#endif
#ifdef Py_mod_gil /* py_mapped.c keeps its ranges under it */
    {Py_mod_gil, Py_MOD_GIL_USED},
#endif
    {0, NULL},
};

static struct PyModuleDef module_def = {
    PyModuleDef_HEAD_INIT,
    .m_name = "singlequant._C",
    .m_doc = "The C core of singlequant.",
    .m_size = sizeof(struct sq_module_state),
    .m_slots = module_slots,
    .m_traverse = module_traverse,
    .m_clear = module_clear,
};

PyMODINIT_FUNC
PyInit__C(void)
{
    return PyModuleDef_Init(&module_def);
}
