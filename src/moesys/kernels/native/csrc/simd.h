// Vectors of floats in the compiler's own extension: one source for AVX-512, AVX2, SSE2 and NEON.
//
// LANES floats per vector. A dot product keeps one partial sum per lane and adds the lanes in one fixed tree, so
// that its bits depend on the vector width and on nothing else: not on how many rows are computed together.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX512BW__)
#include <immintrin.h>
#define LANES 16
#define TILE_ROWS 6
#elif defined(__AVX2__)
#include <immintrin.h>
#define LANES 8
#define TILE_ROWS 2
#else
#define LANES 4
#define TILE_ROWS 2
#endif

// Weight rows computed together. With a gate, half of them are gate rows and half up rows.
#define TILE_COLUMNS 4

// Up to so many activation rows, weight rows are read one after the other, as one stream, and fetched so many bytes
// ahead of it; with more rows the tile's are read side by side, each for all activation rows.
#define FEW_ROWS 2
#define STREAM_AHEAD 4096

// Fetches a line: one that is used for several tiles, or one of a stream that is used once and passes by the outer
// caches, which keep what runs between the calls.
#define FETCH(address) __builtin_prefetch(address)
#define FETCH_ONCE(address) __builtin_prefetch(address, 0, 0)

// Calls F with the number of activation rows as a constant, so that its loops over them unroll.
#if TILE_ROWS > 2
#define WITH_ROWS(rows, F, ...)        \
  switch (rows) {                      \
    case 1: F(1, __VA_ARGS__); break;  \
    case 2: F(2, __VA_ARGS__); break;  \
    case 3: F(3, __VA_ARGS__); break;  \
    case 4: F(4, __VA_ARGS__); break;  \
    case 5: F(5, __VA_ARGS__); break;  \
    default: F(6, __VA_ARGS__); break; \
  }
#else
#define WITH_ROWS(rows, F, ...)        \
  switch (rows) {                      \
    case 1: F(1, __VA_ARGS__); break;  \
    default: F(2, __VA_ARGS__); break; \
  }
#endif

// A function whose loops are as fast wherever the compiler puts it; without this they vary by a tenth.
#define ALIGNED static __attribute__((aligned(64)))

#define INLINE static inline __attribute__((always_inline))

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t vec_i32 __attribute__((vector_size(4 * LANES)));
typedef uint32_t vec_u32 __attribute__((vector_size(4 * LANES)));
typedef uint16_t vec_u16 __attribute__((vector_size(2 * LANES)));
typedef int8_t vec_i8 __attribute__((vector_size(LANES)));

INLINE vec splat(float value) { return value - (vec){0}; }

INLINE vec load(const float *source) {
  vec v;
  memcpy(&v, source, sizeof v);
  return v;
}

INLINE void store(float *target, vec v) { memcpy(target, &v, sizeof v); }

#if LANES == 16
INLINE vec load_bf16(const uint16_t *source) {
  __m512i bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)source));
  return (vec)_mm512_slli_epi32(bits, 16);
}
INLINE vec load_i8(const int8_t *source) {
  return (vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const void *)source)));
}
#elif LANES == 8
INLINE vec load_bf16(const uint16_t *source) {
  __m256i bits = _mm256_cvtepu16_epi32(_mm_loadu_si128((const void *)source));
  return (vec)_mm256_slli_epi32(bits, 16);
}
INLINE vec load_i8(const int8_t *source) {
  return (vec)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const void *)source)));
}
#else
INLINE vec load_bf16(const uint16_t *source) {
  vec_u16 half;
  memcpy(&half, source, sizeof half);
  return (vec)(__builtin_convertvector(half, vec_u32) << 16);
}
INLINE vec load_i8(const int8_t *source) {
  vec_i8 bytes;
  memcpy(&bytes, source, sizeof bytes);
  return __builtin_convertvector(__builtin_convertvector(bytes, vec_i32), vec);
}
#endif

// Numbers in [-127, 127], rounded to whole ones, ties to even, as bytes.
INLINE void store_i8(int8_t *target, vec v) {
#if LANES == 16
  _mm_storeu_si128((void *)target, _mm512_cvtepi32_epi8(_mm512_cvtps_epi32((__m512)v)));
#else
  for (int lane = 0; lane < LANES; lane++) target[lane] = (int8_t)lrintf(v[lane]);
#endif
}

INLINE float widen_bf16(uint16_t half) {
  uint32_t bits = (uint32_t)half << 16;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

// The first `count` elements, zeros behind them.
INLINE vec load_head(const float *source, int count) {
  vec v = {0};
  memcpy(&v, source, 4 * (size_t)count);
  return v;
}

INLINE vec load_bf16_head(const uint16_t *source, int count) {
  uint16_t padded[LANES] = {0};
  memcpy(padded, source, 2 * (size_t)count);
  return load_bf16(padded);
}

// The nearest bfloat16 numbers, ties to even; NaN stays NaN. As torch rounds, subnormal numbers too, which the CPU's own
// instruction takes for zero.
INLINE vec round_to_bf16(vec v) {
  vec_u32 bits = (vec_u32)v, rounded = (bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000;
  vec_u32 is_nan = (vec_u32)(v != v);
  return (vec)((is_nan & (bits | 0x00400000) & 0xffff0000) | (~is_nan & rounded));
}

// Stores the first `count` of numbers that are bfloat16 already.
INLINE void store_bf16_head(uint16_t *target, vec v, int count) {
#if LANES == 16
  __m256i halves = _mm512_cvtepi32_epi16(_mm512_srli_epi32((__m512i)v, 16));
#else
  vec_u16 halves = __builtin_convertvector((vec_u32)v >> 16, vec_u16);
#endif
  memcpy(target, &halves, 2 * (size_t)count);
}

// Rounds the results of a tile to bfloat16.
INLINE void round_tile(int rows, float result[][TILE_COLUMNS], uint16_t *halves) {
  int count = rows * TILE_COLUMNS, i = 0;
  for (; i + LANES <= count; i += LANES) store_bf16_head(halves + i, round_to_bf16(load(result[0] + i)), LANES);
  if (i < count) store_bf16_head(halves + i, round_to_bf16(load_head(result[0] + i, count - i)), count - i);
}

#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (vec_i32){__VA_ARGS__})
#endif

// Adds the lanes of each of four vectors; result i is the sum of v[i].
INLINE void sum_lanes_of_4(const vec v[4], float result[4]) {
#if LANES == 16
#define LOW 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23
#define HIGH 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31
  vec first = SHUFFLE(v[0], v[1], LOW) + SHUFFLE(v[0], v[1], HIGH);
  vec second = SHUFFLE(v[2], v[3], LOW) + SHUFFLE(v[2], v[3], HIGH);
  vec quads = SHUFFLE(first, second, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
              SHUFFLE(first, second, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
  quads += SHUFFLE(quads, quads, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
  quads += SHUFFLE(quads, quads, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
  quads = SHUFFLE(quads, quads, 0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12);
  memcpy(result, &quads, 16);
#undef LOW
#undef HIGH
#elif LANES == 8
  vec first = SHUFFLE(v[0], v[1], 0, 1, 2, 3, 8, 9, 10, 11) + SHUFFLE(v[0], v[1], 4, 5, 6, 7, 12, 13, 14, 15);
  vec second = SHUFFLE(v[2], v[3], 0, 1, 2, 3, 8, 9, 10, 11) + SHUFFLE(v[2], v[3], 4, 5, 6, 7, 12, 13, 14, 15);
  first += SHUFFLE(first, first, 2, 3, 0, 1, 6, 7, 4, 5);
  second += SHUFFLE(second, second, 2, 3, 0, 1, 6, 7, 4, 5);
  first += SHUFFLE(first, first, 1, 0, 3, 2, 5, 4, 7, 6);
  second += SHUFFLE(second, second, 1, 0, 3, 2, 5, 4, 7, 6);
  result[0] = first[0];
  result[1] = first[4];
  result[2] = second[0];
  result[3] = second[4];
#else
  for (int i = 0; i < 4; i++) result[i] = (v[i][0] + v[i][2]) + (v[i][1] + v[i][3]);
#endif
}

// Numbers between two bounds; NaN stays NaN.
INLINE vec clamp(vec x, vec low, vec high) {
#if LANES == 16
  return (vec)_mm512_max_ps((__m512)low, _mm512_min_ps((__m512)high, (__m512)x));
#else
  vec_i32 below = x < low, above = x > high;
  x = (vec)((below & (vec_i32)low) | (~below & (vec_i32)x));
  return (vec)((above & (vec_i32)high) | (~above & (vec_i32)x));
#endif
}

// Adds the lanes of the sums of `rows` rows by four weight rows.
INLINE void sum_tile(const int rows, const vec sums[][TILE_COLUMNS], float result[][TILE_COLUMNS]) {
  int i = 0;
#if LANES == 16
#pragma GCC unroll 2
  for (; i + 4 <= rows; i += 4) {
    // The tree of `sum_lanes_of_4` for sixteen at once: halves, quarters, pairs, then neighbours.
    vec halves[8], quarters[4], pairs[2];
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++)
#pragma GCC unroll 2
      for (int h = 0; h < 2; h++) {
        vec a = sums[i + 2 * h][j], b = sums[i + 2 * h + 1][j];
        halves[2 * j + h] = (vec)_mm512_shuffle_f32x4((__m512)a, (__m512)b, 0x44) +
                            (vec)_mm512_shuffle_f32x4((__m512)a, (__m512)b, 0xee);
      }
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++)
      quarters[j] = (vec)_mm512_shuffle_f32x4((__m512)halves[2 * j], (__m512)halves[2 * j + 1], 0x88) +
                    (vec)_mm512_shuffle_f32x4((__m512)halves[2 * j], (__m512)halves[2 * j + 1], 0xdd);
#pragma GCC unroll 2
    for (int h = 0; h < 2; h++)
      pairs[h] = (vec)_mm512_shuffle_ps((__m512)quarters[2 * h], (__m512)quarters[2 * h + 1], 0x44) +
                 (vec)_mm512_shuffle_ps((__m512)quarters[2 * h], (__m512)quarters[2 * h + 1], 0xee);
    store(result[i], (vec)_mm512_shuffle_ps((__m512)pairs[0], (__m512)pairs[1], 0x88) +
                         (vec)_mm512_shuffle_ps((__m512)pairs[0], (__m512)pairs[1], 0xdd));
  }
#endif
#pragma GCC unroll 8
  for (; i < rows; i++) sum_lanes_of_4(sums[i], result[i]);
}

// exp(x) to about 1 ulp in float32, infinite from 88.4 on: 2^n times a polynomial on [-ln2/2, ln2/2] (coefficients of Cephes' expf).
INLINE vec exp_vec(vec x) {
  x = clamp(x, splat(-87.0f), splat(89.0f));
  const vec rounder = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  vec n = (x * 1.44269504088896341f + rounder) - rounder;
  vec r = x - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  vec p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  vec_i32 exponent = (__builtin_convertvector(n, vec_i32) + 127) << 23;
  return p * (vec)exponent;
}

INLINE vec sigmoid_vec(vec x) { return 1.0f / (1.0f + exp_vec(-x)); }
