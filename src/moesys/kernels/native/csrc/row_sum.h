// Weighted sums of rows in the order in which they are listed: a token's experts, in the order of its choices.
//
// Rows are rounded to the type of the result before they are weighted. So sums in the call that computed the rows have
// the bits of sums over rows that were stored in between. Weights and sums are float32.
#pragma once

#include "indices.h"
#include "simd.h"

#define SUM_COLUMNS 1024  // per block

// Result r sums the rows positions[offsets[r]], ..., positions[offsets[r + 1] - 1].
typedef struct {
  const float *weights;  // by row
  const int64_t *positions, *offsets;
  int64_t num_results, num_positions;
  int32_t is_bf16;  // the results, else float32
  void *results;
} row_sums;

INLINE int is_sound_sum(const row_sums *s, int64_t num_rows) {
  return are_offsets(s->offsets, s->num_results, s->num_positions) && are_ids(s->positions, s->num_positions, num_rows);
}

INLINE int64_t count_sum_blocks(const row_sums *s, int64_t columns) {
  return s->num_results * ((columns + SUM_COLUMNS - 1) / SUM_COLUMNS);
}

// `count` columns of one result from column k on.
INLINE void sum_columns(const row_sums *s, const void *rows, const int are_bf16, int64_t columns, int64_t result,
                        int64_t k, const int count) {
  vec sum = {0};
  for (int64_t p = s->offsets[result]; p < s->offsets[result + 1]; p++) {
    int64_t row = s->positions[p], index = row * columns + k;
    vec v = are_bf16 ? (count == LANES ? load_bf16((const uint16_t *)rows + index)
                                       : load_bf16_head((const uint16_t *)rows + index, count))
                     : (count == LANES ? load((const float *)rows + index)
                                       : load_head((const float *)rows + index, count));
    if (s->is_bf16 && !are_bf16) v = round_to_bf16(v);
    sum += s->weights[row] * v;
  }
  int64_t index = result * columns + k;
  if (s->is_bf16) {
    store_bf16_head((uint16_t *)s->results + index, round_to_bf16(sum), count);
  } else {
    memcpy((float *)s->results + index, &sum, 4 * (size_t)count);
  }
}

INLINE void sum_block(const row_sums *s, const void *rows, const int are_bf16, int64_t columns, int64_t block) {
  int64_t column_blocks = (columns + SUM_COLUMNS - 1) / SUM_COLUMNS;
  int64_t result = block / column_blocks, k = block % column_blocks * SUM_COLUMNS;
  int64_t end = k + SUM_COLUMNS < columns ? k + SUM_COLUMNS : columns;
  for (; k + LANES <= end; k += LANES) sum_columns(s, rows, are_bf16, columns, result, k, LANES);
  if (k < end) sum_columns(s, rows, are_bf16, columns, result, k, (int)(end - k));
}
