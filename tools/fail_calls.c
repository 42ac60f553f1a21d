// Makes one call that changes the disk fail, or end the process. break_runs.py preloads it.
//
// Calls that name a file below FAIL_UNDER are counted from 1. Call number FAIL_AT ends the process
// where FAIL_HOW is "kill"; otherwise it fails as on a full disk. FAIL_LOG gets the number and the
// path of that call, or, where none fails, of the last one.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <unistd.h>

#define PATH_BYTES 4096
#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static atomic_int calls;

static void
log_call(int number, const char *path)
{
    char text[PATH_BYTES + 32];
    const char *log = getenv("FAIL_LOG");
    if (log == NULL) {
        return;
    }
    int length = snprintf(text, sizeof text, "%d %s", number, path);
    int fd = (int)syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_CREAT | O_TRUNC, 0600);
    if (fd >= 0) {
        syscall(SYS_write, fd, text, (size_t)length);
        syscall(SYS_close, fd);
    }
}

// Whether this call is the one that fails.
static int
fails(const char *path)
{
    const char *under = getenv("FAIL_UNDER"), *at = getenv("FAIL_AT"), *how = getenv("FAIL_HOW");
    if (under == NULL || at == NULL || strncmp(path, under, strlen(under)) != 0) {
        return 0;
    }
    int number = atomic_fetch_add(&calls, 1) + 1, last = atoi(at);
    if (last == 0 || number <= last) {
        log_call(number, path);
    }
    if (number != last) {
        return 0;
    }
    if (how != NULL && strcmp(how, "kill") == 0) {
        kill(getpid(), SIGKILL);
    }
    errno = ENOSPC;
    return 1;
}

static int
descriptor_fails(int fd)
{
    char link[64], path[PATH_BYTES];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) {
        return 0;
    }
    path[length] = '\0';
    return fails(path);
}

ssize_t
write(int fd, const void *data, size_t count)
{
    return descriptor_fails(fd) ? -1 : REAL(write)(fd, data, count);
}

int
fsync(int fd)
{
    return descriptor_fails(fd) ? -1 : REAL(fsync)(fd);
}

int
rename(const char *from, const char *to)
{
    return fails(to) ? -1 : REAL(rename)(from, to);
}

int
mkdir(const char *path, mode_t mode)
{
    struct stat found; /* of what exists already, no disk need have room */
    return stat(path, &found) && fails(path) ? -1 : REAL(mkdir)(path, mode);
}

static int
open_fails(const char *path, int flags)
{
    return (flags & O_CREAT) && fails(path);
}

int
open(const char *path, int flags, ...)
{
    va_list rest;
    va_start(rest, flags);
    mode_t mode = (flags & O_CREAT) ? va_arg(rest, mode_t) : 0;
    va_end(rest);
    return open_fails(path, flags) ? -1 : REAL(open)(path, flags, mode);
}

int
open64(const char *path, int flags, ...)
{
    va_list rest;
    va_start(rest, flags);
    mode_t mode = (flags & O_CREAT) ? va_arg(rest, mode_t) : 0;
    va_end(rest);
    return open_fails(path, flags) ? -1 : REAL(open64)(path, flags, mode);
}
