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

// Numbers that are handled sooner than threads can be woken.
#define FEW_NUMBERS (1 << 15)

static void round_rows(const activations *a, int64_t rows, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * a->columns > FEW_NUMBERS)
  for (int64_t row = 0; row < rows; row++) round_row(a, row, 0, a->columns);
}

// Up to TILE_ROWS rows of activations in the form in which they meet a matrix.
typedef struct {
  int count, are_halves;
  const float *wide[TILE_ROWS];
  const uint16_t *halves[TILE_ROWS];
  int8_row bytes[TILE_ROWS];
} row_tile;

// Whether bfloat16 activations meet the matrix as they are.
INLINE int meets_halves(const activations *a, const matrix *m) {
  return MULTIPLIES_BF16 && m->format == WEIGHT_BF16 && a->rounded;
}

// Finds the rows of `ids`, once for all the weights that they are multiplied with.
INLINE void find_rows(row_tile *tile, const activations *a, const matrix *m, int count, const int64_t ids[]) {
  int64_t groups = num_groups(m->columns);
  tile->count = count;
  tile->are_halves = meets_halves(a, m);
  for (int i = 0; i < count; i++) {
    if (m->format == WEIGHT_W8A8) {
      int64_t index = ids[i] * groups;
      tile->bytes[i] =
          (int8_row){(const int8_t *)a->rounded + index * GROUP, a->scales + index, a->corrections + index * 16};
    } else if (tile->are_halves) {
      tile->halves[i] = (const uint16_t *)a->rounded + ids[i] * a->columns;
    } else {
      tile->wide[i] = a->values + ids[i] * a->columns;
    }
  }
}

// Multiplies a tile of rows with four rows of matrix `slot`. The next four are `step` rows further on.
INLINE void multiply_tile(const row_tile *x, const matrix *m, int64_t slot, const int64_t columns[TILE_COLUMNS],
                          int step, float result[][TILE_COLUMNS]) {
  int64_t groups = num_groups(m->columns), ahead = step * m->columns, offsets[TILE_COLUMNS];
#pragma GCC unroll 4
  for (int j = 0; j < TILE_COLUMNS; j++) offsets[j] = (slot * m->rows + columns[j]) * m->columns;
  if (m->format == WEIGHT_F32) {
    const float *w[TILE_COLUMNS];
    for (int j = 0; j < TILE_COLUMNS; j++) w[j] = (const float *)m->values + offsets[j];
    dot_tile_f32(x->count, x->wide, w, m->columns, ahead, result);
  } else if (m->format == WEIGHT_BF16) {
    const uint16_t *w[TILE_COLUMNS];
    for (int j = 0; j < TILE_COLUMNS; j++) w[j] = (const uint16_t *)m->values + offsets[j];
#if MULTIPLIES_BF16
    if (x->are_halves) {
      dot_tile_pairs(x->count, x->halves, w, m->columns, ahead, result);
      return;
    }
#endif
    dot_tile_bf16(x->count, x->wide, w, m->columns, ahead, result);
  } else {
    const int8_t *w[TILE_COLUMNS];
    const float *scales[TILE_COLUMNS];
    for (int j = 0; j < TILE_COLUMNS; j++) {
      w[j] = (const int8_t *)m->values + offsets[j];
      scales[j] = m->scales + (slot * m->rows + columns[j]) * groups;
    }
    if (m->format == WEIGHT_W8) {
      dot_tile_w8(x->count, x->wide, w, scales, groups, ahead, result);
    } else {
      dot_tile_int8(x->count, x->bytes, w, scales, groups, ahead, result);
    }
  }
}

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
