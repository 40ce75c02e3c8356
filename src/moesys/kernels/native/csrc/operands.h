// What the operators multiply: matrices in one of the weight formats, and rows of activations.
#pragma once

#include "dot_bf16.h"
#include "dot_int8.h"
#include "dot_w8.h"

#define FORMAT f32
#define WEIGHT float
#define LOAD(row, k) load((row) + (k))
#define LOAD_HEAD(row, k, count) load_head((row) + (k), count)
#include "dot_tile.h"

#define FORMAT bf16
#define WEIGHT uint16_t
#define LOAD(row, k) load_bf16((row) + (k))
#define LOAD_HEAD(row, k, count) load_bf16_head((row) + (k), count)
#include "dot_tile.h"

// In the order of `WeightFormat` in library.py.
enum weight_format { WEIGHT_F32, WEIGHT_BF16, WEIGHT_W8, WEIGHT_W8A8 };

// Stacked matrices, each `rows` by `columns`, contiguous. int8 formats count padded columns.
typedef struct {
  int32_t format;
  const void *values;
  const float *scales;
  int64_t rows, columns;
} matrix;

// Rows of activations, padded as the matrix that they meet: float32, or what w8a8 or bfloat16 pairs round them to.
typedef struct {
  float *values;
  void *rounded;
  float *scales;
  int32_t *corrections;
  int64_t columns;
} activations;

INLINE int64_t num_groups(int64_t columns) { return (columns + GROUP - 1) / GROUP; }

INLINE float largest_lane(vec v) {
  float largest = v[0];
  for (int lane = 1; lane < LANES; lane++) largest = v[lane] > largest ? v[lane] : largest;
  return largest;
}

INLINE float any_nan_lane(vec v) {
  float sum = 0;
  for (int lane = 0; lane < LANES; lane++) sum += v[lane];
  return sum;
}

// Rounds columns [begin, end) of one row to int8; both are whole groups. The rule of kernels/formats/int8.py; a group
// with NaN or Inf gets the scale NaN, so that its row's results are NaN.
static void round_row(const activations *a, int64_t row, int64_t begin, int64_t end) {
  const vec_i32 magnitude = (vec_i32){0} + 0x7fffffff;
  for (int64_t group = begin / GROUP; group < num_groups(end); group++) {
    const float *source = a->values + row * a->columns + group * GROUP;
    int64_t index = row * num_groups(a->columns) + group;
    vec largest = {0}, nothing = {0};
    for (int k = 0; k < GROUP; k += LANES) {
      vec v = load(source + k), size = (vec)((vec_i32)v & magnitude);
      vec_i32 above = size > largest;
      largest = (vec)((above & (vec_i32)size) | (~above & (vec_i32)largest));
      nothing += v * 0.0f;
    }
    float scale = largest_lane(largest) / 127.0f + any_nan_lane(nothing);
    float divisor = scale > 0 ? scale : 1.0f;
    a->scales[index] = scale;
    for (int k = 0; k < GROUP; k += LANES)
      store_i8((int8_t *)a->rounded + index * GROUP + k, load(source + k) / divisor);
    correct_group((const int8_t *)a->rounded + index * GROUP, a->corrections + index * 16);
  }
}

// Rounds all rows; a few of them sooner than threads can be woken.
static void round_rows(const activations *a, int64_t rows, int threads) {
  const int64_t few = 1 << 15;
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * a->columns > few)
  for (int64_t row = 0; row < rows; row++) round_row(a, row, 0, a->columns);
}

// Multiplies up to TILE_ROWS activation rows (given by index) with four rows of matrix `slot`. The next tile's rows are
// `step` rows further on.
INLINE void multiply_tile(const activations *a, int rows, const int64_t row_ids[], const matrix *m, int64_t slot,
                          const int64_t columns[TILE_COLUMNS], int step, float result[][TILE_COLUMNS]) {
  int64_t groups = num_groups(m->columns), ahead = step * m->columns;
  const float *x[TILE_ROWS], *scales[TILE_COLUMNS] = {0};
  for (int i = 0; i < rows; i++) x[i] = a->values + row_ids[i] * a->columns;
  int64_t offsets[TILE_COLUMNS];
  for (int j = 0; j < TILE_COLUMNS; j++) {
    int64_t row = slot * m->rows + columns[j];
    offsets[j] = row * m->columns;
    if (m->scales) scales[j] = m->scales + row * groups;
  }
  if (m->format == WEIGHT_F32) {
    const float *w[TILE_COLUMNS];
    for (int j = 0; j < TILE_COLUMNS; j++) w[j] = (const float *)m->values + offsets[j];
    dot_tile_f32(rows, x, w, m->columns, ahead, result);
  } else if (m->format == WEIGHT_BF16) {
    const uint16_t *w[TILE_COLUMNS];
    for (int j = 0; j < TILE_COLUMNS; j++) w[j] = (const uint16_t *)m->values + offsets[j];
#if MULTIPLIES_BF16
    if (a->rounded) {
      const uint16_t *halves[TILE_ROWS];
      for (int i = 0; i < rows; i++) halves[i] = (const uint16_t *)a->rounded + row_ids[i] * a->columns;
      dot_tile_pairs(rows, halves, w, m->columns, ahead, result);
      return;
    }
#endif
    dot_tile_bf16(rows, x, w, m->columns, ahead, result);
  } else {
    const int8_t *w[TILE_COLUMNS];
    for (int j = 0; j < TILE_COLUMNS; j++) w[j] = (const int8_t *)m->values + offsets[j];
    if (m->format == WEIGHT_W8) {
      dot_tile_w8(rows, x, w, scales, groups, ahead, result);
      return;
    }
    int8_row q[TILE_ROWS];
    for (int i = 0; i < rows; i++) {
      int64_t index = row_ids[i] * groups;
      q[i] = (int8_row){(const int8_t *)a->rounded + index * GROUP, a->scales + index, a->corrections + index * 16};
    }
    dot_tile_int8(rows, q, w, scales, groups, ahead, result);
  }
}

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
