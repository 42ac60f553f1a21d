/* SPDX-License-Identifier: Apache-2.0 */
/* The feed-forward block and its activations. SiLU with a gate is a kernel of the table; the others
 * are computed in float64 and rounded once, by one formula for all tables. */
#include "runtime/sq_mlp.h"

#include <math.h>

#include "core/sq_internal.h"
#include "core/sq_threads.h"
#include "kernels/sq_kernels.h"
#include "runtime/sq_rows.h"

#define SQRT_HALF 0.70710678118654752440
#define SQRT_8_OVER_PI 1.59576912160573071176

static double
silu(double x)
{
    return x / (1.0 + exp(-x));
}

static double
gelu(double x)
{
    return 0.5 * x * (1.0 + erf(x * SQRT_HALF));
}

/* 0.5 x (1 + tanh(u)) = x / (1 + e^-2u), u = sqrt(2 / pi) (x + 0.044715 x^3). */
static double
gelu_tanh(double x)
{
    return x / (1.0 + exp(-SQRT_8_OVER_PI * (x + 0.044715 * x * x * x)));
}

/* NaN stays NaN. */
static double
relu(double x)
{
    return x < 0 ? 0 : x;
}

static double
relu2(double x)
{
    return relu(x) * relu(x);
}

static double (*const functions[SQ_N_ACTIVATIONS])(double) = {[SQ_SILU] = silu,
                                                              [SQ_GELU] = gelu,
                                                              [SQ_GELU_TANH] = gelu_tanh,
                                                              [SQ_RELU] = relu,
                                                              [SQ_RELU2] = relu2};

struct activation_job {
    const struct sq_kernels *kernels;
    enum sq_activation activation;
    const float *gate, *up;
    float *y;
    int64_t n;
};

static void
activate_rows(void *context, int64_t begin, int64_t end, int thread)
{
    const struct activation_job *j = context;
    double (*const f)(double) = functions[j->activation];
    (void)thread;
    if (j->gate && j->activation == SQ_SILU) {
        for (int64_t t = begin; t < end; t++) {
            j->kernels->silu_mul(j->gate + t * j->n, j->up + t * j->n, j->n, j->y + t * j->n);
        }
        return;
    }
    for (int64_t i = begin * j->n; i < end * j->n; i++) {
        j->y[i] = j->gate ? (float)f(j->gate[i]) * j->up[i] : (float)f(j->up[i]);
    }
}

void
sq_activate(enum sq_activation activation, const float *gate, const float *up, int64_t m, int64_t n,
            float *y)
{
    struct activation_job j = {.kernels = sq_kernels_active(),
                               .activation = activation,
                               .gate = gate,
                               .up = up,
                               .y = y,
                               .n = n};
    sq_parallel_for(m, sq_row_grain(n), activate_rows, &j);
}

sq_status
sq_mlp_seal(const struct sq_mlp *mlp, int64_t hidden, enum sq_value value, struct sq_site *sites,
            int n_sites, struct sq_fault *fault)
{
    const int64_t inner = mlp->up.n;
    SQ_TRY(sq_expect_range(fault, "mlp.activation", mlp->activation, 0, SQ_N_ACTIVATIONS - 1));
    SQ_TRY(sq_expect_range(fault, "mlp.up: n", inner, 1, SQ_WIDTH_MAX));
    if (mlp->gated) {
        SQ_TRY(sq_linear_seal(&mlp->gate, inner, hidden, value, "mlp.gate", sites, n_sites, fault));
    }
    SQ_TRY(sq_linear_seal(&mlp->up, inner, hidden, value, "mlp.up", sites, n_sites, fault));
    return sq_linear_seal(&mlp->down, hidden, inner, SQ_VALUE_INNER, "mlp.down", sites, n_sites,
                          fault);
}

sq_status
sq_mlp_feed(const struct sq_mlp *mlp, struct sq_reader *reader, const float *x, float *gate,
            float *up, float *out)
{
    if (mlp->gated) {
        SQ_TRY(sq_linear_apply(reader, &mlp->gate, x, gate));
    }
    SQ_TRY(sq_linear_apply(reader, &mlp->up, x, up));
    sq_activate(mlp->activation, mlp->gated ? gate : NULL, up, reader->m, mlp->up.n, gate);
    return sq_linear_apply(reader, &mlp->down, gate, out);
}
