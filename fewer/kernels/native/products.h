// y = x Wᵀ + b for one row x, float32 throughout; W [rows, columns] stays as PyTorch's CPU kernels hold it, so that prefill
// and decoding share one copy. Every thread computes its own rows, and a row's sum does not depend on who computes it.
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

enum { SHORTEST_GROUP = 32, LANES = 16 };

// The four-bit code in each lane, as a float: of the low nibble, or of the high one. Higher bits of a lane are zero.
static inline f32x16 low_nibbles(i32x16 v) {
#ifdef __AVX512F__
    const __m512 numbers = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return (f32x16)_mm512_permutexvar_ps((__m512i)v, numbers);  // reads four bits of each index
#else
    return __builtin_convertvector(v & 15, f32x16);
#endif
}

static inline f32x16 high_nibbles(i32x16 v) {
#ifdef __AVX512F__
    return low_nibbles((i32x16)((u32x16)v >> 4));
#else
    return __builtin_convertvector(v >> 4, f32x16);
#endif
}

// One tile of 32·HALF rows: byte i of a column holds row i (low nibble) and row i + 16·HALF (high).
// w = (q - 8)·s + z, so a group adds s·(Σ q·x - 8·Σ x) + z·Σ x: one product a weight.
#define INT4_TILE(NAME, HALF)                                                                                       \
    static inline void NAME(const Part *part, int tile, const float *x, const float *sums, float *y) {               \
        const uint8_t *codes = (const uint8_t *)part->weight +                                                       \
                               (size_t)tile * part->copies * part->columns * 16 * HALF;                              \
        const uint16_t *pairs = part->scale + (size_t)tile * 64 * HALF;                                              \
        f32x16 total[2 * HALF] = {0};                                                                                \
        for (int copy = 0; copy < part->copies; copy++)                                                              \
            for (int start = 0; start < part->columns; start += part->group) {                                       \
                f32x16 dot[2 * HALF] = {0};                                                                          \
                for (int column = start; column < start + part->group; column++, codes += 16 * HALF)                 \
                    for (int i = 0; i < HALF; i++) {                                                                 \
                        i32x16 v = load_uint8(codes + 16 * i);                                                       \
                        dot[i] += low_nibbles(v) * x[column];                                                        \
                        dot[i + HALF] += high_nibbles(v) * x[column];                                                \
                    }                                                                                                \
                const float whole = sums[start / part->group];                                                       \
                for (int i = 0; i < 2 * HALF; i++) {                                                                 \
                    u32x16 pair = *(const u32x16 *)(pairs + 32 * i);                                                 \
                    f32x16 scale = (f32x16)(pair << 16), zero = (f32x16)(pair & 0xffff0000u);                        \
                    total[i] += scale * (dot[i] - 8 * whole) + zero * whole;                                         \
                }                                                                                                    \
                pairs += 2 * (size_t)part->padded;                                                                   \
            }                                                                                                        \
        for (int i = 0; i < 2 * HALF; i++) store(y + 16 * i, total[i]);                                              \
    }
INT4_TILE(int4_tile_of_32, 1)
INT4_TILE(int4_tile_of_64, 2)

// `count` rows (at most 4) from `row` on, whose elements `LOAD` reads sixteen at a time and `ONE` singly.
#define DENSE_ROWS(NAME, TYPE, LOAD, ONE)                                                                           \
    static inline void NAME(const Part *part, int row, int count, const float *x, float *y) {                        \
        const TYPE *weight = (const TYPE *)part->weight + (size_t)row * part->columns;                               \
        const int columns = part->columns, whole = columns & ~15;                                                    \
        f32x16 dot[4] = {0};                                                                                         \
        if (count == 4)                                                                                              \
            for (int at = 0; at < whole; at += LANES)                                                                \
                for (int i = 0; i < 4; i++) dot[i] += LOAD(weight + (size_t)i * columns + at) * load(x + at);        \
        else                                                                                                         \
            for (int i = 0; i < count; i++)                                                                          \
                for (int at = 0; at < whole; at += LANES) dot[i] += LOAD(weight + (size_t)i * columns + at) * load(x + at); \
        for (int i = 0; i < count; i++) {                                                                            \
            y[i] = sum(dot[i]);                                                                                      \
            for (int at = whole; at < columns; at++) y[i] += ONE(weight[(size_t)i * columns + at]) * x[at];          \
        }                                                                                                            \
    }
DENSE_ROWS(rows_of_float32, float, load, )
DENSE_ROWS(rows_of_bfloat16, uint16_t, load_bfloat16, bfloat16)
DENSE_ROWS(rows_of_int8, int8_t, load_int8, )

// This thread's part of `units` equal ones: [first, last).
static inline void share(int units, int thread, int threads, int *first, int *last) {
    *first = (int)((int64_t)units * thread / threads);
    *last = (int)((int64_t)units * (thread + 1) / threads);
}

static void part_product(const Part *part, const float *x, const float *sums, int thread, int threads, float *y) {
    int height = part->kind == INT4 ? part->tile : 4, first, last;
    share((part->rows + height - 1) / height, thread, threads, &first, &last);
    for (int unit = first; unit < last; unit++) {
        int row = unit * height, count = part->rows - row < height ? part->rows - row : height;
        float partial[64], *out = count == height ? y + row : partial;
        if (part->kind == INT4) {
            if (part->tile == 64)
                int4_tile_of_64(part, unit, x, sums, out);
            else
                int4_tile_of_32(part, unit, x, sums, out);
        } else if (part->kind == FLOAT32) {
            rows_of_float32(part, row, count, x, out);
        } else if (part->kind == BFLOAT16) {
            rows_of_bfloat16(part, row, count, x, out);
        } else {
            rows_of_int8(part, row, count, x, out);
            for (int i = 0; i < count; i++) out[i] *= bfloat16(part->scale[row + i]);
        }
        if (out == partial) memcpy(y + row, partial, sizeof(float) * count);
        if (part->bias)
            for (int i = 0; i < count; i++) y[row + i] += part->bias[row + i];
    }
}

// This thread's rows of x Wᵀ + b into y [rows]; `sums` has room for the sums of x over the shortest groups.
static void product(const Matrix *matrix, const float *x, float *sums, int thread, int threads, float *y) {
    int group = 0;  // of the sums
    for (int i = 0; i < matrix->parts; i++) {
        const Part *part = matrix->part + i;
        if (part->kind == INT4 && part->group != group) {
            group = part->group;
            for (int start = 0; start < part->columns; start += group) {
                f32x16 total = load(x + start);
                for (int at = LANES; at < group; at += LANES) total += load(x + start + at);
                sums[start / group] = sum(total);
            }
        }
        part_product(part, x, sums, thread, threads, y);
        y += part->rows;
    }
}
