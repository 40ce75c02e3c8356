// Turns pairs (x[i], x[i + pairs]) of each head by the angles of its token.
//
// In bfloat16 cosine, sine and the first product are rounded, as torch rounds them: equal bits.
#include "simd.h"

#define FEW_PAIRS (1 << 14)  // are turned sooner than threads can be woken

typedef struct {
  const void *x;  // (tokens, heads, 2 * pairs), heads and tokens apart by strides
  int64_t token_stride, head_stride;
  const float *cos, *sin;  // (tokens, pairs)
  int32_t is_bf16;         // x and y, else float32
  int64_t tokens, heads, pairs;
  void *y;  // contiguous
  int32_t threads;
} rotary_call;

INLINE void turn(const float *source, const float *cos, const float *sin, int64_t pairs, float *target) {
  for (int64_t i = 0; i < pairs; i++) {
    float first = source[i], second = source[i + pairs];
    target[i] = first * cos[i] - second * sin[i];
    target[i + pairs] = second * cos[i] + first * sin[i];
  }
}

INLINE vec load_bf16_numbers(const uint16_t *source, int count) {
  return count == LANES ? load_bf16(source) : load_bf16_head(source, count);
}

INLINE void turn_bf16(const uint16_t *source, const float *cos, const float *sin, int64_t pairs, uint16_t *target) {
  for (int64_t i = 0; i < pairs; i += LANES) {
    int count = pairs - i < LANES ? (int)(pairs - i) : LANES;
    vec first = load_bf16_numbers(source + i, count), second = load_bf16_numbers(source + pairs + i, count);
    vec c = round_to_bf16(load_head(cos + i, count)), s = round_to_bf16(load_head(sin + i, count));
    store_bf16_head(target + i, round_to_bf16(round_to_bf16(first * c) - second * s), count);
    store_bf16_head(target + pairs + i, round_to_bf16(round_to_bf16(second * c) + first * s), count);
  }
}

void moesys_rotate(const rotary_call *c) {
#pragma omp parallel for schedule(static) num_threads(c->threads) if (c->tokens * c->heads * c->pairs > FEW_PAIRS)
  for (int64_t t = 0; t < c->tokens; t++) {
    const float *cos = c->cos + t * c->pairs, *sin = c->sin + t * c->pairs;
    for (int64_t h = 0; h < c->heads; h++) {
      int64_t from = t * c->token_stride + h * c->head_stride, to = (t * c->heads + h) * 2 * c->pairs;
      if (c->is_bf16) {
        turn_bf16((const uint16_t *)c->x + from, cos, sin, c->pairs, (uint16_t *)c->y + to);
      } else {
        turn((const float *)c->x + from, cos, sin, c->pairs, (float *)c->y + to);
      }
    }
  }
}
