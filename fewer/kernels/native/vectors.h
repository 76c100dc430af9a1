// As many numbers at a time as fit a register of this processor: 16 with AVX-512, 8 with AVX2, otherwise 4.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef __AVX2__
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX2__)
#define LANES 8
#else
#define LANES 4
#endif

typedef float floats __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t ints __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t naturals __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

static inline floats load(const float *p) { return *(const floats *)p; }
static inline void store(float *p, floats v) { *(floats *)p = v; }
static inline floats splat(float x) { return x - (floats){0}; }

// Small integers from memory, widened. Compilers make poor code of the last form, so x86 gets its instructions.
#if LANES == 16
static inline ints load_uint8(const uint8_t *p) { return (ints)_mm512_cvtepu8_epi32(_mm_loadu_si128((const void *)p)); }
static inline ints load_int8_codes(const int8_t *p) { return (ints)_mm512_cvtepi8_epi32(_mm_loadu_si128((const void *)p)); }
static inline naturals load_uint16(const uint16_t *p) {
    return (naturals)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)p));
}
#elif LANES == 8
static inline ints load_uint8(const uint8_t *p) { return (ints)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const void *)p)); }
static inline ints load_int8_codes(const int8_t *p) { return (ints)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const void *)p)); }
static inline naturals load_uint16(const uint16_t *p) {
    return (naturals)_mm256_cvtepu16_epi32(_mm_loadu_si128((const void *)p));
}
#else
static inline ints load_uint8(const uint8_t *p) { return (ints){p[0], p[1], p[2], p[3]}; }
static inline ints load_int8_codes(const int8_t *p) { return (ints){p[0], p[1], p[2], p[3]}; }
static inline naturals load_uint16(const uint16_t *p) { return (naturals){p[0], p[1], p[2], p[3]}; }
#endif

// To nearest, ties to even; and the low bytes of small integers to memory.
static inline ints to_nearest(floats v) {
#if LANES == 16
    return (ints)_mm512_cvtps_epi32((__m512)v);
#elif LANES == 8
    return (ints)_mm256_cvtps_epi32((__m256)v);
#else
    return (ints){(int32_t)lrintf(v[0]), (int32_t)lrintf(v[1]), (int32_t)lrintf(v[2]), (int32_t)lrintf(v[3])};
#endif
}
static inline void store_int8(int8_t *p, ints v) {
#if LANES == 16
    _mm_storeu_si128((void *)p, _mm512_cvtepi32_epi8((__m512i)v));
#else
    for (int i = 0; i < LANES; i++) p[i] = (int8_t)v[i];
#endif
}

static inline floats load_bfloat16(const uint16_t *p) { return (floats)(load_uint16(p) << 16); }
static inline floats load_int8(const int8_t *p) { return __builtin_convertvector(load_int8_codes(p), floats); }

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
static inline floats maximum(floats a, floats b) {
    ints above = a > b;
    return (floats)(((ints)a & above) | ((ints)b & ~above));
}

static inline float sum(floats v) {
#if LANES == 16
    v += __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
    v += __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
#elif LANES == 8
    v += __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3);
#endif
    return (v[0] + v[2]) + (v[1] + v[3]);
}

static inline float largest(floats v) {
    float most = v[0];
    for (int i = 1; i < LANES; i++) most = v[i] > most ? v[i] : most;
    return most;
}

// Lane i of the result is the sum of the lanes of v[i]: rounds of folding pairs of vectors. v is spoiled.
static inline floats sums_of_lanes(floats *v) {
#if LANES == 16
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
#elif LANES == 8
    for (int i = 0; i < 4; i++)
        v[i] = __builtin_shufflevector(v[i], v[i + 4], 0, 1, 2, 3, 8, 9, 10, 11) +
               __builtin_shufflevector(v[i], v[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
    for (int i = 0; i < 2; i++)
        v[i] = __builtin_shufflevector(v[i], v[i + 2], 0, 1, 8, 9, 4, 5, 12, 13) +
               __builtin_shufflevector(v[i], v[i + 2], 2, 3, 10, 11, 6, 7, 14, 15);
    return __builtin_shufflevector(v[0], v[1], 0, 8, 2, 10, 4, 12, 6, 14) +
           __builtin_shufflevector(v[0], v[1], 1, 9, 3, 11, 5, 13, 7, 15);
#else
    floats result = {0};
    for (int i = 0; i < LANES; i++) result[i] = sum(v[i]);
    return result;
#endif
}

// e^x for x <= 88, relative error below 2e-7: x = n·ln 2 + r, and a polynomial of e^r; 0 below -87. NaN stays NaN.
static inline floats exponential(floats x) {
    ints low = x < splat(-87.0f);
    x = maximum(splat(-87.0f), x);
    ints n = __builtin_convertvector(x * 1.44269504f + splat(128.5f), ints) - 128;  // floor(x / ln 2 + 1/2)
    floats whole = __builtin_convertvector(n, floats);
    floats r = x - whole * 0.693359375f + whole * 2.12194440e-4f;
    floats p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    floats power = (floats)((n + 127) << 23);
    return (floats)((ints)(p * power) & ~low);
}
