// Sums of rows that lie in memory already.
#include "row_sum.h"

#include "blocks.h"

typedef struct {
  row_sums sums;
  const void *rows;
  int32_t are_bf16;
  int64_t num_rows, columns;
  int32_t threads;
} row_sum_call;

// Returns 0, or 2 when an index is out of range.
int moesys_sum_rows(const row_sum_call *c) {
  if (!is_sound_sum(&c->sums, c->num_rows)) return 2;
  const int64_t few = 1 << 15;  // columns that are summed sooner than threads can be woken
  int threads = c->sums.num_positions * c->columns > few ? c->threads : 1;
  block_run runs[threads];
  share_blocks(runs, threads, count_sum_blocks(&c->sums, c->columns));
#pragma omp parallel num_threads(threads) if (threads > 1)
  for (int64_t block; (block = take_block(runs, threads)) >= 0;) {
    if (c->are_bf16) {
      sum_block(&c->sums, c->rows, 1, c->columns, block);
    } else {
      sum_block(&c->sums, c->rows, 0, c->columns, block);
    }
  }
  return 0;
}
