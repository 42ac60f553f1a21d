/* SPDX-License-Identifier: Apache-2.0 */
/* Sites and linears. A site is one value of a layer that linears read; a linear names its site. */
#ifndef SQ_SITE_H
#define SQ_SITE_H

#include "quantize/sq_quantize.h"
#include "runtime/sq_linear.h"
#include "transform/sq_transform.h"

#include "runtime/sq_fault.h"

/* The most tokens of a call, and inputs or outputs of a linear. */
#define SQ_TOKENS_MAX ((int64_t)1 << 24)
#define SQ_WIDTH_MAX ((int64_t)1 << 24)

struct sq_kernels;

/* One value that linears read. Packed linears read it rotated and in `bits` bits; dense ones read
 * it as it is. The second part is written by sq_site_open and sq_linear_seal. */
struct sq_site {
    struct sq_rotation rotation;
    int bits; /* of the activations that enter packed linears: 4, 8, 16 */
    float clip;
    int64_t k; /* width of the value */

    int64_t int8_inputs; /* leading inputs with 8 bits, as the packed linears have them; -1: no
                            packed linear reads this site */
    const struct sq_kernels *kernels; /* table of the packed linears; NULL: none */
    int value; /* enum sq_value or an expert's: which value of the layer; 0: none */
};

/* The values of a layer that linears read. Expert i reads SQ_VALUE_EXPERTS + 2 i, the tokens routed
 * to it, and its down SQ_VALUE_EXPERTS + 2 i + 1. */
enum sq_value {
    SQ_VALUE_NONE,
    SQ_VALUE_MIX,
    SQ_VALUE_MIXED,
    SQ_VALUE_FEED,
    SQ_VALUE_INNER,
    SQ_VALUE_Q_RANK,
    SQ_VALUE_KV_RANK,
    SQ_VALUE_EXPERTS = 1 << 16
};

/* One linear: packed, or dense where packed is NULL. Pointers are borrowed. */
struct sq_linear {
    int site; /* index of the site that it reads */
    int64_t n, k;
    const sq_packed_t *packed;
    sq_dtype dtype;
    const void *dense; /* [n][k] */
    const float *bias; /* [n] or NULL */
};

/* Checks what the caller filled in and clears the rest. */
sq_status
sq_site_open(struct sq_site *sites, int n_sites, struct sq_fault *fault);

/* Proves a linear [n][k] that reads `value` and enters it at its site. name starts the text of a
 * fault. */
sq_status
sq_linear_seal(const struct sq_linear *l, int64_t n, int64_t k, int value, const char *name,
               struct sq_site *sites, int n_sites, struct sq_fault *fault);

/* Every site must be read by a linear. */
sq_status
sq_site_close(const struct sq_site *sites, int n_sites, struct sq_fault *fault);

/* Bytes of workspace that a sq_reader needs for m tokens or fewer: for the activations and for the
 * rotation. */
void
sq_reader_bytes(const struct sq_site *sites, int n_sites, int64_t m, size_t *activations,
                size_t *rotation);

/* The (unrotated) inputs of a site in a call, in the order of its tokens. Starts as zeros; the
 * caller frees rows. */
struct sq_record {
    float *rows;             /* [count][k], from sq_states_alloc */
    size_t mapped;           /* as it set it */
    int64_t count, capacity; /* in rows */
    int64_t seen;            /* the chunks that begin before this token are there */
};

/* How the linears of a chunk of tokens read their inputs. The activations of a site are prepared
 * when its first linear asks, and serve the linears that follow until another site is asked for. */
struct sq_reader {
    const struct sq_site *sites;
    struct sq_record *record; /* [n_sites] or NULL */
    void *activations_workspace, *rotation_workspace;
    int64_t tokens; /* of the call */
    int64_t begin;  /* first token of the chunk in the call */
    int64_t m;      /* its tokens, or as many of them as sq_reader_rows says */
    int site;       /* whose activations are prepared; -1: none */
    struct sq_activations activations;
};

/* Moves the reader to a chunk. */
void
sq_reader_start(struct sq_reader *reader, int64_t begin, int64_t m);

/* From now on the linears read m of the chunk's tokens. */
void
sq_reader_rows(struct sq_reader *reader, int64_t m);

/* y [m][n] <- x [m][k] w^T + bias, where x is the value of the linear's site in this chunk. Adds x
 * to `record` on the way. SQ_ERR_NONFINITE: x is not finite and a packed linear reads it.
 * SQ_ERR_NOMEM: no memory for the record. */
sq_status
sq_linear_apply(struct sq_reader *reader, const struct sq_linear *l, const float *x, float *y);

/* The same for up to SQ_SITE_LINEARS linears that read one value x, y[i] <- x of linears[i]. Packed
 * ones of one site are one parallel loop. */
sq_status
sq_linears_apply(struct sq_reader *reader, const struct sq_linear *const linears[], int count,
                 const float *x, float *const y[]);

#endif
