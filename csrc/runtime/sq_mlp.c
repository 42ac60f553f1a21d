/* SPDX-License-Identifier: Apache-2.0 */
/* The feed-forward block and its activations. SiLU with a gate is a kernel of the table; the others
 * are computed in float64 and rounded once, by one formula for all tables. */
#include "runtime/sq_mlp.h"

#include <math.h>
#include <stdio.h>

#include "core/sq_internal.h"
#include "core/sq_threads.h"
#include "kernels/sq_kernels.h"
#include "runtime/sq_rows.h"

#define SQRT_HALF 0.70710678118654752440
#define SQRT_8_OVER_PI 1.59576912160573071176
#define QUICK_SLOPE 1.702

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

static double
quick_gelu(double x)
{
    return x / (1.0 + exp(-QUICK_SLOPE * x));
}

/* NaN stays NaN. */
static double
swiglu_clamped(double gate, double up, double limit)
{
    const double g = gate > limit ? limit : gate;
    const double u = up > limit ? limit : up < -limit ? -limit : up;
    return (u + 1.0) * quick_gelu(g);
}

static double (*const functions[SQ_N_ACTIVATIONS])(double) = {
    [SQ_SILU] = silu, [SQ_GELU] = gelu,   [SQ_GELU_TANH] = gelu_tanh,
    [SQ_RELU] = relu, [SQ_RELU2] = relu2, [SQ_QUICK_GELU] = quick_gelu};

struct activation_job {
    const struct sq_kernels *kernels;
    enum sq_activation activation;
    float limit;
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
    if (j->activation == SQ_SWIGLU_CLAMPED) {
        for (int64_t i = begin * j->n; i < end * j->n; i++) {
            j->y[i] = (float)swiglu_clamped(j->gate[i], j->up[i], j->limit);
        }
        return;
    }
    for (int64_t i = begin * j->n; i < end * j->n; i++) {
        j->y[i] = j->gate ? (float)f(j->gate[i]) * j->up[i] : (float)f(j->up[i]);
    }
}

void
sq_activate(enum sq_activation activation, float limit, const float *gate, const float *up,
            int64_t m, int64_t n, float *y)
{
    struct activation_job j = {.kernels = sq_kernels_active(),
                               .activation = activation,
                               .limit = limit,
                               .gate = gate,
                               .up = up,
                               .y = y,
                               .n = n};
    sq_parallel_for(m, sq_row_grain(n), activate_rows, &j);
}

sq_status
sq_activation_check(enum sq_activation activation, float limit, int gated, const char *name,
                    struct sq_fault *fault)
{
    if ((unsigned)activation >= SQ_N_ACTIVATIONS) {
        return sq_refuse(fault, SQ_ERR_RANGE, -1, "%s: unknown activation %d", name,
                         (int)activation);
    }
    const int clamped = activation == SQ_SWIGLU_CLAMPED;
    if (!clamped && limit != 0) {
        return sq_refuse(fault, SQ_ERR_RANGE, -1,
                         "%s.limit: expected 0, as the activation has none, got %g", name,
                         (double)limit);
    }
    if (clamped && !(limit > 0 && isfinite(limit))) {
        return sq_refuse(fault, SQ_ERR_RANGE, -1, "%s.limit: expected more than 0, got %g", name,
                         (double)limit);
    }
    if (clamped && !gated) {
        return sq_refuse(fault, SQ_ERR_RANGE, -1,
                         "%s.gate: expected one, as the activation is gated, got none", name);
    }
    return SQ_OK;
}

/* Texts such as "experts.each[2047].gate". */
enum { NAME_BYTES = 48 };

sq_status
sq_mlp_seal(const struct sq_mlp *mlp, int64_t hidden, int value, const char *name,
            struct sq_site *sites, int n_sites, struct sq_fault *fault)
{
    const int64_t inner = mlp->up.n;
    const int inner_value = value >= SQ_VALUE_EXPERTS ? value + 1 : SQ_VALUE_INNER;
    char text[NAME_BYTES];
    SQ_TRY(sq_activation_check(mlp->activation, mlp->limit, mlp->gated, name, fault));
    (void)snprintf(text, sizeof text, "%s.up: n", name);
    SQ_TRY(sq_expect_range(fault, text, inner, 1, SQ_WIDTH_MAX));
    if (mlp->gated) {
        (void)snprintf(text, sizeof text, "%s.gate", name);
        SQ_TRY(sq_linear_seal(&mlp->gate, inner, hidden, value, text, sites, n_sites, fault));
    }
    (void)snprintf(text, sizeof text, "%s.up", name);
    SQ_TRY(sq_linear_seal(&mlp->up, inner, hidden, value, text, sites, n_sites, fault));
    (void)snprintf(text, sizeof text, "%s.down", name);
    return sq_linear_seal(&mlp->down, hidden, inner, inner_value, text, sites, n_sites, fault);
}

sq_status
sq_mlp_feed(const struct sq_mlp *mlp, struct sq_reader *reader, const float *x, float *gate,
            float *up, float *out)
{
    const struct sq_linear *const linears[] = {&mlp->up, &mlp->gate};
    SQ_TRY(sq_linears_apply(reader, linears, mlp->gated ? 2 : 1, x, (float *const[]){up, gate}));
    sq_activate(mlp->activation, mlp->limit, mlp->gated ? gate : NULL, up, reader->m, mlp->up.n,
                gate);
    return sq_linear_apply(reader, &mlp->down, gate, out);
}
