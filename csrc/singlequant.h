/* SPDX-License-Identifier: Apache-2.0 */
/* The core's one public header: those of its folders, in pipeline order.
 *
 * Letters: m tokens, n outputs, k = k1 * k2 inputs, g group length along k. Row-major everywhere.
 * Every pointer states its shape. Nothing here prints, aborts or touches errno; results go through
 * out-pointers; inputs are never written. Functions are thread safe as long as their outputs
 * differ; sq_interrupt.h says how a long call is stopped. Scales multiply: x = scale * code. Angles
 * are float64, activations float32. */
#ifndef SINGLEQUANT_H
#define SINGLEQUANT_H

#include "core/sq_types.h"
#include "core/sq_interrupt.h"
#include "transform/sq_transform.h"
#include "solve/sq_solve.h"
#include "quantize/sq_quantize.h"
#include "runtime/sq_linear.h"
#include "runtime/sq_cache.h"
#include "runtime/sq_layer.h"
#include "runtime/sq_evaluate.h"

#endif
