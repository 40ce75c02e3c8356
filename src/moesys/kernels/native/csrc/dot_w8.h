// Products of float32 activations with int8 weights in groups of 64 columns that share a scale.
//
// A group's products are summed first (lane l adds the columns l, l + LANES, ... of the group) and scaled once, then
// the groups are added in order, then the lanes. Rows are padded to whole groups.
#pragma once

#include "dot_int8.h"

// Weight rows that are read together even for few activation rows, whose loads would be the limit otherwise.
#define STREAM_ROWS 2

#define GROUP_VECTORS (GROUP / LANES)

INLINE void sum_w8_groups(const int rows, const int first, const int together, const float *const x[],
                          const int8_t *const w[], const float *const scales[], int64_t groups, int64_t ahead,
                          vec sums[][TILE_COLUMNS]) {
  const int is_stream = together < TILE_COLUMNS;
  if (is_stream) fetch_scales(scales[first], together, groups);
  for (int64_t g = 0; g < groups; g++) {
#pragma GCC unroll 4
    for (int j = first; j < first + together; j++) {
      const int8_t *source = w[j] + g * GROUP;
      if (is_stream) FETCH_ONCE(w[first] + (g * together + j - first) * GROUP + ahead);
      else FETCH(source + ahead);
      vec weights[GROUP_VECTORS], scale = splat(scales[j][g]);
#pragma GCC unroll 16
      for (int v = 0; v < GROUP_VECTORS; v++) weights[v] = load_i8(source + v * LANES);
#pragma GCC unroll 8
      for (int i = 0; i < rows; i++) {
        vec sum = load(x[i] + g * GROUP) * weights[0];
#pragma GCC unroll 16
        for (int v = 1; v < GROUP_VECTORS; v++) sum += load(x[i] + g * GROUP + v * LANES) * weights[v];
        sums[i][j] += sum * scale;
      }
    }
  }
}

INLINE void dot_rows_w8(const int rows, const float *const x[], const int8_t *const w[], const float *const scales[],
                        int64_t groups, int64_t ahead, float result[][TILE_COLUMNS]) {
  vec sums[TILE_ROWS][TILE_COLUMNS] = {{{0}}};
  if (rows <= FEW_ROWS) {
    int64_t stream_ahead = STREAM_AHEAD + (STREAM_ROWS - 1) * groups * GROUP;
#pragma GCC unroll 4
    for (int j = 0; j < TILE_COLUMNS; j += STREAM_ROWS)
      sum_w8_groups(rows, j, STREAM_ROWS, x, w, scales, groups, stream_ahead, sums);
  } else {
    sum_w8_groups(rows, 0, TILE_COLUMNS, x, w, scales, groups, ahead, sums);
  }
  sum_tile(rows, sums, result);
}

static void dot_tile_w8(int rows, const float *const x[], const int8_t *const w[], const float *const scales[],
                        int64_t groups, int64_t ahead, float result[][TILE_COLUMNS]) {
  WITH_ROWS(rows, dot_rows_w8, x, w, scales, groups, ahead, result)
}
