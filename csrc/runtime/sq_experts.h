/* SPDX-License-Identifier: Apache-2.0 */
/* The block of experts, in place of an MLP: a router sends each token to a few of many MLPs. */
#ifndef SQ_EXPERTS_H
#define SQ_EXPERTS_H

#include "runtime/sq_mlp.h"
#include "runtime/sq_router.h"

/* sum over the chosen experts of weight * expert(x), and the shared MLP of all tokens, times the
 * sigmoid of x shared_gate^T where there is one. Everything is borrowed. */
struct sq_experts {
    struct sq_router router;
    const struct sq_mlp *each;   /* [router.count], of one intermediate width */
    const struct sq_mlp *shared; /* or NULL */
    sq_dtype gate_dtype;
    const void *shared_gate; /* [1][hidden] of gate_dtype, or NULL */
};

/* Proves the block. x is the value `value`, of `hidden` channels; each expert reads values of its
 * own, and so has sites of its own. */
sq_status
sq_experts_seal(const struct sq_experts *experts, int64_t hidden, int value, struct sq_site *sites,
                int n_sites, struct sq_fault *fault);

/* Bytes of workspace for m tokens; 0 where the block has no experts. */
size_t
sq_experts_workspace_bytes(const struct sq_experts *experts, int64_t m);

/* out [m][hidden] <- the block of x [m][hidden], tokens of the reader's chunk. Memory of experts
 * that no token chose is not read. A token's sum is in the order of its experts' indices, after the
 * shared MLP. The reader must be started again before another chunk, and has no site prepared. */
sq_status
sq_experts_feed(const struct sq_experts *experts, struct sq_reader *reader, const float *x,
                void *workspace, float *out);

#endif
