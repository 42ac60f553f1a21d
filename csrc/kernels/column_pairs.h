/* SPDX-License-Identifier: Apache-2.0 */
/* Two columns of float64 that a Givens rotation mixes. Plain C that is compiled for each
 * instruction set; products and sums are rounded one by one in a fixed order, so that all give the
 * same bits. */
#ifndef COLUMN_PAIRS_H
#define COLUMN_PAIRS_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

/* Sums over two columns a and b, of p = a^2 - b^2 and q = a b. */
struct sq_pair_sums {
    double pp, qq, pq;
};

/* Element i is added to lane i mod 8; lanes as ((0+4)+(2+6)) + ((1+5)+(3+7)). */
enum { PAIR_LANES = 8 };
typedef double pair_lanes __attribute__((vector_size(PAIR_LANES * sizeof(double))));

static inline double
sum_of_pairs(const pair_lanes *v)
{
    const pair_lanes x = *v;
    return ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7]));
}

static inline struct sq_pair_sums
sum_pairs(const double *a, const double *b, int64_t rows)
{
    pair_lanes pp = {0}, qq = {0}, pq = {0};
    for (int64_t r = 0; r < rows; r += PAIR_LANES) {
        const int64_t left = rows - r;
        const size_t bytes = (size_t)(left < PAIR_LANES ? left : PAIR_LANES) * sizeof *a;
        pair_lanes x = {0}, y = {0};
        if (bytes == sizeof x) { /* a size that the compiler knows */
            memcpy(&x, a + r, sizeof x);
            memcpy(&y, b + r, sizeof y);
        }
        else {
            memcpy(&x, a + r, bytes);
            memcpy(&y, b + r, bytes);
        }
        const pair_lanes p = x * x - y * y, q = x * y;
        pp += p * p;
        qq += q * q;
        pq += p * q;
    }
    return (struct sq_pair_sums){sum_of_pairs(&pp), sum_of_pairs(&qq), sum_of_pairs(&pq)};
}

/* a <- c a - s b, b <- s a + c b. */
static inline void
rotate_pairs(double *restrict a, double *restrict b, int64_t rows, double c, double s)
{
    for (int64_t r = 0; r < rows; r++) {
        const double va = a[r], vb = b[r];
        a[r] = c * va - s * vb;
        b[r] = s * va + c * vb;
    }
}

#endif
