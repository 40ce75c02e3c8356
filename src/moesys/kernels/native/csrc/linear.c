// y = x @ w^T + bias for a matrix in any weight format.
//
// Threads take blocks of weight rows, and of activation rows where there are many; never a part of K.
#include "blocks.h"
#include "operands.h"

#define BLOCK_COLUMNS 64
#define BLOCK_ROWS 384

typedef struct {
  activations x;
  int64_t rows;
  matrix w;
  const float *bias;
  float *y;
  int32_t threads;
} linear_call;

static void multiply_block(const linear_call *c, int64_t row, int64_t row_end, int64_t column, int64_t column_end) {
  for (int64_t i = row; i < row_end; i += TILE_ROWS) {
    int rows = (int)least(TILE_ROWS, row_end - i);
    int64_t ids[TILE_ROWS];
    for (int r = 0; r < rows; r++) ids[r] = i + r;
    for (int64_t j = column; j < column_end; j += TILE_COLUMNS) {
      int width = (int)least(TILE_COLUMNS, column_end - j);
      int64_t columns[TILE_COLUMNS];
      for (int n = 0; n < TILE_COLUMNS; n++) columns[n] = least(j + n, column_end - 1);
      float result[TILE_ROWS][TILE_COLUMNS];
      multiply_tile(&c->x, rows, ids, &c->w, 0, columns, TILE_COLUMNS, result);
      for (int r = 0; r < rows; r++)
        for (int n = 0; n < width; n++)
          c->y[(i + r) * c->w.rows + j + n] = result[r][n] + (c->bias ? c->bias[j + n] : 0.0f);
    }
  }
}

void moesys_linear(const linear_call *c) {
  int64_t column_blocks = (c->w.rows + BLOCK_COLUMNS - 1) / BLOCK_COLUMNS;
  int64_t row_blocks = (c->rows + BLOCK_ROWS - 1) / BLOCK_ROWS;
  if (c->w.format == WEIGHT_W8A8) round_rows(&c->x, c->rows, c->threads);
  block_run runs[c->threads];
  share_blocks(runs, c->threads, row_blocks * column_blocks);
#pragma omp parallel num_threads(c->threads)
  for (int64_t block; (block = take_block(runs, c->threads)) >= 0;) {
    int64_t row = block / column_blocks * BLOCK_ROWS, column = block % column_blocks * BLOCK_COLUMNS;
    multiply_block(c, row, least(row + BLOCK_ROWS, c->rows), column, least(column + BLOCK_COLUMNS, c->w.rows));
  }
}
