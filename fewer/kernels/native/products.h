// Y = X Wᵀ + b for a few rows x of X, float32 throughout. W [rows, columns] stays as PyTorch's CPU kernels hold it, so that
// prefill and decoding share one copy. Every thread computes its own rows of W. A sum is added up in the same order
// whoever computes it and however many x there are, so that verifying a draft gives the numbers of plain decoding.
#pragma once
#include "integers.h"

// The four-bit code in each lane, as a float: of the low nibble, or of the high one. Higher bits of a lane are zero.
static inline floats low_nibbles(ints v) {
#if LANES == 16
    const __m512 numbers = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return (floats)_mm512_permutexvar_ps((__m512i)v, numbers);  // reads four bits of each index
#else
    return __builtin_convertvector(v & 15, floats);
#endif
}

static inline floats high_nibbles(ints v) {
#if LANES == 16
    return low_nibbles((ints)((naturals)v >> 4));
#else
    return __builtin_convertvector(v >> 4, floats);
#endif
}

// One tile of W, 2·half·LANES rows: byte i of a column holds row i (low nibble) and row i + half·LANES (high).
// w = (q - 8)·s + z, so a group adds s·(Σ q·x - 8·Σ x) + z·Σ x: one product a weight.
FOLDED void int4_tile(const Part *part, int tile, const Rows *rows, float *y, size_t stride, const int half, const int count) {
    const uint8_t *codes = (const uint8_t *)part->weight + (size_t)tile * part->copies * part->columns * LANES * half;
    const uint16_t *pairs = part->scale + (size_t)tile * 4 * LANES * half;
    float total[MOST_AT_ONCE][64 / LANES][LANES] = {0};  // kept in memory: the registers are for the dot products
    for (int copy = 0; copy < part->copies; copy++)
        for (int start = 0; start < part->columns; start += part->group) {
            floats dot[MOST_AT_ONCE][64 / LANES] = {0};
            const float *x = rows->x + start;
            for (int column = 0; column < part->group; column++, codes += LANES * half, x++)
                UNROLLED for (int i = 0; i < half; i++) {
                    ints v = load_uint8(codes + LANES * i);
                    floats low = low_nibbles(v), high = high_nibbles(v);
                    UNROLLED for (int row = 0; row < count; row++) {
                        dot[row][i] += low * x[row * rows->stride];
                        dot[row][i + half] += high * x[row * rows->stride];
                    }
                }
            UNROLLED for (int i = 0; i < 2 * half; i++) {
                naturals pair = *(const naturals *)(pairs + 2 * LANES * i);
                floats scale = (floats)(pair << 16), zero = (floats)(pair & 0xffff0000u);
                UNROLLED for (int row = 0; row < count; row++) {
                    const float whole = rows->sums[row * rows->groups + start / part->group];
                    store(total[row][i], load(total[row][i]) + scale * (dot[row][i] - 8 * whole) + zero * whole);
                }
            }
            __asm__ volatile("" ::: "memory");
            pairs += 2 * (size_t)part->padded;
        }
    UNROLLED for (int row = 0; row < count; row++)
        UNROLLED for (int i = 0; i < 2 * half; i++) store(y + row * stride + LANES * i, load(total[row][i]));
}

FOLDED floats load_weight(const Part *part, size_t at, const int kind) {
    if (kind == FLOAT32) return load((const float *)part->weight + at);
    return kind == BFLOAT16 ? load_bfloat16((const uint16_t *)part->weight + at) : load_int8((const int8_t *)part->weight + at);
}

FOLDED float one_weight(const Part *part, size_t at, const int kind) {
    if (kind == FLOAT32) return ((const float *)part->weight)[at];
    return kind == BFLOAT16 ? bfloat16(((const uint16_t *)part->weight)[at]) : ((const int8_t *)part->weight)[at];
}

// `height` rows of W from `first` on, stored one after another.
FOLDED void plain_rows(const Part *part, int first, const Rows *rows, float *y, size_t stride, const int kind, const int height,
                       const int count) {
    const int columns = part->columns, whole = columns & -LANES;
    const size_t base = (size_t)first * columns, bytes = kind == FLOAT32 ? 4 : kind == BFLOAT16 ? 2 : 1;
    floats dot[4][MOST_AT_ONCE] = {0};
    for (int at = 0; at < whole; at += LANES)
        UNROLLED for (int i = 0; i < height; i++) {
            const size_t place = base + (size_t)i * columns + at;
            __builtin_prefetch((const char *)part->weight + (place + AHEAD * (size_t)columns) * bytes);
            floats weight = load_weight(part, place, kind);
            UNROLLED for (int row = 0; row < count; row++) dot[i][row] += weight * load(rows->x + row * rows->stride + at);
        }
    UNROLLED for (int i = 0; i < height; i++)
        UNROLLED for (int row = 0; row < count; row++) {
            const float *x = rows->x + row * rows->stride;
            float total = sum(dot[i][row]);
            for (int at = whole; at < columns; at++) total += one_weight(part, base + (size_t)i * columns + at, kind) * x[at];
            y[row * stride + i] = kind == INT8 ? total * bfloat16(part->scale[first + i]) : total;
        }
}

// Four rows at once, or one by one at the end.
FOLDED void up_to_four_rows(const Part *part, int first, int height, const Rows *rows, float *y, size_t stride, const int kind,
                            const int count) {
    if (height == 4)
        plain_rows(part, first, rows, y, stride, kind, 4, count);
    else
        for (int i = 0; i < height; i++) plain_rows(part, first + i, rows, y + i, stride, kind, 1, count);
}

// One unit of a part: a tile, or four rows; of at most MOST_AT_ONCE rows x.
#define FOR_COUNT(CALL) \
    switch (rows->count) { \
        case 1: CALL(1); break; \
        case 2: CALL(2); break; \
        case 3: CALL(3); break; \
        case 4: CALL(4); break; \
        case 5: CALL(5); break; \
        default: CALL(6); \
    }
#define TILES(NAME) \
    static void NAME(const Part *part, int unit, const Rows *rows, float *y, size_t stride) { FOR_COUNT(CALL) }
#define CALL(COUNT) int4_tile(part, unit, rows, y, stride, 32 / LANES, COUNT)
TILES(tile_of_64)
#undef CALL
#define CALL(COUNT) int4_tile(part, unit, rows, y, stride, 16 / LANES, COUNT)
TILES(tile_of_32)
#undef CALL
#define CALL(COUNT) rounded_tile(part, unit, rows, y, stride, 32 / LANES, COUNT)
TILES(rounded_tile_of_64)
#undef CALL
#define CALL(COUNT) rounded_tile(part, unit, rows, y, stride, 16 / LANES, COUNT)
TILES(rounded_tile_of_32)
#undef CALL
#define PLAIN_ROWS(NAME, KIND) \
    static void NAME(const Part *part, int first, int height, const Rows *rows, float *y, size_t stride) { \
        FOR_COUNT(CALL) \
    }
#define CALL(COUNT) up_to_four_rows(part, first, height, rows, y, stride, FLOAT32, COUNT)
PLAIN_ROWS(rows_of_float32, FLOAT32)
#undef CALL
#define CALL(COUNT) up_to_four_rows(part, first, height, rows, y, stride, BFLOAT16, COUNT)
PLAIN_ROWS(rows_of_bfloat16, BFLOAT16)
#undef CALL
#define CALL(COUNT) up_to_four_rows(part, first, height, rows, y, stride, INT8, COUNT)
PLAIN_ROWS(rows_of_int8, INT8)
#undef CALL

// This thread's part of `units` equal ones: [first, last).
static inline void share(int units, int thread, int threads, int *first, int *last) {
    *first = (int)((int64_t)units * thread / threads);
    *last = (int)((int64_t)units * (thread + 1) / threads);
}

// One unit, from row `start` of W on, of which `present` are there, times at most MOST_AT_ONCE rows.
static void unit_product(const Part *part, int unit, int start, int present, const Rows *rows, float *y, size_t stride) {
    float partial[64 * MOST_AT_ONCE], *out = y + start;
    size_t step = stride;
    if (part->kind == INT4 && present < part->tile) out = partial, step = 64;  // the last tile is padded
    if (part->kind == FLOAT32)
        rows_of_float32(part, start, present, rows, out, step);
    else if (part->kind == BFLOAT16)
        rows_of_bfloat16(part, start, present, rows, out, step);
    else if (part->kind == INT8)
        rows_of_int8(part, start, present, rows, out, step);
    else if (part->tile == 64)
        (rows->codes ? rounded_tile_of_64 : tile_of_64)(part, unit, rows, out, step);
    else
        (rows->codes ? rounded_tile_of_32 : tile_of_32)(part, unit, rows, out, step);
    for (int row = 0; row < rows->count; row++) {
        float *into = y + row * stride + start;
        if (out == partial) memcpy(into, partial + row * step, sizeof(float) * present);
        if (part->bias)
            for (int i = 0; i < present; i++) into[i] += part->bias[start + i];
    }
}

// What is read of x beside itself: rounded, or the sums of its groups.
static void prepare_input(const Part *part, const Rows *all, int *group) {
    if (part->kind != INT4 || *group == part->group || *group == INT32_MAX) return;
    *group = part->group;
    if (all->codes) {
        *group = INT32_MAX;
        round_rows(all, part->columns);
        return;
    }
    for (int row = 0; row < all->count; row++)
        for (int start = 0; start < part->columns; start += part->group) {
            const float *x = all->x + row * all->stride + start;
            floats total = load(x);
            for (int at = LANES; at < part->group; at += LANES) total += load(x + at);
            all->sums[row * all->groups + start / part->group] = sum(total);
        }
}

// This thread's columns of X Wᵀ + b into y (row i at y + i · stride). A unit of W is read once for all rows.
static void product(const Matrix *matrix, const Rows *all, int thread, int threads, float *y, size_t stride) {
    const int blocks = (all->count + MOST_AT_ONCE - 1) / MOST_AT_ONCE;
    int prepared = 0;  // for groups of so many columns
    for (int i = 0; i < matrix->parts; i++) {
        const Part *part = matrix->part + i;
        const int height = part->kind == INT4 ? part->tile : 4;
        int first, last;
        prepare_input(part, all, &prepared);
        share((part->rows + height - 1) / height, thread, threads, &first, &last);
        for (int unit = first; unit < last; unit++) {
            const int start = unit * height, present = part->rows - start < height ? part->rows - start : height;
            for (int block = 0; block < blocks; block++) {
                int from, to;
                share(all->count, block, blocks, &from, &to);
                const Rows rows = rows_from(all, from, to);
                unit_product(part, unit, start, present, &rows, y + from * stride, stride);
            }
        }
        y += part->rows;
    }
}

// Row `index` of W -> out [columns].
static void decode_row(const Part *part, int index, float *out) {
    const size_t columns = part->columns;
    if (part->kind != INT4) {
        const float scale = part->kind == INT8 ? bfloat16(part->scale[index]) : 1;
        for (size_t at = 0; at < columns; at++) out[at] = scale * one_weight(part, index * columns + at, part->kind);
        return;
    }
    const int tile = index / part->tile, within = index % part->tile, bytes = part->tile / 2;
    const uint8_t *codes = (const uint8_t *)part->weight + (size_t)tile * part->copies * columns * bytes + within % bytes;
    const int shift = within < bytes ? 0 : 4;
    memset(out, 0, sizeof(float) * columns);
    for (size_t at = 0; at < part->copies * columns; at++) {
        const uint16_t *pair = part->scale + 2 * (at / part->group * part->padded + index);
        const int code = codes[at * bytes] >> shift & 15;
        out[at % columns] += (code - 8) * bfloat16(pair[0]) + bfloat16(pair[1]);
    }
}
