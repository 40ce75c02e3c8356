// The small steps between a router's scores and its experts' rows: choose, weigh, group by expert.
//
// One token's decode makes a few dozen numbers of each; what counts is one call instead of ten.
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

// Writes for each token the experts with the k largest scores, best first; ties go to the lower id.
void moesys_top_k(const top_k_call *c) {
#pragma omp parallel for num_threads(c->threads) if (c->num_tokens * c->num_experts > FEW_SCORES)
  for (int64_t t = 0; t < c->num_tokens; t++) {
    const float *scores = c->scores + t * c->num_experts;
    int64_t *best = c->ids + t * c->k;
    for (int64_t e = 0; e < c->num_experts; e++) {
      int64_t place = e < c->k ? e : c->k;
      while (place > 0 && is_better(scores[e], scores[best[place - 1]])) {
        if (place < c->k) best[place] = best[place - 1];
        place--;
      }
      if (place < c->k) best[place] = e;
    }
  }
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
    float sum = 0;
    for (int64_t a = c->offsets[t]; a < c->offsets[t + 1]; a++) {
      c->weights[a] = c->scores[t * c->num_experts + c->ids[a]];
      sum += c->weights[a];
    }
    if (!c->normalizes) continue;
    if (sum < c->smallest_sum) sum = c->smallest_sum;
    for (int64_t a = c->offsets[t]; a < c->offsets[t + 1]; a++) c->weights[a] /= sum;
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
