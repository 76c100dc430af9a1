// What a product reads: parts of a matrix as PyTorch's CPU kernels hold them, and a few rows of x.
#pragma once
#include "vectors.h"

enum { FLOAT32, BFLOAT16, INT8, INT4 };

typedef struct {
    int32_t kind, rows, columns;  // columns: what x has
    int32_t group;                // INT4: columns that share a scale and a zero
    int32_t copies;               // INT4: how often W's columns repeat those of x (2: int8 as two halves)
    int32_t tile;                 // INT4: rows stored together, 32 or 64
    int32_t padded;               // INT4: rows, in whole tiles
    const void *weight;           // [rows, columns]; INT4: [tiles, copies · columns, tile / 2] bytes
    const uint16_t *scale;        // INT8: [rows]; INT4: (scale, zero) [copies · columns / group, padded, 2]
    const float *bias;            // [rows] or NULL
} Part;

typedef struct {
    int32_t parts;
    const Part *part;  // stacked along the rows
} Matrix;

typedef struct {
    const float *x;  // row i at x + i · stride
    size_t stride;
    int count;
    float *sums;     // room for [count, groups]: of x over the columns of a group
    int groups;
    int8_t *codes;   // NULL, or room for x rounded to eight bits: row i at codes + i · stride …
    float *scale;    // … and its scales [count, groups]
} Rows;

enum { SHORTEST_GROUP = 32, MOST_AT_ONCE = 6, AHEAD = 8 };  // AHEAD: rows of a plain matrix that are fetched beforehand

// With a function's last arguments known, loops over them unroll, and their arrays are registers.
#define FOLDED static inline __attribute__((always_inline))
#ifdef __clang__
#define UNROLLED _Pragma("unroll")
#else
#define UNROLLED _Pragma("GCC unroll 8")
#endif

// From this row on.
static inline Rows rows_from(const Rows *rows, int from, int to) {
    const size_t groups = (size_t)from * rows->groups;
    return (Rows){rows->x + from * rows->stride, rows->stride, to - from, rows->sums + groups, rows->groups,
                  rows->codes ? rows->codes + from * rows->stride : NULL, rows->scale ? rows->scale + groups : NULL};
}
