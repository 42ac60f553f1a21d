/* SPDX-License-Identifier: Apache-2.0 */
/* SiLU and softmax, for tables with TILE_GEMM of kernels_x86_template.h, which comes first. All
 * lengths of vectors give the same bits. */
#include <math.h>

/* exp(x) = 2^n exp(r), n = rint(x / ln 2), r = x - n ln 2 in two parts (Cody and Waite), exp(r) by
 * Cephes' expf polynomial of degree 7; relative error below 3e-7 where the result is normal (a test
 * measures it). 2^n is applied in two factors, so that the result runs to Inf above and through the
 * subnormals to 0 below; beyond +-104 x is clamped, where that has happened already. NaN stays NaN:
 * max and min return their second operand then. */
static ALWAYS_INLINE vec_f
exponential(vec_f x)
{
    x = VEC(max_ps)(VEC(set1_ps)(-104.0f), x);
    x = VEC(min_ps)(VEC(set1_ps)(104.0f), x);
    const vec_f scaled = VEC(mul_ps)(x, VEC(set1_ps)(1.44269504f));
#if TILE_BITS == 256
    const vec_f n = _mm256_round_ps(scaled, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    const vec_f n = _mm512_roundscale_ps(scaled, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#endif
    vec_f r = VEC(fnmadd_ps)(n, VEC(set1_ps)(0.693359375f), x);
    r = VEC(fnmadd_ps)(n, VEC(set1_ps)(-2.12194440e-4f), r);
    vec_f p = VEC(set1_ps)(1.9875691500e-4f);
    p = VEC(fmadd_ps)(p, r, VEC(set1_ps)(1.3981999507e-3f));
    p = VEC(fmadd_ps)(p, r, VEC(set1_ps)(8.3334519073e-3f));
    p = VEC(fmadd_ps)(p, r, VEC(set1_ps)(4.1665795894e-2f));
    p = VEC(fmadd_ps)(p, r, VEC(set1_ps)(1.6666665459e-1f));
    p = VEC(fmadd_ps)(p, r, VEC(set1_ps)(5.0000001201e-1f));
    p = VEC(fmadd_ps)(p, VEC(mul_ps)(r, r), VEC(add_ps)(r, VEC(set1_ps)(1.0f)));
#if TILE_BITS == 256
    const __m256i exponent = _mm256_cvtps_epi32(n), bias = _mm256_set1_epi32(127);
    const __m256i half = _mm256_srai_epi32(exponent, 1);
    const __m256i rest = _mm256_sub_epi32(exponent, half);
    const __m256i two_half = _mm256_slli_epi32(_mm256_add_epi32(half, bias), 23);
    const __m256i two_rest = _mm256_slli_epi32(_mm256_add_epi32(rest, bias), 23);
    return _mm256_mul_ps(_mm256_mul_ps(p, _mm256_castsi256_ps(two_half)),
                         _mm256_castsi256_ps(two_rest));
#else
    return _mm512_scalef_ps(p, n);
#endif
}

/* ---- SiLU ------------------------------------------------------------------------------- */

static ALWAYS_INLINE vec_f
silu_times(vec_f gate, vec_f up)
{
    const vec_f e = exponential(VEC(xor_ps)(gate, VEC(set1_ps)(-0.0f)));
    return VEC(mul_ps)(VEC(div_ps)(gate, VEC(add_ps)(VEC(set1_ps)(1.0f), e)), up);
}

static ALWAYS_INLINE void
silu_mul(const float *gate, const float *up, int64_t n, float *y)
{
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        VEC(storeu_ps)(y + i, silu_times(VEC(loadu_ps)(gate + i), VEC(loadu_ps)(up + i)));
    }
    const vec_mask mask = lane_mask(n - i);
    store_lanes(y + i, mask, silu_times(load_lanes(gate + i, mask), load_lanes(up + i, mask)));
}

/* ---- softmax ---------------------------------------------------------------------------- */

static ALWAYS_INLINE float
horizontal_max(__m256 x)
{
    __m128 v = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    v = _mm_max_ps(v, _mm_movehl_ps(v, v));
    return _mm_cvtss_f32(_mm_max_ss(v, _mm_movehdup_ps(v)));
}

#if TILE_BITS == 256
/* a in the lanes of the mask, b in the others. */
static ALWAYS_INLINE vec_f
choose_lanes(vec_mask mask, vec_f a, vec_f b)
{
    return _mm256_blendv_ps(b, a, _mm256_castsi256_ps(mask));
}

/* sum [8] += x by index mod 8, in order. */
static ALWAYS_INLINE __m256
add_to_eight(__m256 sum, vec_f x)
{
    return _mm256_add_ps(sum, x);
}

static ALWAYS_INLINE float
largest_lane(vec_f x)
{
    return horizontal_max(x);
}
#else
static ALWAYS_INLINE vec_f
choose_lanes(vec_mask mask, vec_f a, vec_f b)
{
    return _mm512_mask_blend_ps(mask, b, a);
}

static ALWAYS_INLINE __m256
add_to_eight(__m256 sum, vec_f x)
{
    return _mm256_add_ps(_mm256_add_ps(sum, _mm512_castps512_ps256(x)),
                         _mm512_extractf32x8_ps(x, 1));
}

static ALWAYS_INLINE float
largest_lane(vec_f x)
{
    return horizontal_max(_mm256_max_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1)));
}
#endif

/* The sum has 8 lanes by index mod 8; what lies from n on is never read. */
static ALWAYS_INLINE void
softmax_row(float *x, int64_t n, int64_t n_padded, float scale)
{
    const vec_f factor = VEC(set1_ps)(scale), lowest = VEC(set1_ps)(-INFINITY);
    const int64_t whole = n & ~(int64_t)(LANES - 1);
    const vec_mask mask = lane_mask(n - whole);
    const vec_f tail = VEC(mul_ps)(load_lanes(x + whole, mask), factor);
    vec_f max = choose_lanes(mask, tail, lowest);
    for (int64_t i = 0; i < whole; i += LANES) {
        max = VEC(max_ps)(max, VEC(mul_ps)(VEC(loadu_ps)(x + i), factor));
    }
    const vec_f top = VEC(set1_ps)(largest_lane(max));
    __m256 sum = _mm256_setzero_ps();
    for (int64_t i = 0; i < whole; i += LANES) {
        const vec_f e = exponential(VEC(sub_ps)(VEC(mul_ps)(VEC(loadu_ps)(x + i), factor), top));
        VEC(storeu_ps)(x + i, e);
        sum = add_to_eight(sum, e);
    }
    const vec_f e_tail = choose_lanes(mask, exponential(VEC(sub_ps)(tail, top)), VEC(setzero_ps)());
    sum = add_to_eight(sum, e_tail);
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps(sum, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    four = _mm_add_ss(four, _mm_movehdup_ps(four));
    const vec_f total = VEC(set1_ps)(_mm_cvtss_f32(four));
    for (int64_t i = 0; i < whole; i += LANES) {
        VEC(storeu_ps)(x + i, VEC(div_ps)(VEC(loadu_ps)(x + i), total));
    }
    store_lanes(x + whole, mask, VEC(div_ps)(e_tail, total));
    if (n_padded > n) {
        memset(x + n, 0, (size_t)(n_padded - n) * sizeof *x);
    }
}
