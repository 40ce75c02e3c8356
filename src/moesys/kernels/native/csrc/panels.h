// Products of many rows of activations with panels of weight rows, in the bits of dot_tile.h and dot_bf16.h.
//
// There a vector holds LANES neighbours of one weight row, and adding the lanes of a result takes shuffles: for rows of
// 256 columns a third of the time. Here a vector holds a word of LANES weight rows, so that the sums of the lanes are
// vectors that add up without shuffles, by the same tree. Words are floats, or pairs of bfloat16 numbers where the CPU
// multiplies those. Panels are copies, which pay where many rows meet them.
#pragma once

#include "operands.h"

#define PANEL_VECTORS 2
#define PANEL (PANEL_VECTORS * LANES)  // weight rows
#define MANY_ROWS 192  // for which panels pay
#define MANY_ROWS_IF_SHORT 96
#define SHORT_WORDS 256
#define LARGEST_WORDS 2048  // of a weight row, so that the panels of a block stay in the second cache

// Words of a row in the form in which such activations meet the matrix.
INLINE int64_t count_words(const activations *a, const matrix *m) { return m->columns >> meets_halves(a, m); }

#if LANES == 16

// Whether panels of the matrix pay for so many rows that meet it.
INLINE int wants_panels(const activations *a, const matrix *m, int64_t rows) {
  int64_t words = count_words(a, m);
  return rows >= (words <= SHORT_WORDS ? MANY_ROWS_IF_SHORT : MANY_ROWS) && words <= LARGEST_WORDS &&
         (m->format == WEIGHT_F32 || m->format == WEIGHT_BF16) && m->columns % (2 * LANES) == 0;
}

// Where a panel has the sums of lane l: neighbours in the tree, l and l + 8, together, in the order in which it joins
// such pairs.
static const int PAIR_ORDER[LANES / 2] = {0, 4, 2, 6, 1, 5, 3, 7};  // its own inverse

// Turns rows of words into columns.
INLINE void transpose_words(__m512 v[LANES]) {
  __m512 pairs[LANES], quads[LANES], halves[LANES];
#pragma GCC unroll 8
  for (int i = 0; i < LANES; i += 2) {
    pairs[i] = _mm512_unpacklo_ps(v[i], v[i + 1]);
    pairs[i + 1] = _mm512_unpackhi_ps(v[i], v[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < LANES; i += 4)
#pragma GCC unroll 2
    for (int h = 0; h < 2; h++) {
      __m512d a = (__m512d)pairs[i + h], b = (__m512d)pairs[i + h + 2];
      quads[i + 2 * h] = (__m512)_mm512_unpacklo_pd(a, b);
      quads[i + 2 * h + 1] = (__m512)_mm512_unpackhi_pd(a, b);
    }
#pragma GCC unroll 2
  for (int i = 0; i < LANES; i += 8)
#pragma GCC unroll 4
    for (int l = 0; l < 4; l++) {
      halves[i + l] = _mm512_shuffle_f32x4(quads[i + l], quads[i + l + 4], 0x88);
      halves[i + l + 4] = _mm512_shuffle_f32x4(quads[i + l], quads[i + l + 4], 0xdd);
    }
#pragma GCC unroll 8
  for (int l = 0; l < 8; l++) {
    v[l] = _mm512_shuffle_f32x4(halves[l], halves[l + 8], 0x88);
    v[l + 8] = _mm512_shuffle_f32x4(halves[l], halves[l + 8], 0xdd);
  }
}

INLINE __m512 load_words(const matrix *m, const int are_pairs, int64_t row, int64_t word) {
  int64_t index = row * m->columns + (word << are_pairs);
  if (m->format == WEIGHT_F32) return (__m512)load((const float *)m->values + index);
  const uint16_t *source = (const uint16_t *)m->values + index;
  return are_pairs ? _mm512_loadu_ps(source) : (__m512)load_bf16(source);
}

// Copies weight rows of matrix `slot` into a panel of PANEL * words floats. Returns the place behind it.
static float *make_panel(const activations *a, const matrix *m, int64_t slot, const int64_t rows[PANEL], float *panel) {
  int are_pairs = meets_halves(a, m);
  int64_t words = count_words(a, m), steps = words / LANES;
  for (int v = 0; v < PANEL_VECTORS; v++)
    for (int64_t step = 0; step < steps; step++) {
      __m512 block[LANES];
#pragma GCC unroll 16
      for (int r = 0; r < LANES; r++)
        block[r] = load_words(m, are_pairs, slot * m->rows + rows[v * LANES + r], step * LANES);
      transpose_words(block);
#pragma GCC unroll 16
      for (int l = 0; l < LANES; l++) {
        int64_t index = (PAIR_ORDER[l % 8] * steps + step) * 2 + l / 8;
        _mm512_store_ps(panel + index * PANEL + v * LANES, block[l]);
      }
    }
  return panel + PANEL * words;
}

INLINE vec add_products(vec sum, uint32_t word, vec weights, const int are_pairs) {
  __m512i activations = _mm512_set1_epi32((int32_t)word);
#if MULTIPLIES_BF16
  if (are_pairs) return (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)activations, (__m512bh)weights);
#endif
  return sum + (vec)activations * weights;
}

INLINE void multiply_panel_rows(const int rows, const int are_pairs, const char *const x[], const float *panel,
                                int64_t words, float *const targets[PANEL_VECTORS], int64_t stride) {
  vec waiting[3][TILE_ROWS][PANEL_VECTORS];  // results of the tree's left branches, by level
#pragma GCC unroll 8
  for (int n = 0; n < LANES / 2; n++) {
    vec sums[2][TILE_ROWS][PANEL_VECTORS] = {{{{0}}}};
    for (int64_t k = 4 * PAIR_ORDER[n]; k < 4 * words; k += 4 * LANES, panel += 2 * PANEL)
#pragma GCC unroll 2
      for (int h = 0; h < 2; h++) {
        vec weights[PANEL_VECTORS];
#pragma GCC unroll 2
        for (int v = 0; v < PANEL_VECTORS; v++) weights[v] = load(panel + h * PANEL + v * LANES);
#pragma GCC unroll 8
        for (int i = 0; i < rows; i++) {
          uint32_t word;
          memcpy(&word, x[i] + k + h * 4 * LANES / 2, 4);
#pragma GCC unroll 2
          for (int v = 0; v < PANEL_VECTORS; v++)
            sums[h][i][v] = add_products(sums[h][i][v], word, weights[v], are_pairs);
        }
      }
#pragma GCC unroll 8
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 2
      for (int v = 0; v < PANEL_VECTORS; v++) {
        vec sum = sums[0][i][v] + sums[1][i][v];
        int level = 0;
#pragma GCC unroll 3
        for (; n >> level & 1; level++) sum += waiting[level][i][v];
        if (level < 3) waiting[level][i][v] = sum;
        else store(targets[v] + i * stride, sum);
      }
  }
}

// Multiplies a tile of rows with a panel. Row i's results with the weight rows of vector v go to targets[v] + i * stride.
ALIGNED void multiply_panel(const row_tile *x, const float *panel, int64_t words, float *const targets[PANEL_VECTORS],
                           int64_t stride) {
  const char *rows[TILE_ROWS];
  for (int i = 0; i < x->count; i++) rows[i] = x->are_halves ? (const char *)x->halves[i] : (const char *)x->wide[i];
  if (x->are_halves) {
    WITH_ROWS(x->count, multiply_panel_rows, 1, rows, panel, words, targets, stride)
  } else {
    WITH_ROWS(x->count, multiply_panel_rows, 0, rows, panel, words, targets, stride)
  }
}

#else

// Shorter vectors come with fewer registers than a tile of this kind needs.
INLINE int wants_panels(const activations *a, const matrix *m, int64_t rows) { return 0; }
INLINE float *make_panel(const activations *a, const matrix *m, int64_t slot, const int64_t rows[PANEL], float *panel) {
  __builtin_unreachable();
}
INLINE void multiply_panel(const row_tile *x, const float *panel, int64_t words, float *const targets[PANEL_VECTORS],
                           int64_t stride) {
  __builtin_unreachable();
}

#endif
