// y = x / sqrt(mean(x^2) + epsilon) * weight, row by row: float32 arithmetic in a fixed order over the row, so that a
// row's bits depend on nothing else. In bfloat16 the quotient is rounded before the weight, as models were trained.
#include "simd.h"

#define FEW_NUMBERS (1 << 15)  // are computed sooner than threads can be woken

// `groups` consecutive runs of `size` numbers, each with a mean square of its own, times the same weight.
typedef struct {
  const void *weight;
  int64_t size, groups;
} norm_part;

typedef struct {
  const void *x;  // rows of both parts, `row_stride` apart
  int64_t row_stride;
  norm_part parts[2];
  int32_t is_bf16;  // all tensors, else float32
  int64_t rows;
  float epsilon;
  void *y;  // contiguous
  int32_t threads;
} rms_norm_call;

INLINE vec load_numbers(const void *source, int64_t index, int count, const int is_bf16) {
  if (is_bf16) {
    const uint16_t *halves = (const uint16_t *)source + index;
    return count == LANES ? load_bf16(halves) : load_bf16_head(halves, count);
  }
  const float *floats = (const float *)source + index;
  return count == LANES ? load(floats) : load_head(floats, count);
}

INLINE void store_numbers(void *target, int64_t index, vec v, int count, const int is_bf16) {
  if (is_bf16) {
    store_bf16_head((uint16_t *)target + index, round_to_bf16(v), count);
  } else {
    memcpy((float *)target + index, &v, 4 * (size_t)count);
  }
}

INLINE int count_lanes(int64_t left) { return left < LANES ? (int)left : LANES; }

INLINE float compute_inverse_rms(const void *x, int64_t start, int64_t size, float epsilon, const int is_bf16) {
  vec sums[4] = {{0}};
  for (int64_t i = 0; i < size; i += LANES) {
    vec v = load_numbers(x, start + i, count_lanes(size - i), is_bf16);
    sums[i / LANES % 4] += v * v;
  }
  float parts[4];
  sum_lanes_of_4(sums, parts);
  float square = (parts[0] + parts[1]) + (parts[2] + parts[3]);
  return 1.0f / sqrtf(square / (float)size + epsilon);
}

INLINE void normalize_rows(const rms_norm_call *c, const int is_bf16) {
  int64_t columns = c->parts[0].size * c->parts[0].groups + c->parts[1].size * c->parts[1].groups;
#pragma omp parallel for schedule(static) num_threads(c->threads) if (c->rows * columns > FEW_NUMBERS)
  for (int64_t row = 0; row < c->rows; row++) {
    int64_t from = row * c->row_stride, to = row * columns;
    for (const norm_part *part = c->parts; part < c->parts + 2; part++)
      for (int64_t group = 0; group < part->groups; group++) {
        vec scale = splat(compute_inverse_rms(c->x, from, part->size, c->epsilon, is_bf16));
        for (int64_t i = 0; i < part->size; i += LANES) {
          int count = count_lanes(part->size - i);
          vec normed = load_numbers(c->x, from + i, count, is_bf16) * scale;
          if (is_bf16) normed = round_to_bf16(normed);
          normed *= load_numbers(part->weight, i, count, is_bf16);
          store_numbers(c->y, to + i, normed, count, is_bf16);
        }
        from += part->size;
        to += part->size;
      }
  }
}

void moesys_rms_norm(const rms_norm_call *c) {
  if (c->is_bf16) {
    normalize_rows(c, 1);
  } else {
    normalize_rows(c, 0);
  }
}
