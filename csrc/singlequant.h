/* SPDX-License-Identifier: Apache-2.0 */
/* The core's one public header: those of its folders, in pipeline order.
 *
 * Letters: m tokens, n outputs, k = k1 * k2 inputs, g group length along k. Row-major everywhere.
 * Every pointer states its shape. Nothing here prints, aborts or touches errno; results go through
 * out-pointers; inputs are never written. Functions are thread safe as long as their outputs
 * differ. Scales multiply: x = scale * code. Angles are float64, activations float32. */
#ifndef SINGLEQUANT_H
#define SINGLEQUANT_H

#include "core/sq_types.h"
#include "transform/sq_transform.h"
#include "solve/sq_solve.h"
#include "quantize/sq_quantize.h"
#include "runtime/sq_linear.h"
#include "runtime/sq_evaluate.h"

/* ---- decoder (runtime) ------------------------------------------------------------------ */

/* One linear of a layer: packed, or dense when packed is NULL. bias [n] or NULL. Borrowed. */
struct sq_linear {
    int64_t n, k;
    const sq_packed_t *packed;
    sq_dtype dtype;
    const void *dense; /* [n][k] */
    const float *bias;
};

/* One site: the linears that share an input. */
struct sq_site {
    struct sq_rotation rotation;
    int bits; /* of the activations entering packed linears: 4, 8, 16 */
    float clip;
};

enum { SQ_Q, SQ_K, SQ_V, SQ_O, SQ_GATE, SQ_UP, SQ_DOWN, SQ_N_LINEARS };
enum { SQ_SITE_QKV, SQ_SITE_O, SQ_SITE_GATE_UP, SQ_SITE_DOWN, SQ_N_SITES };

/* The most tokens of a call, inputs of a linear, and heads. */
#define SQ_TOKENS_MAX ((int64_t)1 << 24)
#define SQ_WIDTH_MAX ((int64_t)1 << 24)
#define SQ_HEADS_MAX ((int64_t)1 << 16)

struct sq_architecture {
    int64_t hidden, intermediate, heads, kv_heads, head_dim;
    float rms_eps;
    int64_t sliding_window; /* 0: none */
    const float *inv_freq;  /* [head_dim / 2] rotary frequencies, scaled as the model wants */
    float rope_scale;       /* multiplies cos and sin */
};

struct sq_layer {
    const float *norm_attention, *norm_mlp; /* [hidden] */
    struct sq_linear linears[SQ_N_LINEARS];
    struct sq_site sites[SQ_N_SITES];
};

/* ---- KV cache (runtime): keys and values of every layer, in pages of SQ_PAGE_TOKENS positions of
 * one sequence and layer, taken when a position is first written and given back by _release. A
 * position that was never written holds zeros. bits:
 *   32, 16  float32, float16 (clamped to finite values);
 *   8, 4    per token and head unsigned codes, x = scale * code + minimum, scale and minimum in
 *           float16; a head with NaN or Inf becomes NaN. With hadamard, queries and keys take the
 *           orthonormal matrix of sq_hadamard_matrix(head_dim) after the rotary embedding, which
 *           spreads a key's outlying channels over its codes and leaves the scores as they are.
 * No call may run beside another one on the same cache, not on another layer either. */
#define SQ_PAGE_TOKENS 64
struct sq_kv_shape {
    int64_t layers, sequences, kv_heads, head_dim;
    int64_t capacity;    /* positions of a sequence */
    int64_t limit_bytes; /* of pages; 0: none */
    int bits, hadamard;
};
typedef struct sq_kv_cache_t sq_kv_cache_t;

/* No page is taken yet. SQ_ERR_RANGE: a size below 1, bits that are none of the above, more than
 * 2^31 - 1 sequences, 2^31 positions or 2^24 head_dim. SQ_ERR_NOMEM also where sizes overflow. */
sq_status
sq_kv_cache_create(const struct sq_kv_shape *shape, sq_kv_cache_t **out);

void
sq_kv_cache_destroy(sq_kv_cache_t *cache);

const struct sq_kv_shape *
sq_kv_cache_shape(const sq_kv_cache_t *cache);

/* Bytes of one page, and of all pages in memory: those of sequences and, for reuse, at most as many
 * free ones. The second may be called while another call runs. */
int64_t
sq_kv_cache_page_bytes(const sq_kv_cache_t *cache);
int64_t
sq_kv_cache_bytes(const sq_kv_cache_t *cache);

/* Takes the pages of layers first .. last - 1 that position[t] of sequence[t], t < m, still need.
 * SQ_ERR_NOMEM: no memory, or more than limit_bytes; nothing was taken then. */
sq_status
sq_kv_cache_reserve(sq_kv_cache_t *cache, int64_t first, int64_t last, const int32_t *sequence,
                    const int64_t *position, int64_t m);

/* Frees the pages of a sequence in all layers; it holds zeros again. */
sq_status
sq_kv_cache_release(sq_kv_cache_t *cache, int64_t sequence);

/* keys, values [count][kv_heads][head_dim] <- what positions 0 .. count - 1 of a sequence hold in a
 * layer, as attention sees it (keys rotated). */
sq_status
sq_kv_cache_read(const sq_kv_cache_t *cache, int64_t layer, int64_t sequence, int64_t count,
                 float *keys, float *values);

/* x [m][n] -> codes [m][n] and each row's scale and minimum, float16 bits, as the cache with 8 or 4
 * bits rounds a head: both are rounded so that every x is within half a step of scale * code +
 * minimum as long as it is a float16 in size. */
sq_status
sq_kv_quantize(int bits, const float *x, int64_t m, int64_t n, uint8_t *codes, uint16_t *scales,
               uint16_t *minima);

/* Where to copy the (unrotated) input of each site, [m][k of the site]; NULL: nowhere. */
struct sq_record {
    float *inputs[SQ_N_SITES];
};

/* length: one more than the largest position of the call. */
size_t
sq_layer_workspace_bytes(const struct sq_architecture *a, const struct sq_layer *layer, int64_t m,
                         int64_t length);

/* hidden [m][hidden] is updated in place by one decoder layer, number index of the cache. Token t
 * belongs to sequence[t] and stands at position[t]; its key and value are written to the cache
 * there first (pages are reserved as needed, before anything is written); it attends to positions 0
 * .. position[t] of its own sequence. record may be NULL. */
sq_status
sq_layer_forward(const struct sq_architecture *a, const struct sq_layer *layer,
                 sq_kv_cache_t *cache, int64_t index, const int32_t *sequence,
                 const int64_t *position, int64_t m, float *hidden, const struct sq_record *record,
                 void *workspace);

/* y [m][n] <- RMSNorm(x) * weight. */
sq_status
sq_rms_norm(const float *x, const float *weight, int64_t m, int64_t n, float eps, float *y);

/* Next token from logits [v]: temperature 0 is argmax; top_k 0 and top_p 1 are off. uniform is
 * the caller's random number, in [0, 1). workspace: v * 16 bytes. */
sq_status
sq_sample(const float *logits, int64_t v, float temperature, int64_t top_k, float top_p,
          double uniform, void *workspace, int64_t *token);

#endif
