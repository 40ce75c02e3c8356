// C = A B or C += A B in float32 for the products of a backward pass, where B's rows are contiguous.
//
// B is copied into panels of a few vectors' width, so that its rows cannot fall into the same cache sets, and A too
// where its columns are strided. K is cut into blocks whose sums go through C, so a row's bits depend on the place
// of its block only; no promise is made about them.
#include <stdlib.h>

#include "simd.h"

#define OUTER_ROWS 6
#if LANES == 16
#define PANEL_VECTORS 4
#else
#define PANEL_VECTORS 2
#endif
#define PANEL (PANEL_VECTORS * LANES)
#define BLOCK_K 256
#define BLOCK_COLUMNS 256
#define BLOCK_ROWS 192  // a multiple of OUTER_ROWS

typedef struct {
  const float *a;
  int64_t a_row, a_column;  // strides
  const float *b;
  int64_t b_row;
  float *c;
  int64_t c_row;
  int64_t rows, columns, depth;
  int32_t accumulate, threads;
} product_call;

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// `rows` rows of C, one panel wide, from `depth` columns of A and rows of the panel.
INLINE void multiply_rows(const int rows, const float *a, int64_t a_row, int64_t a_column, const float *panel,
                          int64_t depth, float *c, int64_t c_row, int width, int accumulate) {
  vec sums[OUTER_ROWS][PANEL_VECTORS];
#pragma GCC unroll 8
  for (int i = 0; i < rows; i++)
#pragma GCC unroll 4
    for (int v = 0; v < PANEL_VECTORS; v++) sums[i][v] = (vec){0};
  for (int64_t k = 0; k < depth; k++) {
    vec b[PANEL_VECTORS];
#pragma GCC unroll 4
    for (int v = 0; v < PANEL_VECTORS; v++) b[v] = load(panel + k * PANEL + v * LANES);
#pragma GCC unroll 8
    for (int i = 0; i < rows; i++) {
      vec left = splat(a[i * a_row + k * a_column]);
#pragma GCC unroll 4
      for (int v = 0; v < PANEL_VECTORS; v++) sums[i][v] += left * b[v];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < rows; i++)
#pragma GCC unroll 4
    for (int v = 0; v < PANEL_VECTORS; v++) {
      float *target = c + i * c_row + v * LANES;
      int count = width - v * LANES;
      if (count >= LANES) {
        store(target, accumulate ? load(target) + sums[i][v] : sums[i][v]);
      } else if (count > 0) {
        vec sum = accumulate ? load_head(target, count) + sums[i][v] : sums[i][v];
        memcpy(target, &sum, 4 * (size_t)count);
      }
    }
}

static void multiply_tile(int rows, const float *a, int64_t a_row, int64_t a_column, const float *panel,
                          int64_t depth, float *c, int64_t c_row, int width, int accumulate) {
  switch (rows) {
    case 1: multiply_rows(1, a, a_row, a_column, panel, depth, c, c_row, width, accumulate); return;
    case 2: multiply_rows(2, a, a_row, a_column, panel, depth, c, c_row, width, accumulate); return;
    case 3: multiply_rows(3, a, a_row, a_column, panel, depth, c, c_row, width, accumulate); return;
    case 4: multiply_rows(4, a, a_row, a_column, panel, depth, c, c_row, width, accumulate); return;
    case 5: multiply_rows(5, a, a_row, a_column, panel, depth, c, c_row, width, accumulate); return;
    case 6: multiply_rows(6, a, a_row, a_column, panel, depth, c, c_row, width, accumulate); return;
  }
}

// Copies `width` columns of `depth` rows into rows of `stride`, zeros behind them.
INLINE void copy_columns(const float *source, int64_t source_row, int64_t depth, int width, int stride, float *target) {
  for (int64_t k = 0; k < depth; k++) {
    int n = 0;
    for (; n + LANES <= width; n += LANES) store(target + k * stride + n, load(source + k * source_row + n));
    if (n < stride) memset(target + k * stride + n, 0, 4 * (size_t)(stride - n));
    if (n < width) memcpy(target + k * stride + n, source + k * source_row + n, 4 * (size_t)(width - n));
  }
}

static void multiply_block(const product_call *c, int64_t row, int64_t rows, int64_t column, int64_t columns,
                           float *panels, float *left) {
  for (int64_t k = 0; k < c->depth; k += BLOCK_K) {
    int64_t depth = least(BLOCK_K, c->depth - k);
    for (int64_t n = 0; n < columns; n += PANEL)
      copy_columns(c->b + k * c->b_row + column + n, c->b_row, depth, (int)least(PANEL, columns - n), PANEL,
                   panels + n * BLOCK_K);
    const float *a = c->a + row * c->a_row + k * c->a_column;
    int64_t a_row = c->a_row, a_column = c->a_column;
    if (a_column != 1) {
      copy_columns(a, a_column, depth, (int)rows, BLOCK_ROWS, left);
      a = left, a_row = 1, a_column = BLOCK_ROWS;
    }
    for (int64_t n = 0; n < columns; n += PANEL)
      for (int64_t i = 0; i < rows; i += OUTER_ROWS)
        multiply_tile((int)least(OUTER_ROWS, rows - i), a + i * a_row, a_row, a_column, panels + n * BLOCK_K, depth,
                      c->c + (row + i) * c->c_row + column + n, c->c_row, (int)least(PANEL, columns - n),
                      c->accumulate || k > 0);
  }
}

// A has strides of any size if one of them is 1. Returns 0, or 1 when there is no memory for the panels.
int moesys_product(const product_call *c) {
  int64_t column_blocks = (c->columns + BLOCK_COLUMNS - 1) / BLOCK_COLUMNS;
  int64_t row_blocks = (c->rows + BLOCK_ROWS - 1) / BLOCK_ROWS;
  int failed = 0;
#pragma omp parallel num_threads(c->threads) reduction(| : failed)
  {
    float *panels = aligned_alloc(64, 4 * BLOCK_K * (BLOCK_COLUMNS + BLOCK_ROWS));
    failed |= !panels;
#pragma omp for schedule(dynamic, 1)
    for (int64_t block = 0; block < row_blocks * column_blocks; block++) {
      int64_t row = block / column_blocks * BLOCK_ROWS, column = block % column_blocks * BLOCK_COLUMNS;
      if (panels)
        multiply_block(c, row, least(BLOCK_ROWS, c->rows - row), column, least(BLOCK_COLUMNS, c->columns - column),
                       panels, panels + BLOCK_K * BLOCK_COLUMNS);
    }
    free(panels);
  }
  return failed;
}
