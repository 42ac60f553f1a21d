/* SPDX-License-Identifier: Apache-2.0 */
/* AMX tiles in plain C, for tests on machines without them: the semantics of the Intel SDM (volume
 * 2, LDTILECFG, TILELOADD, TILESTORED, TILEZERO, TDPBSSD, TILERELEASE), palette 1. What the CPU
 * answers with #GP or #UD ends the process here, aloud. Never part of an ordinary build. */
#ifndef SQ_AMX_EMULATED_H
#define SQ_AMX_EMULATED_H

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { AMX_TILES = 8, AMX_ROWS = 16, AMX_COLSB = 64 };

struct amx_tile {
    int rows, colsb; /* 0: not configured */
    uint8_t data[AMX_ROWS][AMX_COLSB];
};

static _Thread_local struct amx_tile amx_tiles[AMX_TILES];

static inline void
amx_require(int holds, const char *what)
{
    if (!holds) {
        fprintf(stderr, "amx: %s\n", what);
        abort();
    }
}

static inline struct amx_tile *
amx_tile(int t)
{
    amx_require(t >= 0 && t < AMX_TILES && amx_tiles[t].rows, "the tile is not configured");
    return &amx_tiles[t];
}

/* Palette 1, restart row 0, 14 zeros; 16 x colsb (16 bits), 16 x rows (8 bits), of which the last 8
 * must be zero each. */
static inline void
amx_load_config(const void *config)
{
    const uint8_t *bytes = config;
    amx_require(bytes[0] == 1, "ldtilecfg: palette is not 1");
    for (int i = 1; i < 16; i++) {
        amx_require(!bytes[i], "ldtilecfg: restart row or reserved bytes are not zero");
    }
    for (int t = 0; t < 16; t++) {
        const int colsb = bytes[16 + 2 * t] | bytes[17 + 2 * t] << 8, rows = bytes[48 + t];
        amx_require(colsb <= AMX_COLSB && rows <= AMX_ROWS, "ldtilecfg: the tile is too large");
        amx_require(!rows == !colsb, "ldtilecfg: rows or columns alone are zero");
        amx_require(t < AMX_TILES || !rows, "ldtilecfg: more than 8 tiles");
        if (t < AMX_TILES) {
            amx_tiles[t] = (struct amx_tile){.rows = rows, .colsb = colsb};
        }
    }
}

static inline void
amx_release(void)
{
    memset(amx_tiles, 0, sizeof amx_tiles);
}

static inline void
amx_zero(int t)
{
    memset(amx_tile(t)->data, 0, sizeof amx_tiles[t].data);
}

static inline void
amx_load(int t, const void *from, int64_t stride_bytes)
{
    struct amx_tile *tile = amx_tile(t);
    amx_zero(t);
    for (int r = 0; r < tile->rows; r++) {
        memcpy(tile->data[r], (const uint8_t *)from + r * stride_bytes, (size_t)tile->colsb);
    }
}

static inline void
amx_store(int t, void *to, int64_t stride_bytes)
{
    const struct amx_tile *tile = amx_tile(t);
    for (int r = 0; r < tile->rows; r++) {
        memcpy((uint8_t *)to + r * stride_bytes, tile->data[r], (size_t)tile->colsb);
    }
}

/* c [i][j] += sum over k and 4 bytes b of a [i][4 k + b], times w [k][4 j + b], all signed. */
static inline void
amx_dpbssd(int c, int a, int w)
{
    struct amx_tile *sums = amx_tile(c);
    const struct amx_tile *first = amx_tile(a), *second = amx_tile(w);
    amx_require(c != a && c != w && a != w, "tdpbssd: a tile is used twice");
    amx_require(sums->rows == first->rows, "tdpbssd: rows of sums and first factor differ");
    amx_require(sums->colsb == second->colsb, "tdpbssd: columns of sums and second factor differ");
    amx_require(first->colsb == 4 * second->rows, "tdpbssd: the factors' inner sizes differ");
    amx_require(sums->colsb % 4 == 0, "tdpbssd: columns are not dwords");
    for (int i = 0; i < sums->rows; i++) {
        uint32_t row[AMX_COLSB / 4]; /* wraps around, as the instruction does */
        memcpy(row, sums->data[i], sizeof row);
        for (int k = 0; k < second->rows; k++) {
            for (int j = 0; j < sums->colsb / 4; j++) {
                for (int b = 0; b < 4; b++) {
                    row[j] += (uint32_t)((int8_t)first->data[i][4 * k + b] *
                                         (int8_t)second->data[k][4 * j + b]);
                }
            }
        }
        memcpy(sums->data[i], row, sizeof row);
    }
}

#endif
