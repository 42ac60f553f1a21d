/* SPDX-License-Identifier: Apache-2.0 */
/* Tiles of a lower triangle as one list, for parallel loops. */
#ifndef SQ_TILES_H
#define SQ_TILES_H

#include <math.h>
#include <stdint.h>

/* Tiles of a triangle of n rows of tiles. */
static inline int64_t
sq_tiles(int64_t n)
{
    return n * (n + 1) / 2;
}

/* Tile t of the lower triangle, row by row: (0, 0), (1, 0), (1, 1), (2, 0) ... */
static inline void
sq_tile_place(int64_t t, int64_t *row, int64_t *column)
{
    int64_t i = (int64_t)((sqrt(8.0 * (double)t + 1.0) - 1.0) / 2.0);
    i -= i * (i + 1) / 2 > t;
    i += (i + 1) * (i + 2) / 2 <= t;
    *row = i;
    *column = t - i * (i + 1) / 2;
}

#endif
