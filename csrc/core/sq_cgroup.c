/* SPDX-License-Identifier: Apache-2.0 */
/* /proc/self/cgroup names the groups, /proc/self/mountinfo where their files are. */
#include "core/sq_cgroup.h"

#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/sq_internal.h"

/* A file system of groups with the CPU controller. */
struct hierarchy {
    int version;
    char group[PATH_MAX]; /* of the process */
    char top[PATH_MAX];   /* the group that is mounted: a container sees a part of the tree */
    char point[PATH_MAX]; /* where it is mounted */
};

/* Whether the comma-separated list holds "cpu". */
static int
names_cpu(const char *list)
{
    for (const char *p = list; *p;) {
        const size_t length = strcspn(p, ",\n");
        if (length == 3 && !memcmp(p, "cpu", 3)) {
            return 1;
        }
        p += length + (p[length] != '\0');
    }
    return 0;
}

/* to [PATH_MAX] = from; mountinfo writes a space as \040, and others likewise. 0 if too long. */
static int
copy_path(char *to, const char *from)
{
    size_t n = 0;
    while (*from && n < PATH_MAX - 1) {
        int value = 0, digits = 0;
        while (*from == '\\' && digits < 3 && from[1 + digits] >= '0' && from[1 + digits] <= '7') {
            value = 8 * value + from[1 + digits++] - '0';
        }
        to[n++] = digits == 3 ? (char)value : *from;
        from += digits == 3 ? 4 : 1;
    }
    to[n] = '\0';
    return !*from;
}

static FILE *
open_file(const char *root, const char *directory, const char *name)
{
    char path[3 * PATH_MAX];
    const int length = snprintf(path, sizeof path, "%s%s/%s", root, directory, name);
    return length > 0 && (size_t)length < sizeof path ? fopen(path, "re") : NULL;
}

/* A line of /proc/self/cgroup, `number:controllers:path`. Returns whether it is h's. */
static int
read_group(struct hierarchy *h, char *line)
{
    char *controllers = strchr(line, ':');
    char *path = controllers ? strchr(controllers + 1, ':') : NULL;
    if (!path) {
        return 0;
    }
    *path++ = '\0';
    controllers++;
    const int own =
        h->version == 2 ? !strncmp(line, "0:", 2) && !*controllers : names_cpu(controllers);
    return own && copy_path(h->group, path);
}

/* A line of mountinfo, `id parent device top point options [tags] - type source options`. */
static int
read_mount(struct hierarchy *h, char *line)
{
    char *rest = strstr(line, " - "), *field[5], *state = NULL;
    if (!rest) {
        return 0;
    }
    *rest = '\0';
    char *word = strtok_r(line, " ", &state);
    for (int i = 0; i < 5; i++, word = strtok_r(NULL, " ", &state)) {
        if (!word) {
            return 0;
        }
        field[i] = word;
    }
    const char *type = strtok_r(rest + 3, " ", &state);
    const char *source = strtok_r(NULL, " ", &state), *options = strtok_r(NULL, " ", &state);
    if (!source || strcmp(type, h->version == 2 ? "cgroup2" : "cgroup") ||
        (h->version == 1 && (!options || !names_cpu(options)))) {
        return 0;
    }
    return copy_path(h->top, field[3]) && copy_path(h->point, field[4]);
}

/* Hands the lines of a file under /proc/self to read until one is it. Returns whether one was. */
static int
find_line(const char *root, const char *name, int (*read)(struct hierarchy *, char *),
          struct hierarchy *h)
{
    FILE *file = open_file(root, "/proc/self", name);
    char *line = NULL;
    size_t size = 0;
    int found = 0;
    while (file && !found && getline(&line, &size, file) >= 0) {
        line[strcspn(line, "\n")] = '\0';
        found = read(h, line);
    }
    free(line);
    if (file) {
        fclose(file);
    }
    return found;
}

/* The first numbers of a file, at most 2; returns how many there are. */
static int
read_numbers(const char *root, const char *directory, const char *name, long long numbers[2])
{
    FILE *file = open_file(root, directory, name);
    const int found = file ? fscanf(file, "%18lld %18lld", &numbers[0], &numbers[1]) : 0;
    if (file) {
        fclose(file);
    }
    return found;
}

/* CPUs of one group's quota; INT_MAX without one ("max", or -1 in version 1). */
static int
quota_cpus(const char *root, const struct hierarchy *h, const char *directory)
{
    long long numbers[2] = {0, 0}, unused[2];
    int found = 0;
    if (h->version == 2) {
        found = read_numbers(root, directory, "cpu.max", numbers);
    }
    else {
        found = read_numbers(root, directory, "cpu.cfs_quota_us", numbers) > 0;
        found += read_numbers(root, directory, "cpu.cfs_period_us", unused) > 0;
        numbers[1] = found == 2 ? unused[0] : 0;
    }
    if (found != 2 || numbers[0] <= 0 || numbers[1] <= 0) {
        return INT_MAX;
    }
    return (int)sq_min_i64(sq_ceil_div(numbers[0], numbers[1]), INT_MAX);
}

/* The least quota of the process' group and of those above it, as far as they are mounted. */
static int
least_quota(const char *root, int version)
{
    struct hierarchy h = {.version = version};
    if (!find_line(root, "cgroup", read_group, &h) ||
        !find_line(root, "mountinfo", read_mount, &h)) {
        return INT_MAX;
    }
    const size_t top = strcmp(h.top, "/") ? strlen(h.top) : 0;
    const char *below = "";
    if (!strncmp(h.group, h.top, top) && h.group[top] == '/' && !strstr(h.group, "/..")) {
        below = h.group + top;
    }
    char directory[2 * PATH_MAX];
    const size_t point = strlen(h.point);
    memcpy(directory, h.point, point);
    memcpy(directory + point, below, strlen(below) + 1);
    int least = INT_MAX;
    for (;;) {
        least = (int)sq_min_i64(least, quota_cpus(root, &h, directory));
        char *last = strrchr(directory + point, '/');
        if (!last) {
            return least;
        }
        *last = '\0';
    }
}

int
sq_cgroup_cpus(const char *root)
{
    const int least = (int)sq_min_i64(least_quota(root, 1), least_quota(root, 2));
    return least == INT_MAX ? 0 : least;
}
