// Products of up to TILE_ROWS activation rows with TILE_COLUMNS weight rows, both contiguous along K.
//
// Included once per weight format, with FORMAT its name, WEIGHT its element type, and LOAD(row, scales, k) and
// LOAD_HEAD(row, scales, k, count) giving LANES widened weights at column k. Every weight vector that is loaded is
// used for all activation rows; nothing is packed or transposed. Each result is one sum over K in the same order for
// any number of rows: lane l adds the columns l, l + LANES, ..., then the lanes are added.
//
// `ahead` is the distance in elements to the weights that come next: they are fetched meanwhile, because hardware
// prefetchers stop at the pages that rows begin and end in.

#define CONCAT_(a, b) a##_##b
#define CONCAT(a, b) CONCAT_(a, b)
#define LINE (64 / (int)sizeof(WEIGHT))

INLINE void CONCAT(add_products, FORMAT)(const int rows, const float *const x[], const vec weights[],
                                         int64_t k, int count, vec sums[][TILE_COLUMNS]) {
#pragma GCC unroll 8
  for (int i = 0; i < rows; i++) {
    vec activations = count == LANES ? load(x[i] + k) : load_head(x[i] + k, count);
#pragma GCC unroll 4
    for (int j = 0; j < TILE_COLUMNS; j++) sums[i][j] += activations * weights[j];
  }
}

INLINE void CONCAT(dot_rows, FORMAT)(const int rows, const float *const x[], const WEIGHT *const w[],
                                     const float *const scales[], int64_t columns, int64_t ahead,
                                     float result[][TILE_COLUMNS]) {
  (void)scales;
  vec sums[TILE_ROWS][TILE_COLUMNS], weights[TILE_COLUMNS];
#pragma GCC unroll 8
  for (int i = 0; i < rows; i++)
#pragma GCC unroll 4
    for (int j = 0; j < TILE_COLUMNS; j++) sums[i][j] = (vec){0};
  int64_t k = 0;
  for (; k + LINE <= columns; k += LINE) {
#pragma GCC unroll 4
    for (int j = 0; j < TILE_COLUMNS; j++) __builtin_prefetch(w[j] + k + ahead);
#pragma GCC unroll 16
    for (int v = 0; v < LINE; v += LANES) {
#pragma GCC unroll 4
      for (int j = 0; j < TILE_COLUMNS; j++) weights[j] = LOAD(w[j], scales[j], k + v);
      CONCAT(add_products, FORMAT)(rows, x, weights, k + v, LANES, sums);
    }
  }
  for (; k + LANES <= columns; k += LANES) {
#pragma GCC unroll 4
    for (int j = 0; j < TILE_COLUMNS; j++) weights[j] = LOAD(w[j], scales[j], k);
    CONCAT(add_products, FORMAT)(rows, x, weights, k, LANES, sums);
  }
  if (k < columns) {
    int rest = (int)(columns - k);
#pragma GCC unroll 4
    for (int j = 0; j < TILE_COLUMNS; j++) weights[j] = LOAD_HEAD(w[j], scales[j], k, rest);
    CONCAT(add_products, FORMAT)(rows, x, weights, k, rest, sums);
  }
#pragma GCC unroll 8
  for (int i = 0; i < rows; i++) sum_lanes_of_4(sums[i], result[i]);
}

static void CONCAT(dot_tile, FORMAT)(int rows, const float *const x[], const WEIGHT *const w[],
                                     const float *const scales[], int64_t columns, int64_t ahead,
                                     float result[][TILE_COLUMNS]) {
  switch (rows) {
    case 1: CONCAT(dot_rows, FORMAT)(1, x, w, scales, columns, ahead, result); return;
    case 2: CONCAT(dot_rows, FORMAT)(2, x, w, scales, columns, ahead, result); return;
#if TILE_ROWS > 2
    case 3: CONCAT(dot_rows, FORMAT)(3, x, w, scales, columns, ahead, result); return;
    case 4: CONCAT(dot_rows, FORMAT)(4, x, w, scales, columns, ahead, result); return;
    case 5: CONCAT(dot_rows, FORMAT)(5, x, w, scales, columns, ahead, result); return;
    case 6: CONCAT(dot_rows, FORMAT)(6, x, w, scales, columns, ahead, result); return;
#endif
  }
}

#undef LINE
#undef CONCAT
#undef CONCAT_
#undef FORMAT
#undef WEIGHT
#undef LOAD
#undef LOAD_HEAD
