/* SPDX-License-Identifier: Apache-2.0 */
/* The CPU quota of the process' control groups. */
#ifndef SQ_CGROUP_H
#define SQ_CGROUP_H

/* CPUs that the quotas of the process' own cgroup and of those above it amount to, rounded up; 0
 * where none sets one or the files are missing or odd. Both versions of cgroups count. root stands
 * before every path that is read: "" for the machine's own files. */
int
sq_cgroup_cpus(const char *root);

#endif
