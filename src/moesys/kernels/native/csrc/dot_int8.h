// Products of int8 activations with int8 weights, both in groups of 64 columns that share a scale.
//
// A group's products are exact in int32. Each lane's integer is then scaled and added to a float32 sum over groups.
#pragma once

#include "simd.h"

#define GROUP 64

// One row of rounded activations. With VNNI, weights are read as unsigned (value + 128) and `corrections` holds, per
// group and lane, -128 * sum of the lane's activations, which takes the offset out again.
typedef struct {
  const int8_t *values;
  const float *scales;
  const int32_t *corrections;
} int8_row;

#if defined(__AVX512VNNI__) && LANES == 16

INLINE void correct_group(const int8_t *x, int32_t *corrections) {
  __m512i sums = _mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_set1_epi8(1), _mm512_loadu_si512(x));
  _mm512_storeu_si512(corrections, _mm512_slli_epi32(_mm512_sub_epi32(_mm512_setzero_si512(), sums), 7));
}

typedef __m512i int8_group;
INLINE int8_group load_weight_group(const int8_t *w) {
  return _mm512_xor_si512(_mm512_loadu_si512(w), _mm512_set1_epi8((char)0x80));
}
INLINE vec dot_group(const int8_row *x, int64_t group, int8_group w) {
  __m512i sums = _mm512_loadu_si512(x->corrections + group * LANES);
  sums = _mm512_dpbusd_epi32(sums, w, _mm512_loadu_si512(x->values + group * GROUP));
  return (vec)_mm512_cvtepi32_ps(sums);
}

#else

INLINE void correct_group(const int8_t *x, int32_t *corrections) { (void)x, (void)corrections; }

#if LANES == 8

typedef struct { __m256i low, high; } int8_group;
INLINE int8_group load_weight_group(const int8_t *w) {
  return (int8_group){_mm256_loadu_si256((const void *)w), _mm256_loadu_si256((const void *)(w + 32))};
}
// |w| * (x with w's sign): pairs stay below 2 * 127 * 127 < 2^15, so nothing saturates.
INLINE __m256i dot_half(const int8_t *x, __m256i w) {
  __m256i signed_x = _mm256_sign_epi8(_mm256_loadu_si256((const void *)x), w);
  return _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_abs_epi8(w), signed_x), _mm256_set1_epi16(1));
}
INLINE vec dot_group(const int8_row *x, int64_t group, int8_group w) {
  const int8_t *values = x->values + group * GROUP;
  return (vec)_mm256_cvtepi32_ps(_mm256_add_epi32(dot_half(values, w.low), dot_half(values + 32, w.high)));
}

#else

typedef const int8_t *int8_group;
INLINE int8_group load_weight_group(const int8_t *w) { return w; }
INLINE vec dot_group(const int8_row *x, int64_t group, int8_group w) {
  const int8_t *values = x->values + group * GROUP;
  vec_i32 sums = {0};
  for (int k = 0; k < GROUP; k += LANES) {
    vec_i8 a, b;
    memcpy(&a, values + k, sizeof a);
    memcpy(&b, w + k, sizeof b);
    sums += __builtin_convertvector(a, vec_i32) * __builtin_convertvector(b, vec_i32);
  }
  return __builtin_convertvector(sums, vec);
}

#endif
#endif

// Fetches the scales of rows to come: in so slow a stream that hardware prefetchers lose it among the weights.
INLINE void fetch_scales(const float *scales, int rows, int64_t groups) {
  const int rows_ahead = 4, line = 16;
  for (int64_t g = 0; g < rows * groups; g += line) FETCH_ONCE(scales + rows_ahead * groups + g);
}

INLINE void sum_groups(const int rows, const int first, const int together, const int8_row x[],
                       const int8_t *const w[], const float *const scales[], int64_t groups, int64_t ahead,
                       vec sums[][TILE_COLUMNS]) {
  if (together < TILE_COLUMNS) fetch_scales(scales[first], together, groups);
  for (int64_t g = 0; g < groups; g++) {
#pragma GCC unroll 4
    for (int j = first; j < first + together; j++) {
      if (together < TILE_COLUMNS) FETCH_ONCE(w[j] + g * GROUP + ahead);
      else FETCH(w[j] + g * GROUP + ahead);
      int8_group weights = load_weight_group(w[j] + g * GROUP);
      float scale = scales[j][g];
#pragma GCC unroll 8
      for (int i = 0; i < rows; i++) sums[i][j] += dot_group(&x[i], g, weights) * (scale * x[i].scales[g]);
    }
  }
}

INLINE void dot_rows_int8(const int rows, const int8_row x[], const int8_t *const w[], const float *const scales[],
                          int64_t groups, int64_t ahead, float result[][TILE_COLUMNS]) {
  vec sums[TILE_ROWS][TILE_COLUMNS] = {{{0}}};
  if (rows <= FEW_ROWS) {
#pragma GCC unroll 4
    for (int j = 0; j < TILE_COLUMNS; j++) sum_groups(rows, j, 1, x, w, scales, groups, STREAM_AHEAD, sums);
  } else {
    sum_groups(rows, 0, TILE_COLUMNS, x, w, scales, groups, ahead, sums);
  }
  sum_tile(rows, sums, result);
}

static void dot_tile_int8(int rows, const int8_row x[], const int8_t *const w[], const float *const scales[],
                          int64_t groups, int64_t ahead, float result[][TILE_COLUMNS]) {
  WITH_ROWS(rows, dot_rows_int8, x, w, scales, groups, ahead, result)
}
