// The small steps between a router's scores and its experts' rows: choose, weigh, group by expert.
//
// One token's decode makes a few dozen numbers of each; what counts is one call instead of ten.
#include <float.h>
#include <stdlib.h>

#include "indices.h"
#include "simd.h"

#define FEW_SCORES (1 << 14)  // are looked at sooner than threads can be woken

typedef struct {
  const float *scores;
  int64_t num_tokens, num_experts, k;
  int64_t *ids;
  int32_t threads;
} top_k_call;

// The order of torch.sort: NaN comes before every number.
INLINE int is_better(float a, float b) { return a > b || (a != a && b == b); }

// Writes the k experts with the largest scores, best first; ties go to the lower id. `bias` may be null.
INLINE void choose_best(const float *scores, const float *bias, int64_t num_experts, int64_t k, int64_t *best) {
  for (int64_t e = 0; e < num_experts; e++) {
    int64_t place = e < k ? e : k;
    float score = bias ? scores[e] + bias[e] : scores[e];
    while (place > 0) {
      int64_t other = best[place - 1];
      if (!is_better(score, bias ? scores[other] + bias[other] : scores[other])) break;
      if (place < k) best[place] = other;
      place--;
    }
    if (place < k) best[place] = e;
  }
}

void moesys_top_k(const top_k_call *c) {
#pragma omp parallel for num_threads(c->threads) if (c->num_tokens * c->num_experts > FEW_SCORES)
  for (int64_t t = 0; t < c->num_tokens; t++)
    choose_best(c->scores + t * c->num_experts, 0, c->num_experts, c->k, c->ids + t * c->k);
}

// Divides weights by their sum, taken in order, or by `smallest` where that is larger.
INLINE void divide_by_sum(float *weights, int64_t count, float smallest) {
  float sum = 0;
  for (int64_t i = 0; i < count; i++) sum += weights[i];
  if (sum < smallest) sum = smallest;
  for (int64_t i = 0; i < count; i++) weights[i] /= sum;
}

typedef struct {
  const float *logits, *scores, *bias;  // (tokens, experts); the bias per expert, for the choice alone, may be null
  int64_t num_tokens, num_experts, k;
  int32_t normalizes;
  float smallest_sum, scale;
  int64_t *ids, *token_offsets;
  float *weights;
  int32_t threads;
} choice_call;

// Writes for each token its k best experts, best first, and their weights. Returns whether all logits are finite.
int moesys_choose(const choice_call *c) {
  int is_finite = 1;
#pragma omp parallel for num_threads(c->threads) if (c->num_tokens * c->num_experts > FEW_SCORES) reduction(& : is_finite)
  for (int64_t t = 0; t < c->num_tokens; t++) {
    const float *logits = c->logits + t * c->num_experts, *scores = c->scores + t * c->num_experts;
    for (int64_t e = 0; e < c->num_experts; e++) is_finite &= fabsf(logits[e]) <= FLT_MAX;
    int64_t *ids = c->ids + t * c->k;
    float *weights = c->weights + t * c->k;
    choose_best(scores, c->bias, c->num_experts, c->k, ids);
    for (int64_t i = 0; i < c->k; i++) weights[i] = scores[ids[i]];
    if (c->normalizes) divide_by_sum(weights, c->k, c->smallest_sum);
    for (int64_t i = 0; i < c->k; i++) weights[i] *= c->scale;
  }
  for (int64_t t = 0; t <= c->num_tokens; t++) c->token_offsets[t] = t * c->k;
  return is_finite;
}

typedef struct {
  const float *scores;
  const int64_t *ids, *offsets;  // of the choice: assignment a of token t has offsets[t] <= a < offsets[t + 1]
  int64_t num_tokens, num_experts, num_assignments;
  int32_t normalizes;
  float smallest_sum;
  float *weights;
} weighing_call;

// Gathers the scores of the chosen experts; normalised, divides them by their sum in the order of choice. Returns 0, or
// 2 when an index is out of range.
int moesys_weigh(const weighing_call *c) {
  if (!are_offsets(c->offsets, c->num_tokens, c->num_assignments)) return 2;
  if (!are_ids(c->ids, c->num_assignments, c->num_experts)) return 2;
  for (int64_t t = 0; t < c->num_tokens; t++) {
    int64_t start = c->offsets[t], end = c->offsets[t + 1];
    for (int64_t a = start; a < end; a++) c->weights[a] = c->scores[t * c->num_experts + c->ids[a]];
    if (c->normalizes) divide_by_sum(c->weights + start, end - start, c->smallest_sum);
  }
  return 0;
}

typedef struct {
  const int64_t *ids, *token_offsets;
  const float *weights;
  int64_t num_tokens, num_experts, num_assignments;
  int64_t *row_ids, *offsets, *positions;
  float *sorted_weights;
} grouping_call;

// Groups assignments by expert, in the order of tokens and choices within each: where each group begins, and of each
// assignment its token, its weight and its place. Returns 0, 1 when there is no memory, or 2 when an index is out of
// range.
int moesys_group(const grouping_call *c) {
  if (!are_offsets(c->token_offsets, c->num_tokens, c->num_assignments)) return 2;
  if (!are_ids(c->ids, c->num_assignments, c->num_experts)) return 2;
  int64_t *next = malloc(sizeof(int64_t) * (size_t)(c->num_experts + 1));
  if (!next) return 1;
  memset(c->offsets, 0, sizeof(int64_t) * (size_t)(c->num_experts + 1));
  for (int64_t a = 0; a < c->num_assignments; a++) c->offsets[c->ids[a] + 1]++;
  for (int64_t e = 0; e < c->num_experts; e++) c->offsets[e + 1] += c->offsets[e];
  memcpy(next, c->offsets, sizeof(int64_t) * (size_t)(c->num_experts + 1));
  for (int64_t t = 0; t < c->num_tokens; t++)
    for (int64_t a = c->token_offsets[t]; a < c->token_offsets[t + 1]; a++) {
      int64_t place = next[c->ids[a]]++;
      c->row_ids[place] = t;
      c->sorted_weights[place] = c->weights[a];
      c->positions[a] = place;
    }
  free(next);
  return 0;
}
