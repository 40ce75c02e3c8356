// Products of up to TILE_ROWS activation rows with TILE_COLUMNS weight rows, both contiguous along K.
//
// Included once per weight format, with FORMAT its name, WEIGHT its element type, and LOAD(row, k) and
// LOAD_HEAD(row, k, count) giving LANES widened weights at column k. Every weight vector that is loaded is
// used for all activation rows; nothing is packed or transposed. Each result is one sum over K in the same order for
// any number of rows: lane l adds the columns l, l + LANES, ..., then the lanes are added.
//
// `ahead` is the distance in elements to the weights that come next: they are fetched meanwhile, because hardware
// prefetchers stop at the pages that rows begin and end in.

#define CONCAT_(a, b) a##_##b
#define CONCAT(a, b) CONCAT_(a, b)
#define LINE (64 / (int)sizeof(WEIGHT))

// Products with the weight rows [first, first + together) at `count` columns from k on.
INLINE void CONCAT(add_products, FORMAT)(const int rows, const int first, const int together, const float *const x[],
                                         const WEIGHT *const w[], int64_t k,
                                         const int count, vec sums[][TILE_COLUMNS]) {
  vec weights[TILE_COLUMNS];
#pragma GCC unroll 4
  for (int j = first; j < first + together; j++)
    weights[j] = count == LANES ? LOAD(w[j], k) : LOAD_HEAD(w[j], k, count);
#pragma GCC unroll 8
  for (int i = 0; i < rows; i++) {
    vec activations = count == LANES ? load(x[i] + k) : load_head(x[i] + k, count);
#pragma GCC unroll 4
    for (int j = first; j < first + together; j++) sums[i][j] += activations * weights[j];
  }
}

INLINE void CONCAT(sum_products, FORMAT)(const int rows, const int first, const int together, const float *const x[],
                                         const WEIGHT *const w[], int64_t columns,
                                         int64_t ahead, vec sums[][TILE_COLUMNS]) {
  int64_t k = 0;
  for (; k + LINE <= columns; k += LINE) {
#pragma GCC unroll 4
    for (int j = first; j < first + together; j++) {
      if (together < TILE_COLUMNS) FETCH_ONCE(w[j] + k + ahead);
      else FETCH(w[j] + k + ahead);
    }
#pragma GCC unroll 16
    for (int v = 0; v < LINE; v += LANES)
      CONCAT(add_products, FORMAT)(rows, first, together, x, w, k + v, LANES, sums);
  }
  for (; k + LANES <= columns; k += LANES)
    CONCAT(add_products, FORMAT)(rows, first, together, x, w, k, LANES, sums);
  if (k < columns)
    CONCAT(add_products, FORMAT)(rows, first, together, x, w, k, (int)(columns - k), sums);
}

INLINE void CONCAT(dot_rows, FORMAT)(const int rows, const float *const x[], const WEIGHT *const w[],
                                     int64_t columns, int64_t ahead,
                                     float result[][TILE_COLUMNS]) {
  vec sums[TILE_ROWS][TILE_COLUMNS] = {{{0}}};
  if (rows <= FEW_ROWS) {
#pragma GCC unroll 4
    for (int j = 0; j < TILE_COLUMNS; j++)
      CONCAT(sum_products, FORMAT)(rows, j, 1, x, w, columns, STREAM_AHEAD / (int)sizeof(WEIGHT), sums);
  } else {
    CONCAT(sum_products, FORMAT)(rows, 0, TILE_COLUMNS, x, w, columns, ahead, sums);
  }
  sum_tile(rows, sums, result);
}

ALIGNED void CONCAT(dot_tile, FORMAT)(int rows, const float *const x[], const WEIGHT *const w[],
                                     int64_t columns, int64_t ahead,
                                     float result[][TILE_COLUMNS]) {
  WITH_ROWS(rows, CONCAT(dot_rows, FORMAT), x, w, columns, ahead, result)
}

#undef LINE
#undef CONCAT
#undef CONCAT_
#undef FORMAT
#undef WEIGHT
#undef LOAD
#undef LOAD_HEAD
