// y = x @ w^T + bias for a matrix in any weight format.
//
// Threads take blocks of weight rows, and of activation rows where there are many; never a part of K. Rows are widened,
// padded or rounded here, as the format wants them, and results rounded to the type of x, because for one row a call of
// any other library costs as much as reading 100 KB of weights.
#include <stdlib.h>

#include "blocks.h"
#include "operands.h"

#define BLOCK_COLUMNS 64
#define BLOCK_ROWS 384

typedef struct {
  const void *x;  // (rows, columns)
  int32_t is_bf16;  // x and y, else float32
  int64_t rows, columns;
  matrix w;  // as many columns, or padded to whole groups
  const float *bias;
  void *y;
  int32_t threads;
} linear_call;

// Copies one row as float32, zeros behind it.
static void widen_row(const linear_call *c, int64_t row, const activations *a) {
  float *target = a->values + row * a->columns;
  int64_t k = 0;
  if (c->is_bf16) {
    const uint16_t *source = (const uint16_t *)c->x + row * c->columns;
    for (; k + LANES <= c->columns; k += LANES) store(target + k, load_bf16(source + k));
    for (; k < c->columns; k++) target[k] = widen_bf16(source[k]);
  } else {
    memcpy(target, (const float *)c->x + row * c->columns, 4 * (size_t)c->columns);
    k = c->columns;
  }
  memset(target + k, 0, 4 * (size_t)(a->columns - k));
}

// Fills `a` with the rows of x as the matrix wants them. What has to be made lies in `scratch`, which the caller frees.
// Returns 0, or 1 when there is no memory for it.
static int prepare_rows(const linear_call *c, activations *a, void **scratch) {
  const matrix *m = &c->w;
  *a = (activations){.columns = m->columns};
  if (c->is_bf16 && m->format == WEIGHT_BF16 && MULTIPLIES_BF16) {
    a->rounded = (void *)c->x;
    return 0;
  }
  int64_t groups = m->format == WEIGHT_W8A8 ? c->rows * num_groups(m->columns) : 0;
  int64_t copied = c->is_bf16 || m->columns != c->columns ? c->rows * m->columns : 0;
  if (!copied) a->values = (float *)c->x;
  if (!groups && !copied) return 0;
  char *memory = malloc((size_t)(groups * (4 * 16 + GROUP + 4) + 4 * copied));
  if (!memory) return 1;
  *scratch = memory;
  if (groups) {
    a->corrections = (int32_t *)memory;
    a->rounded = memory + groups * 4 * 16;
    a->scales = (float *)(memory + groups * (4 * 16 + GROUP));
  }
  if (copied) {
    a->values = (float *)(memory + groups * (4 * 16 + GROUP + 4));
#pragma omp parallel for schedule(static) num_threads(c->threads) if (copied > FEW_NUMBERS)
    for (int64_t row = 0; row < c->rows; row++) widen_row(c, row, a);
  }
  if (groups) round_rows(a, c->rows, c->threads);
  return 0;
}

// Results of a tile at `row` and `column`, its first `width` columns.
INLINE void store_tile(const linear_call *c, int rows, int64_t row, int64_t column, int width,
                       float result[][TILE_COLUMNS]) {
  for (int r = 0; r < rows; r++) {
    if (c->bias)
      for (int n = 0; n < width; n++) result[r][n] += c->bias[column + n];
    int64_t index = (row + r) * c->w.rows + column;
    if (!c->is_bf16) memcpy((float *)c->y + index, result[r], 4 * (size_t)width);
  }
  if (!c->is_bf16) return;
  uint16_t halves[TILE_ROWS * TILE_COLUMNS];
  round_tile(rows, result, halves);
  for (int r = 0; r < rows; r++) {
    int64_t index = (row + r) * c->w.rows + column;
    memcpy((uint16_t *)c->y + index, halves + r * TILE_COLUMNS, 2 * (size_t)width);
  }
}

static void multiply_block(const linear_call *c, const activations *x, int64_t row, int64_t row_end, int64_t column,
                           int64_t column_end) {
  for (int64_t i = row; i < row_end; i += TILE_ROWS) {
    int rows = (int)least(TILE_ROWS, row_end - i);
    int64_t ids[TILE_ROWS];
    for (int r = 0; r < rows; r++) ids[r] = i + r;
    row_tile tile;
    find_rows(&tile, x, &c->w, rows, ids);
    for (int64_t j = column; j < column_end; j += TILE_COLUMNS) {
      int64_t columns[TILE_COLUMNS];
      for (int n = 0; n < TILE_COLUMNS; n++) columns[n] = least(j + n, column_end - 1);
      float result[TILE_ROWS][TILE_COLUMNS];
      multiply_tile(&tile, &c->w, 0, columns, TILE_COLUMNS, result);
      store_tile(c, rows, i, j, (int)least(TILE_COLUMNS, column_end - j), result);
    }
  }
}

// Returns 0, or 1 when there is no memory for rows that have to be widened, padded or rounded.
int moesys_linear(const linear_call *c) {
  activations x;
  void *scratch = 0;
  if (prepare_rows(c, &x, &scratch)) return 1;
  int64_t column_blocks = (c->w.rows + BLOCK_COLUMNS - 1) / BLOCK_COLUMNS;
  int64_t row_blocks = (c->rows + BLOCK_ROWS - 1) / BLOCK_ROWS;
  block_run runs[c->threads];
  share_blocks(runs, c->threads, row_blocks * column_blocks);
#pragma omp parallel num_threads(c->threads)
  for (int64_t block; (block = take_block(runs, c->threads)) >= 0;) {
    int64_t row = block / column_blocks * BLOCK_ROWS, column = block % column_blocks * BLOCK_COLUMNS;
    multiply_block(c, &x, row, least(row + BLOCK_ROWS, c->rows), column, least(column + BLOCK_COLUMNS, c->w.rows));
  }
  free(scratch);
  return 0;
}
