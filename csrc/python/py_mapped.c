/* SPDX-License-Identifier: Apache-2.0 */
/* Memory in files: where the states of calibration lie, and mapped files that become shorter while
 * they are read.
 *
 * A read behind the new end raises SIGBUS, which ends a process without a word. The handler here
 * writes a line that names the file first. It then leaves by an exit status, if one is set, or by
 * the action that SIGBUS had before. */
#include "python/py_args.h"

#include <fcntl.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "core/sq_states.h"

enum { RANGES = 1024, MESSAGE_BYTES = 1024 };

/* A slot is live while begin < end. Only its owner, who holds the GIL, writes to it; the handler
 * reads it at any moment, so end is written last and cleared first. */
struct range {
    _Atomic uintptr_t begin, end;
    char message[MESSAGE_BYTES]; /* ends in a newline and 0 */
};

static struct range ranges[RANGES];
static struct sigaction before;
static _Atomic int exit_status = -1;
static atomic_flag told = ATOMIC_FLAG_INIT; /* threads may meet the new end together */

/* Calls nothing but what POSIX allows in a handler: write, _exit, pause, sigaction. */
static void
on_bus_error(int number, siginfo_t *info, void *Py_UNUSED(context))
{
    const uintptr_t at = (uintptr_t)info->si_addr;
    for (int i = 0; i < RANGES; i++) {
        const uintptr_t end = atomic_load(&ranges[i].end), begin = atomic_load(&ranges[i].begin);
        if (at < begin || at >= end) {
            continue;
        }
        const char *text = ranges[i].message;
        const int first = !atomic_flag_test_and_set(&told);
        if (first) {
            const ssize_t written = write(STDERR_FILENO, text, strlen(text));
            (void)written; /* there is nobody to tell */
        }
        while (atomic_load(&exit_status) >= 0) {
            if (first) {
                _exit(atomic_load(&exit_status));
            }
            pause(); /* the first one ends the process */
        }
        break;
    }
    sigaction(number, &before, NULL); /* the read is tried again, and meets the old action */
}

/* Once per process. 0, or -1 with OSError. */
static int
install(void)
{
    static int installed; /* under the GIL */
    if (installed) {
        return 0;
    }
    struct sigaction action = {.sa_sigaction = on_bus_error, .sa_flags = SA_SIGINFO};
    sigemptyset(&action.sa_mask);
    if (sigaction(SIGBUS, &action, &before)) {
        PyErr_SetFromErrno(PyExc_OSError);
        return -1;
    }
    installed = 1;
    return 0;
}

/* Enters a range in place of those that it covers: their files are no longer mapped. Where all
 * slots are in use, the oldest is overwritten. */
static void
enter(uintptr_t begin, uintptr_t end, const char *message)
{
    static int oldest; /* under the GIL */
    int slot = -1;
    for (int i = 0; i < RANGES; i++) {
        if (ranges[i].begin < end && begin < ranges[i].end) {
            atomic_store(&ranges[i].end, 0);
        }
        if (slot < 0 && ranges[i].begin >= ranges[i].end) {
            slot = i;
        }
    }
    if (slot < 0) {
        slot = oldest;
        oldest = (oldest + 1) % RANGES;
    }
    struct range *r = &ranges[slot];
    atomic_store(&r->end, 0);
    snprintf(r->message, sizeof r->message - 1, "%s", message);
    strcat(r->message, "\n"); /* the byte that snprintf was not told of */
    atomic_store(&r->begin, begin);
    atomic_store(&r->end, end);
}

PyDoc_STRVAR(watch_mapping_doc,
             "watch_mapping(array, message)\n--\n\n"
             "Have message, at most 1022 bytes, written to standard error when array turns out to "
             "be mapped from\na file that has become shorter. TypeError unless array is "
             "contiguous.");

static PyObject *
watch_mapping(PyObject *Py_UNUSED(module), PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"array", "message", NULL};
    PyObject *o;
    const char *message;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "Os:watch_mapping", names, &o, &message)) {
        return NULL;
    }
    if (!PyArray_Check(o) || !PyArray_IS_C_CONTIGUOUS((PyArrayObject *)o)) {
        PyErr_SetString(PyExc_TypeError, "array: expected a contiguous array");
        return NULL;
    }
    const uintptr_t begin = (uintptr_t)PyArray_DATA((PyArrayObject *)o);
    const uintptr_t end = begin + (uintptr_t)PyArray_NBYTES((PyArrayObject *)o);
    if (begin < end) {
        if (install()) {
            return NULL;
        }
        enter(begin, end, message);
    }
    Py_RETURN_NONE;
}

PyDoc_STRVAR(exit_when_lost_doc,
             "exit_when_lost(status)\n--\n\n"
             "End the process by this exit status, 0 to 255, behind the message of watch_mapping. "
             "-1, as at\nfirst, ends it as SIGBUS does. Returns the status before. ValueError "
             "outside.");

static PyObject *
exit_when_lost(PyObject *Py_UNUSED(module), PyObject *arg)
{
    const long status = PyLong_AsLong(arg);
    if (status == -1 && PyErr_Occurred()) {
        return NULL;
    }
    if (status < -1 || status > 255) {
        return PyErr_Format(PyExc_ValueError, "status: expected -1 to 255, got %ld", status);
    }
    return PyLong_FromLong(atomic_exchange(&exit_status, (int)status));
}

PyDoc_STRVAR(map_states_doc,
             "map_states(limit, folder)\n--\n\n"
             "Have DecoderLayer.forward keep what it records of a site in a file of the folder, "
             "without a name,\nwhere that is more than limit bytes; with folder None, in memory, "
             "as at first. Where the file\nsystem has no such files, or no room, it stays in "
             "memory. OSError if there is no such folder.");

static PyObject *
map_states(PyObject *Py_UNUSED(module), PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"limit", "folder", NULL};
    Py_ssize_t limit;
    PyObject *object, *path = NULL;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "nO:map_states", names, &limit, &object)) {
        return NULL;
    }
    if (limit < 0) {
        return PyErr_Format(PyExc_ValueError, "limit: expected bytes from 0, got %zd", limit);
    }
    int folder = -1;
    if (object != Py_None) {
        if (!PyUnicode_FSConverter(object, &path)) {
            return NULL;
        }
        folder = open(PyBytes_AS_STRING(path), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
        Py_DECREF(path);
        if (folder < 0) {
            return PyErr_SetFromErrnoWithFilenameObject(PyExc_OSError, object);
        }
    }
    sq_states_map((size_t)limit, folder);
    Py_RETURN_NONE;
}

PyDoc_STRVAR(trim_heap_doc,
             "trim_heap()\n--\n\n"
             "Give back to the system what the heap keeps of freed blocks, where "
             "the C library can.");

static PyObject *
trim_heap(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(arg))
{
    sq_trim_heap();
    Py_RETURN_NONE;
}

PyMethodDef sq_py_mapped_methods[] = {
    {"map_states", (PyCFunction)(void (*)(void))map_states, METH_VARARGS | METH_KEYWORDS,
     map_states_doc},
    {"trim_heap", trim_heap, METH_NOARGS, trim_heap_doc},
    {"watch_mapping", (PyCFunction)(void (*)(void))watch_mapping, METH_VARARGS | METH_KEYWORDS,
     watch_mapping_doc},
    {"exit_when_lost", exit_when_lost, METH_O, exit_when_lost_doc},
    {NULL, NULL, 0, NULL},
};
