// Sixteen numbers at a time. GCC and Clang lower these vectors to what the processor has: one AVX-512 register, two of
// AVX2, four of NEON.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

typedef float f32x16 __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t i32x16 __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint32_t u32x16 __attribute__((vector_size(64), aligned(4), may_alias));

static inline f32x16 load(const float *p) { return *(const f32x16 *)p; }
static inline void store(float *p, f32x16 v) { *(f32x16 *)p = v; }
static inline f32x16 splat(float x) { return x - (f32x16){0}; }

// Sixteen small integers from memory, widened. Compilers make poor code of the last form, so x86 gets its instructions.
#if defined(__AVX512F__)
static inline i32x16 load_uint8(const uint8_t *p) { return (i32x16)_mm512_cvtepu8_epi32(_mm_loadu_si128((const void *)p)); }
static inline i32x16 load_int8_codes(const int8_t *p) { return (i32x16)_mm512_cvtepi8_epi32(_mm_loadu_si128((const void *)p)); }
static inline u32x16 load_uint16(const uint16_t *p) { return (u32x16)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)p)); }
#else
#define WIDENED(NAME, FROM, INTO, ELEMENT)                 \
    static inline INTO NAME(const FROM *p) {               \
        ELEMENT wide[16];                                  \
        for (int i = 0; i < 16; i++) wide[i] = p[i];       \
        INTO result;                                       \
        memcpy(&result, wide, sizeof result);              \
        return result;                                     \
    }
WIDENED(load_uint8, uint8_t, i32x16, int32_t)
WIDENED(load_int8_codes, int8_t, i32x16, int32_t)
WIDENED(load_uint16, uint16_t, u32x16, uint32_t)
#endif

static inline f32x16 load_bfloat16(const uint16_t *p) { return (f32x16)(load_uint16(p) << 16); }
static inline f32x16 load_int8(const int8_t *p) { return __builtin_convertvector(load_int8_codes(p), f32x16); }

static inline float bfloat16(uint16_t bits) {
    uint32_t wide = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &wide, 4);
    return value;
}

// To nearest, ties to even, as PyTorch rounds; a NaN stays one.
static inline uint16_t to_bfloat16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    if (value != value) return 0x7fc0;
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// The larger; b where one is NaN.
static inline f32x16 maximum(f32x16 a, f32x16 b) {
    i32x16 above = a > b;
    return (f32x16)(((i32x16)a & above) | ((i32x16)b & ~above));
}

static inline float sum(f32x16 v) {
    v += __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
    v += __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
    return (v[0] + v[2]) + (v[1] + v[3]);
}

// Lane i of the result is the sum of the lanes of v[i]: four rounds of folding pairs of vectors. v is spoiled.
static inline f32x16 sums_of_16(f32x16 *v) {
    for (int i = 0; i < 8; i++)
        v[i] = __builtin_shufflevector(v[i], v[i + 8], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
               __builtin_shufflevector(v[i], v[i + 8], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    for (int i = 0; i < 4; i++)
        v[i] = __builtin_shufflevector(v[i], v[i + 4], 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27) +
               __builtin_shufflevector(v[i], v[i + 4], 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
    for (int i = 0; i < 2; i++)
        v[i] = __builtin_shufflevector(v[i], v[i + 2], 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
               __builtin_shufflevector(v[i], v[i + 2], 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
    return __builtin_shufflevector(v[0], v[1], 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30) +
           __builtin_shufflevector(v[0], v[1], 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
}

// e^x for x <= 88, relative error below 2e-7: x = n·ln 2 + r, and a polynomial of e^r; 0 below -87. NaN stays NaN.
static inline f32x16 exponential(f32x16 x) {
    i32x16 low = x < splat(-87.0f);
    x = maximum(splat(-87.0f), x);
    i32x16 n = __builtin_convertvector(x * 1.44269504f + splat(128.5f), i32x16) - 128;  // floor(x / ln 2 + 1/2)
    f32x16 whole = __builtin_convertvector(n, f32x16);
    f32x16 r = x - whole * 0.693359375f + whole * 2.12194440e-4f;
    f32x16 p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    f32x16 power = (f32x16)((n + 127) << 23);
    return (f32x16)((i32x16)(p * power) & ~low);
}
