/* SPDX-License-Identifier: Apache-2.0 */
/* Two columns of float64 that a Givens rotation mixes. Plain C that is compiled for each
 * instruction set; products and sums are rounded one by one in a fixed order, so that all give the
 * same bits. */
#ifndef COLUMN_PAIRS_H
#define COLUMN_PAIRS_H

#include <stdint.h>

/* Sums over two columns a and b, of p = a^2 - b^2 and q = a b. */
struct sq_pair_sums {
    double pp, qq, pq;
};

static inline struct sq_pair_sums
sum_pairs(const double *restrict a, const double *restrict b, int64_t rows)
{
    enum { LANES = 4 };
    double pp[LANES] = {0}, qq[LANES] = {0}, pq[LANES] = {0};
    int64_t r = 0;
    for (; r + LANES <= rows; r += LANES) {
        for (int l = 0; l < LANES; l++) {
            const double p = a[r + l] * a[r + l] - b[r + l] * b[r + l], q = a[r + l] * b[r + l];
            pp[l] += p * p;
            qq[l] += q * q;
            pq[l] += p * q;
        }
    }
    for (int l = 0; r < rows; r++, l++) {
        const double p = a[r] * a[r] - b[r] * b[r], q = a[r] * b[r];
        pp[l] += p * p;
        qq[l] += q * q;
        pq[l] += p * q;
    }
    return (struct sq_pair_sums){(pp[0] + pp[2]) + (pp[1] + pp[3]),
                                 (qq[0] + qq[2]) + (qq[1] + qq[3]),
                                 (pq[0] + pq[2]) + (pq[1] + pq[3])};
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
