/* SPDX-License-Identifier: Apache-2.0 */
/* The Sylvester Hadamard in float32, O(n log n). Plain C that is compiled for each instruction set:
 * sums of two in a fixed order, so that all give the same bits. */
#ifndef SYLVESTER_H
#define SYLVESTER_H

#include <stdint.h>
#ifdef __AVX2__
#include <immintrin.h>
#endif

/* Stages h and 2 h of x [count]. */
static inline void
two_stages(float *x, int64_t count, int64_t h)
{
    for (int64_t i = 0; i < count; i += 4 * h) {
        float *restrict p = x + i, *restrict q = p + h, *restrict r = q + h, *restrict s = r + h;
        for (int64_t j = 0; j < h; j++) {
            const float a = p[j] + q[j], b = p[j] - q[j];
            const float c = r[j] + s[j], d = r[j] - s[j];
            p[j] = a + c;
            q[j] = b + d;
            r[j] = a - c;
            s[j] = b - d;
        }
    }
}

static inline void
one_stage(float *x, int64_t count, int64_t h)
{
    for (int64_t i = 0; i < count; i += 2 * h) {
        float *restrict p = x + i, *restrict q = p + h;
        for (int64_t j = 0; j < h; j++) {
            const float a = p[j], b = q[j];
            p[j] = a + b;
            q[j] = a - b;
        }
    }
}

#ifdef __AVX2__

/* The sum of x and of moved, or moved less x where signs are negative. */
static inline __m256
lane_stage(__m256 x, __m256 moved, __m256 signs)
{
    return _mm256_add_ps(moved, _mm256_xor_ps(x, signs));
}

/* Stages 1, 2, 4 and 8 of x [count], a multiple of 16. */
static inline void
narrow_stages(float *x, int64_t count)
{
    const float n = -0.0f;
    const __m256 ones = _mm256_setr_ps(0, n, 0, n, 0, n, 0, n);
    const __m256 twos = _mm256_setr_ps(0, 0, n, n, 0, 0, n, n);
    const __m256 fours = _mm256_setr_ps(0, 0, 0, 0, n, n, n, n);
    for (int64_t i = 0; i < count; i += 16) {
        __m256 v[2] = {_mm256_loadu_ps(x + i), _mm256_loadu_ps(x + i + 8)};
        for (int j = 0; j < 2; j++) {
            v[j] = lane_stage(v[j], _mm256_permute_ps(v[j], 0xb1), ones);
            v[j] = lane_stage(v[j], _mm256_permute_ps(v[j], 0x4e), twos);
            v[j] = lane_stage(v[j], _mm256_permute2f128_ps(v[j], v[j], 1), fours);
        }
        _mm256_storeu_ps(x + i, _mm256_add_ps(v[0], v[1]));
        _mm256_storeu_ps(x + i + 8, _mm256_sub_ps(v[0], v[1]));
    }
}

#else

static inline void
narrow_stages(float *x, int64_t count)
{
    two_stages(x, count, 1);
    two_stages(x, count, 4);
}

#endif

/* x [count], a multiple of `to` <- scale times x after the stages h = from, 2 from, .., to / 2,
 * each of which makes a + b and a - b of the elements a and b that are h apart. */
static inline void
sylvester_stages(float *x, int64_t count, int64_t from, int64_t to, float scale)
{
    int64_t h = from;
    if (h == 1 && to >= 16) {
        narrow_stages(x, count);
        h = 16;
    }
    for (; 4 * h <= to; h *= 4) {
        two_stages(x, count, h);
    }
    if (h < to) {
        one_stage(x, count, h);
    }
    for (int64_t i = 0; i < count; i++) {
        x[i] *= scale;
    }
}

#endif
