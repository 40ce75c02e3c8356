// The rate at which memory can be read: the ceiling of everything that computes one token.
#include "dot_bf16.h"

// Whether bfloat16 activations meet bfloat16 weights unwidened at the level that this library was built for.
int moesys_multiplies_bf16(void) { return MULTIPLIES_BF16; }

// Reads `count` floats with all threads and returns their sum, so that no read can be left out.
float moesys_read(const float *data, int64_t count, int32_t threads) {
  const int64_t block = 1 << 16;
  float total = 0;
#pragma omp parallel for schedule(static) reduction(+ : total) num_threads(threads)
  for (int64_t start = 0; start < count / block; start++) {
    const float *source = data + start * block;
    vec sums[8] = {{0}};
    for (int64_t k = 0; k < block; k += 8 * LANES)
      for (int s = 0; s < 8; s++) sums[s] += load(source + k + s * LANES);
    for (int s = 0; s < 8; s++)
      for (int lane = 0; lane < LANES; lane++) total += sums[s][lane];
  }
  for (int64_t k = count / block * block; k < count; k++) total += data[k];
  return total;
}
