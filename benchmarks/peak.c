/* SPDX-License-Identifier: Apache-2.0 */
/* The machine's ceilings for the benchmarks: float32 FMA per second on one core, bytes read. */
#include <immintrin.h>
#include <stdint.h>

enum { CHAINS = 12 }; /* latency 4, two per cycle: eight would do */

/* Floating-point operations done: rounds * CHAINS FMAs of 8 lanes. The sum of the chains goes to
 * *sink, so that nothing is left out. */
double
fma_peak(int64_t rounds, float *sink)
{
    __m256 acc[CHAINS];
    const __m256 x = _mm256_set1_ps(0.5f), y = _mm256_set1_ps(1.0f);
    for (int j = 0; j < CHAINS; j++) {
        acc[j] = _mm256_set1_ps((float)j);
    }
    for (int64_t i = 0; i < rounds; i++) {
#pragma GCC unroll 12
        for (int j = 0; j < CHAINS; j++) {
            acc[j] = _mm256_fmadd_ps(acc[j], x, y);
        }
    }
    __m256 sum = acc[0];
    for (int j = 1; j < CHAINS; j++) {
        sum = _mm256_add_ps(sum, acc[j]);
    }
    _mm256_storeu_ps(sink, sum);
    return (double)rounds * CHAINS * 16;
}

/* Reads words [count], a multiple of 16; their XOR, so that nothing is left out. */
uint64_t
read_all(const uint64_t *words, int64_t count)
{
    __m256i x[4] = {_mm256_setzero_si256(), _mm256_setzero_si256(), _mm256_setzero_si256(),
                    _mm256_setzero_si256()};
    for (int64_t i = 0; i < count; i += 16) {
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
            x[j] = _mm256_xor_si256(x[j], _mm256_loadu_si256((const __m256i *)(words + i + 4 * j)));
        }
    }
    uint64_t out[4];
    _mm256_storeu_si256((__m256i *)out, _mm256_xor_si256(_mm256_xor_si256(x[0], x[1]),
                                                         _mm256_xor_si256(x[2], x[3])));
    return out[0] ^ out[1] ^ out[2] ^ out[3];
}
