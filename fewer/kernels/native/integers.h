// Tiles of four-bit weights times eight-bit x: the products of a group are sums of small integers, exact whatever their order, and
// one instruction adds up 64 of them (vpdpbusd). x is rounded once for every row and SHORTEST_GROUP columns:
//     x ≈ s·q,   s = max |x| / 127,   q = round(x / s)
// as llama.cpp rounds it (Q8_0). Without those instructions the same integers are summed one by one.
#pragma once
#include "rows.h"

// Rows of x, rounded -> codes, scale and sums.
static void round_rows(const Rows *rows, int columns) {
    for (int row = 0; row < rows->count; row++)
        for (int start = 0, group = row * rows->groups; start < columns; start += SHORTEST_GROUP, group++) {
            const float *x = rows->x + row * rows->stride + start;
            int8_t *codes = rows->codes + row * rows->stride + start;
            floats most = splat(0), total = splat(0);
            for (int at = 0; at < SHORTEST_GROUP; at += LANES) most = maximum(most, maximum(load(x + at), -load(x + at)));
            const float top = largest(most), inverse = top > 0 ? 127 / top : 0;
            for (int at = 0; at < SHORTEST_GROUP; at += LANES) {
                const ints nearest = to_nearest(load(x + at) * inverse);
                store_int8(codes + at, nearest);
                total += __builtin_convertvector(nearest, floats);
            }
            rows->scale[group] = top / 127;
            rows->sums[group] = sum(total) * (top / 127);
        }
}

#if LANES == 16 && defined(__AVX512VNNI__) && defined(__AVX512VBMI__)
#define QUADS 1
// Four columns of a tile of 64 rows -> the codes of 16 rows in each of four vectors, four columns of a row side by side.
static inline void four_columns(const uint8_t *codes, __m512i v[4]) {
    static const uint8_t order[64] = {
#define QUAD(R) R, 32 + R, 64 + R, 96 + R
        QUAD(0), QUAD(1), QUAD(2), QUAD(3), QUAD(4), QUAD(5), QUAD(6), QUAD(7),
        QUAD(8), QUAD(9), QUAD(10), QUAD(11), QUAD(12), QUAD(13), QUAD(14), QUAD(15)
#undef QUAD
    };
    const __m512i first = _mm512_loadu_si512(order), second = _mm512_add_epi8(first, _mm512_set1_epi8(16));
    const __m512i a = _mm512_loadu_si512(codes), b = _mm512_loadu_si512(codes + 64), nibble = _mm512_set1_epi8(15);
    const __m512i low = _mm512_permutex2var_epi8(a, first, b), high = _mm512_permutex2var_epi8(a, second, b);
    v[0] = _mm512_and_si512(low, nibble);
    v[1] = _mm512_and_si512(high, nibble);
    v[2] = _mm512_and_si512(_mm512_srli_epi16(low, 4), nibble);
    v[3] = _mm512_and_si512(_mm512_srli_epi16(high, 4), nibble);
}
#else
#define QUADS 0
#endif

// `int4_tile` for rounded x: every SHORTEST_GROUP columns add s·s_x·Σ q·x + (z - 8·s)·sums, with sums = s_x·Σ x.
FOLDED void rounded_tile(const Part *part, int tile, const Rows *x, float *y, size_t stride, const int half, const int count) {
    const uint8_t *codes = (const uint8_t *)part->weight + (size_t)tile * part->copies * part->columns * LANES * half;
    const uint16_t *pairs = part->scale + (size_t)tile * 4 * LANES * half;
    float total[MOST_AT_ONCE][64 / LANES][LANES] = {0};  // kept in memory: the registers are for the dot products
    for (int start = 0; start < part->copies * part->columns; start += SHORTEST_GROUP) {
        const int at = start % part->columns, group = at / SHORTEST_GROUP;
        ints whole[MOST_AT_ONCE][64 / LANES] = {0};
#if QUADS
        for (int column = at; column < at + SHORTEST_GROUP; column += 4, codes += 128) {
            __m512i v[4];
            four_columns(codes, v);
            UNROLLED for (int row = 0; row < count; row++) {
                int32_t four;
                memcpy(&four, x->codes + row * x->stride + column, 4);
                UNROLLED for (int i = 0; i < 4; i++)
                    whole[row][i] = (ints)_mm512_dpbusd_epi32((__m512i)whole[row][i], v[i], _mm512_set1_epi32(four));
            }
        }
#else
        for (int column = at; column < at + SHORTEST_GROUP; column++, codes += LANES * half)
            UNROLLED for (int i = 0; i < half; i++) {
                const ints v = load_uint8(codes + LANES * i);
                UNROLLED for (int row = 0; row < count; row++) {
                    const int32_t factor = x->codes[row * x->stride + column];
                    whole[row][i] += (v & 15) * factor;
                    whole[row][i + half] += (v >> 4) * factor;
                }
            }
#endif
        UNROLLED for (int i = 0; i < 2 * half; i++) {
            const naturals pair = *(const naturals *)(pairs + 2 * LANES * i);
            const floats scale = (floats)(pair << 16), offset = (floats)(pair & 0xffff0000u) - 8 * scale;
            UNROLLED for (int row = 0; row < count; row++) {
                const floats dot = __builtin_convertvector(whole[row][i], floats) * x->scale[row * x->groups + group];
                store(total[row][i], load(total[row][i]) + scale * dot + offset * x->sums[row * x->groups + group]);
            }
        }
        __asm__ volatile("" ::: "memory");
        if ((start + SHORTEST_GROUP) % part->group == 0) pairs += 2 * (size_t)part->padded;
    }
    UNROLLED for (int row = 0; row < count; row++)
        UNROLLED for (int i = 0; i < 2 * half; i++) store(y + row * stride + LANES * i, load(total[row][i]));
}
