// Hands the blocks of a loop to threads. Each has a run of neighbours that it takes in order, so that it reads memory as
// one stream; one that is done takes from the far end of another's run. (Under OpenMP's dynamic schedule neighbours go
// to different threads, and what prefetchers have learnt is lost at every block.)
#pragma once

#include <omp.h>
#include <stdatomic.h>
#include <stdint.h>

// Blocks [begin, end) that nobody has taken: `begin` in the low half, `end` in the high half.
typedef struct {
  _Alignas(64) _Atomic uint64_t range;
} block_run;

// Cuts [0, count) into a run per thread. Counts stay below 2^32.
static inline void share_blocks(block_run runs[], int threads, int64_t count) {
  for (int t = 0; t < threads; t++)
    atomic_init(&runs[t].range, (uint64_t)(count * t / threads) | (uint64_t)(count * (t + 1) / threads) << 32);
}

// Returns a block for the calling thread, or -1 when all are taken.
static inline int64_t take_block(block_run runs[], int threads) {
  for (int i = 0; i < threads; i++) {
    block_run *run = &runs[(omp_get_thread_num() + i) % threads];
    uint64_t seen = atomic_load(&run->range);
    while ((seen & UINT32_MAX) < seen >> 32) {
      uint64_t rest = i == 0 ? seen + 1 : seen - (1ull << 32);
      if (atomic_compare_exchange_weak(&run->range, &seen, rest))
        return (int64_t)(i == 0 ? seen & UINT32_MAX : (seen >> 32) - 1);
    }
  }
  return -1;
}
