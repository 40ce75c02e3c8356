// Products of bfloat16 activations with bfloat16 weights on CPUs that multiply pairs of them in one instruction.
//
// Products are exact and summed in float32: lane l adds the columns 2l and 2l + 1, then 2l + 32, ... For activations
// that are bfloat16 anyway; others are widened weights' business (dot_tile.h).
#pragma once

#include "simd.h"

#if defined(__AVX512BF16__) && LANES == 16
#define MULTIPLIES_BF16 1

INLINE __m512bh load_pairs(const uint16_t *source, int count) {
  __mmask32 mask = count >= 32 ? 0xffffffffu : (1u << count) - 1;
  return (__m512bh)_mm512_maskz_loadu_epi16(mask, source);
}

INLINE void add_pairs(const int rows, const int first, const int together, const uint16_t *const x[],
                      const uint16_t *const w[], int64_t k, int count, __m512 sums[][TILE_COLUMNS]) {
  __m512bh weights[TILE_COLUMNS];
#pragma GCC unroll 4
  for (int j = first; j < first + together; j++) weights[j] = load_pairs(w[j] + k, count);
#pragma GCC unroll 8
  for (int i = 0; i < rows; i++) {
    __m512bh activations = load_pairs(x[i] + k, count);
#pragma GCC unroll 4
    for (int j = first; j < first + together; j++) sums[i][j] = _mm512_dpbf16_ps(sums[i][j], activations, weights[j]);
  }
}

INLINE void sum_pairs(const int rows, const int first, const int together, const uint16_t *const x[],
                      const uint16_t *const w[], int64_t columns, int64_t ahead, __m512 sums[][TILE_COLUMNS]) {
  int64_t k = 0;
  for (; k + 32 <= columns; k += 32) {
#pragma GCC unroll 4
    for (int j = first; j < first + together; j++) {
      if (together < TILE_COLUMNS) FETCH_ONCE(w[j] + k + ahead);
      else FETCH(w[j] + k + ahead);
    }
    add_pairs(rows, first, together, x, w, k, 32, sums);
  }
  if (k < columns) add_pairs(rows, first, together, x, w, k, (int)(columns - k), sums);
}

INLINE void dot_rows_pairs(const int rows, const uint16_t *const x[], const uint16_t *const w[], int64_t columns,
                           int64_t ahead, float result[][TILE_COLUMNS]) {
  __m512 sums[TILE_ROWS][TILE_COLUMNS] = {{{0}}};
  if (rows <= FEW_ROWS) {
#pragma GCC unroll 4
    for (int j = 0; j < TILE_COLUMNS; j++) sum_pairs(rows, j, 1, x, w, columns, STREAM_AHEAD / 2, sums);
  } else {
    sum_pairs(rows, 0, TILE_COLUMNS, x, w, columns, ahead, sums);
  }
  sum_tile(rows, (const vec(*)[TILE_COLUMNS])sums, result);
}

ALIGNED void dot_tile_pairs(int rows, const uint16_t *const x[], const uint16_t *const w[], int64_t columns,
                           int64_t ahead, float result[][TILE_COLUMNS]) {
  WITH_ROWS(rows, dot_rows_pairs, x, w, columns, ahead, result)
}

// Rounds `count` floats to bfloat16, ties to even.
INLINE void store_bf16(uint16_t *target, const float *source, int64_t count) {
  for (int64_t k = 0; k < count; k += LANES) {
    __mmask16 mask = count - k >= LANES ? 0xffff : (__mmask16)((1u << (count - k)) - 1);
    __m256bh half = _mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(mask, source + k));
    _mm256_mask_storeu_epi16(target + k, mask, (__m256i)half);
  }
}

#else
#define MULTIPLIES_BF16 0
#endif
