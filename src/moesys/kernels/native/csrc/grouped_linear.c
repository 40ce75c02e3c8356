// y[t, g] = w[g] @ x[t, g]: a matrix per group, such as an attention head, and rows of its own for each.
//
// Threads take blocks of a group's outputs, and of its rows where there are many; never a part of K, so that a row's
// bits are its own. A matrix whose rows are contiguous is multiplied as in linear.c, to the same bits. One whose columns
// are would have to be transposed for that; here its outputs lie side by side in vectors and each is summed over K in
// order.
#include <stdlib.h>

#include "blocks.h"
#include "operands.h"

#define PANEL_VECTORS 4
#define PANEL (PANEL_VECTORS * LANES)
#define BLOCK_COLUMNS 64  // whole panels
#define BLOCK_ROWS 384
#define COLUMNS_AHEAD 16

// Strides count elements.
typedef struct {
  const void *x;  // (tokens, groups, columns), the last contiguous
  int64_t token_stride, group_stride;
  int32_t is_bf16;  // x and y, else float32
  int64_t tokens, groups, columns;
  const void *w;
  int32_t w_is_bf16;
  int32_t has_rows;  // of w contiguous one behind the other, else its columns are contiguous
  int64_t w_group, w_column;  // the second is read for columns
  int64_t outputs;
  void *y;  // (tokens, groups, outputs)
  int32_t threads;
} grouped_call;

// Whether bfloat16 rows are multiplied without being widened.
INLINE int takes_halves(const grouped_call *c) {
  return MULTIPLIES_BF16 && c->is_bf16 && c->w_is_bf16 && c->has_rows;
}

// Finds the rows of a group from `token` on, widened in `scratch` where they have to be.
static void find_group_rows(row_tile *tile, const grouped_call *c, int64_t group, int64_t token, int count,
                            float *scratch) {
  tile->count = count;
  tile->are_halves = takes_halves(c);
  for (int i = 0; i < count; i++) {
    int64_t offset = (token + i) * c->token_stride + group * c->group_stride;
    if (!c->is_bf16) {
      tile->wide[i] = (const float *)c->x + offset;
    } else if (tile->are_halves) {
      tile->halves[i] = (const uint16_t *)c->x + offset;
    } else {
      const uint16_t *source = (const uint16_t *)c->x + offset;
      float *target = scratch + i * c->columns;
      for (int64_t k = 0; k < c->columns; k++) target[k] = widen_bf16(source[k]);
      tile->wide[i] = target;
    }
  }
}

// Stores the first `width` of a row's results.
INLINE void store_row(const grouped_call *c, int64_t row, int64_t column, const float *result, int width) {
  int64_t index = row * c->outputs + column;
  if (!c->is_bf16) {
    memcpy((float *)c->y + index, result, 4 * (size_t)width);
    return;
  }
  uint16_t *target = (uint16_t *)c->y + index;
  int n = 0;
  for (; n + LANES <= width; n += LANES) store_bf16_head(target + n, round_to_bf16(load(result + n)), LANES);
  if (n < width) store_bf16_head(target + n, round_to_bf16(load_head(result + n, width - n)), width - n);
}

static void multiply_rows(const grouped_call *c, int64_t group, const row_tile *x, int64_t token, int64_t column,
                          int64_t column_end) {
  int size = c->w_is_bf16 ? 2 : 4;
  matrix m = {
      .format = c->w_is_bf16 ? WEIGHT_BF16 : WEIGHT_F32,
      .values = (const char *)c->w + size * group * c->w_group,
      .rows = c->outputs,
      .columns = c->columns,
  };
  for (int64_t j = column; j < column_end; j += TILE_COLUMNS) {
    int64_t columns[TILE_COLUMNS];
    for (int n = 0; n < TILE_COLUMNS; n++) columns[n] = least(j + n, column_end - 1);
    float result[TILE_ROWS][TILE_COLUMNS];
    multiply_tile(x, &m, 0, columns, TILE_COLUMNS, result);
    for (int i = 0; i < x->count; i++)
      store_row(c, (token + i) * c->groups + group, j, result[i], (int)least(TILE_COLUMNS, column_end - j));
  }
}

INLINE vec load_weights(const void *w, int64_t index, int count, const int are_bf16) {
  if (count <= 0) return (vec){0};
  if (are_bf16) {
    const uint16_t *source = (const uint16_t *)w + index;
    return count >= LANES ? load_bf16(source) : load_bf16_head(source, count);
  }
  const float *source = (const float *)w + index;
  return count >= LANES ? load(source) : load_head(source, count);
}

// Results of `rows` rows for the `width` outputs of a panel; w points to the panel's first weight.
INLINE void sum_panel(const int rows, const int are_bf16, const float *const x[], const void *w, int64_t w_column,
                      int64_t columns, int width, float result[][PANEL]) {
  vec sums[TILE_ROWS][PANEL_VECTORS];
#pragma GCC unroll 8
  for (int i = 0; i < rows; i++)
#pragma GCC unroll 4
    for (int v = 0; v < PANEL_VECTORS; v++) sums[i][v] = (vec){0};
  for (int64_t k = 0; k < columns; k++) {
    int64_t ahead = (k + COLUMNS_AHEAD) * w_column;
    vec weights[PANEL_VECTORS];
#pragma GCC unroll 4
    for (int v = 0; v < PANEL_VECTORS; v++) {
      weights[v] = load_weights(w, k * w_column + v * LANES, width - v * LANES, are_bf16);
      if (rows <= FEW_ROWS) FETCH_ONCE((const char *)w + (are_bf16 ? 2 : 4) * (ahead + v * LANES));
    }
#pragma GCC unroll 8
    for (int i = 0; i < rows; i++) {
      vec left = splat(x[i][k]);
#pragma GCC unroll 4
      for (int v = 0; v < PANEL_VECTORS; v++) sums[i][v] += left * weights[v];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < rows; i++)
#pragma GCC unroll 4
    for (int v = 0; v < PANEL_VECTORS; v++) store(result[i] + v * LANES, sums[i][v]);
}

// A whole panel has its width as a constant, so that its loads are single instructions.
INLINE void sum_columns(const int rows, const int are_bf16, const float *const x[], const void *w, int64_t w_column,
                        int64_t columns, int width, float result[][PANEL]) {
  if (width == PANEL) sum_panel(rows, are_bf16, x, w, w_column, columns, PANEL, result);
  else sum_panel(rows, are_bf16, x, w, w_column, columns, width, result);
}

static void sum_columns_f32(int rows, const float *const x[], const void *w, int64_t w_column, int64_t columns,
                            int width, float result[][PANEL]) {
  WITH_ROWS(rows, sum_columns, 0, x, w, w_column, columns, width, result)
}

static void sum_columns_bf16(int rows, const float *const x[], const void *w, int64_t w_column, int64_t columns,
                             int width, float result[][PANEL]) {
  WITH_ROWS(rows, sum_columns, 1, x, w, w_column, columns, width, result)
}

static void multiply_columns(const grouped_call *c, int64_t group, const row_tile *x, int64_t token, int64_t column,
                             int64_t column_end) {
  for (int64_t j = column; j < column_end; j += PANEL) {
    int width = (int)least(PANEL, column_end - j);
    int64_t first = group * c->w_group + j;
    float result[TILE_ROWS][PANEL];
    if (c->w_is_bf16)
      sum_columns_bf16(x->count, x->wide, (const uint16_t *)c->w + first, c->w_column, c->columns, width, result);
    else
      sum_columns_f32(x->count, x->wide, (const float *)c->w + first, c->w_column, c->columns, width, result);
    for (int i = 0; i < x->count; i++)
      store_row(c, (token + i) * c->groups + group, j, result[i], width);
  }
}

// Returns 0, or 1 when there is no memory for rows that have to be widened.
int moesys_grouped_linear(const grouped_call *c) {
  int64_t column_blocks = (c->outputs + BLOCK_COLUMNS - 1) / BLOCK_COLUMNS;
  int64_t row_blocks = (c->tokens + BLOCK_ROWS - 1) / BLOCK_ROWS;
  int64_t group_blocks = row_blocks * column_blocks;
  int widens = c->is_bf16 && !takes_halves(c), failed = 0;
  block_run runs[c->threads];
  share_blocks(runs, c->threads, c->groups * group_blocks);
#pragma omp parallel num_threads(c->threads) reduction(| : failed)
  {
    float *scratch = widens ? malloc(4 * (size_t)(TILE_ROWS * c->columns) + 1) : 0;
    failed |= widens && !scratch;
    for (int64_t block; !failed && (block = take_block(runs, c->threads)) >= 0;) {
      int64_t group = block / group_blocks, rest = block % group_blocks;
      int64_t token = rest / column_blocks * BLOCK_ROWS, column = rest % column_blocks * BLOCK_COLUMNS;
      int64_t token_end = least(token + BLOCK_ROWS, c->tokens), column_end = least(column + BLOCK_COLUMNS, c->outputs);
      for (int64_t t = token; t < token_end; t += TILE_ROWS) {
        row_tile tile;
        find_group_rows(&tile, c, group, t, (int)least(TILE_ROWS, token_end - t), scratch);
        if (c->has_rows) multiply_rows(c, group, &tile, t, column, column_end);
        else multiply_columns(c, group, &tile, t, column, column_end);
      }
    }
    free(scratch);
  }
  return failed;
}
