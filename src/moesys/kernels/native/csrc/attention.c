// Attention of single new tokens over keys and values that lie in pages.
//
// A query's tokens are cut into pieces at fixed positions. A piece's scores, weights and weighted sum are made by one
// thread, in the order of its tokens; pieces are joined in their order. So the bits of a query's head depend on its own
// tokens alone: not on other queries, on threads or on where pages lie. Rows that a query does not see are never read.
#include <stdlib.h>

#include "blocks.h"
#include "simd.h"

#define PIECE_TOKENS 256
#define ROUND_QUERIES 8           // whose unjoined pieces are held at once
#define BLOCK_NUMBERS (1 << 14)   // of queries: those of a block stay near while a piece passes by
#define VALUE_TILE 8              // tokens whose values are added in one pass over the sums
#define FEW_PRODUCTS (1ll << 18)  // are computed sooner than threads can be woken

typedef struct {
  const void *q;  // (queries, heads, key_size)
  int32_t q_is_bf16;
  const void *keys, *values;  // (rows, kv_heads, key_size), and value_step elements from one value to the next
  int32_t is_bf16;            // keys and values, else float32
  int64_t rows, heads, kv_heads, key_size, value_size, value_step;
  const int64_t *page_ids;        // of all queries
  const int64_t *starts, *stops;  // per query: its first page in page_ids, the tokens up to the last that it sees
  int64_t num_page_ids, num_queries, page_tokens;
  int64_t window;      // tokens that a query sees at most
  const float *sinks;  // (heads,) or null
  float scale;
  void *y;  // (queries, heads, value_size), as q
  int32_t threads;
  // Filled in here: the pieces of a query at most; scratch for a round's queries (heads, wide_key) and sums (pieces,
  // heads, wide_value), padded to whole vectors; per piece and head the largest score and the sum of weights; per thread
  // (heads, PIECE_TOKENS) weights.
  int64_t most_pieces, wide_key, wide_value;
  float *queries, *sums, *totals, *weights;
} attention_call;

// Tokens [first, stop) of one query, all of one piece, and the heads [head, last_head) that see them.
typedef struct {
  const float *queries;  // (heads, wide_key)
  int64_t head, last_head;
  int count;
  int64_t rows[PIECE_TOKENS];
  float *weights;  // (heads, PIECE_TOKENS)
  float *sums, *totals;
} piece;

INLINE int64_t find_first(const attention_call *c, int64_t query) {
  int64_t stop = c->stops[query];
  return stop > c->window ? stop - c->window : 0;
}

INLINE int64_t count_pieces(const attention_call *c, int64_t query) {
  return (c->stops[query] - 1) / PIECE_TOKENS - find_first(c, query) / PIECE_TOKENS + 1;
}

static int is_sound(const attention_call *c) {
  for (int64_t n = 0; n < c->num_queries; n++) {
    int64_t start = c->starts[n], stop = c->stops[n];
    if (start < 0 || stop < 1 || start + (stop - 1) / c->page_tokens >= c->num_page_ids) return 0;
    for (int64_t p = find_first(c, n) / c->page_tokens; p <= (stop - 1) / c->page_tokens; p++) {
      int64_t page = c->page_ids[start + p], left = stop - p * c->page_tokens;
      int64_t used = left < c->page_tokens ? left : c->page_tokens;
      if (page < 0 || page > c->rows || page * c->page_tokens + used > c->rows) return 0;
    }
  }
  return 1;
}

INLINE vec load_cached(const void *source, int64_t index, int count, const int is_bf16) {
  if (is_bf16) {
    const uint16_t *halves = (const uint16_t *)source + index;
    return count == LANES ? load_bf16(halves) : load_bf16_head(halves, count);
  }
  const float *floats = (const float *)source + index;
  return count == LANES ? load(floats) : load_head(floats, count);
}

INLINE void fetch_cached(const void *source, int64_t index, int64_t size, const int is_bf16) {
  const char *begin = (const char *)source + index * (is_bf16 ? 2 : 4);
  for (int64_t i = 0; i < size * (is_bf16 ? 2 : 4); i += 64) FETCH(begin + i);
}

INLINE void score_step(const int heads, const float *q, int64_t wide_key, const void *keys, const int64_t *at, int64_t k,
                       int count, const int is_bf16, vec sums[][TILE_COLUMNS]) {
  vec key[TILE_COLUMNS];
#pragma GCC unroll 4
  for (int j = 0; j < TILE_COLUMNS; j++) key[j] = load_cached(keys, at[j] + k, count, is_bf16);
#pragma GCC unroll 8
  for (int i = 0; i < heads; i++) {
    vec query = load(q + i * wide_key + k);
#pragma GCC unroll 4
    for (int j = 0; j < TILE_COLUMNS; j++) sums[i][j] += query * key[j];
  }
}

// Scores of a few heads by TILE_COLUMNS keys, which begin at `at`.
INLINE void score_tile(const int heads, const attention_call *c, const float *q, const int64_t *at, const int is_bf16,
                       float *scores) {
  vec sums[TILE_ROWS][TILE_COLUMNS];
  float result[TILE_ROWS][TILE_COLUMNS];
#pragma GCC unroll 8
  for (int i = 0; i < heads; i++)
#pragma GCC unroll 4
    for (int j = 0; j < TILE_COLUMNS; j++) sums[i][j] = (vec){0};
  int64_t k = 0;
  for (; k + LANES <= c->key_size; k += LANES)
    score_step(heads, q, c->wide_key, c->keys, at, k, LANES, is_bf16, sums);
  if (k < c->key_size) score_step(heads, q, c->wide_key, c->keys, at, k, (int)(c->key_size - k), is_bf16, sums);
  sum_tile(heads, sums, result);
#pragma GCC unroll 8
  for (int i = 0; i < heads; i++) memcpy(scores + i * PIECE_TOKENS, result[i], sizeof result[i]);
}

#define SCORE_TILE(heads, ...) score_tile(heads, __VA_ARGS__)

INLINE int64_t find_group_end(const attention_call *c, const piece *p, int64_t head) {
  int64_t group = c->heads / c->kv_heads, end = (head / group + 1) * group;
  return end < p->last_head ? end : p->last_head;
}

INLINE void compute_scores(const attention_call *c, const piece *p, const int is_bf16) {
  int64_t group = c->heads / c->kv_heads;
  for (int t = 0; t < p->count; t += TILE_COLUMNS) {
    for (int64_t h = p->head, end; h < p->last_head; h = end) {
      end = find_group_end(c, p, h);
      int64_t at[TILE_COLUMNS], kv_head = h / group;
      for (int j = 0; j < TILE_COLUMNS; j++) {
        int token = t + j < p->count ? t + j : p->count - 1, ahead = token + 2 * TILE_COLUMNS;
        at[j] = (p->rows[token] * c->kv_heads + kv_head) * c->key_size;
        if (ahead < p->count)
          fetch_cached(c->keys, (p->rows[ahead] * c->kv_heads + kv_head) * c->key_size, c->key_size, is_bf16);
      }
      int64_t tiles = (end - h + TILE_ROWS - 1) / TILE_ROWS, step = (end - h + tiles - 1) / tiles;
      for (int64_t i = h; i < end; i += step) {
        int heads = (int)(end - i < step ? end - i : step);
        const float *q = p->queries + i * c->wide_key;
        WITH_ROWS(heads, SCORE_TILE, c, q, at, is_bf16, p->weights + i * PIECE_TOKENS + t)
      }
    }
  }
}

// exp(score - largest) in place of each score.
INLINE void compute_weights(const piece *p, int64_t head) {
  float *weights = p->weights + head * PIECE_TOKENS;
  int wide = (p->count + LANES - 1) / LANES * LANES;
  for (int t = p->count; t < wide; t++) weights[t] = weights[0];
  vec best = load(weights), sums[4] = {{0}};
  for (int t = LANES; t < wide; t += LANES) best = clamp(load(weights + t), best, splat(INFINITY));
  float largest = best[0], parts[4];
  for (int lane = 1; lane < LANES; lane++) largest = best[lane] > largest ? best[lane] : largest;
  for (int t = 0; t < wide; t += LANES) {
    vec w = exp_vec(load(weights + t) - largest);
    store(weights + t, w);
    sums[0] += t + LANES <= p->count ? w : load_head(weights + t, p->count - t);
  }
  sum_lanes_of_4(sums, parts);
  p->totals[2 * head] = largest;
  p->totals[2 * head + 1] = parts[0];
}

// Adds the weighted values of `tokens` tokens from `t` on, for the heads of one group.
INLINE void add_values(const int tokens, const attention_call *c, const piece *p, int t, int64_t head, int64_t end,
                       const int is_bf16) {
  int64_t at[VALUE_TILE], kv_head = head / (c->heads / c->kv_heads);
  for (int j = 0; j < tokens; j++) {
    at[j] = (p->rows[t + j] * c->kv_heads + kv_head) * c->value_step;
    if (t + j + VALUE_TILE < p->count) {
      int64_t ahead = (p->rows[t + j + VALUE_TILE] * c->kv_heads + kv_head) * c->value_step;
      fetch_cached(c->values, ahead, c->value_size, is_bf16);
    }
  }
  for (int64_t d = 0; d < c->value_size; d += LANES) {
    int count = c->value_size - d < LANES ? (int)(c->value_size - d) : LANES;
    vec values[VALUE_TILE];
#pragma GCC unroll 8
    for (int j = 0; j < tokens; j++) values[j] = load_cached(c->values, at[j] + d, count, is_bf16);
    for (int64_t h = head; h < end; h++) {
      const float *weights = p->weights + h * PIECE_TOKENS + t;
      float *sums = p->sums + h * c->wide_value + d;
      vec sum = t ? load(sums) : (vec){0};
#pragma GCC unroll 8
      for (int j = 0; j < tokens; j++) sum += weights[j] * values[j];
      store(sums, sum);
    }
  }
}

INLINE void sum_values(const attention_call *c, const piece *p, const int is_bf16) {
  int t = 0;
  for (; t + VALUE_TILE <= p->count; t += VALUE_TILE)
    for (int64_t h = p->head, end; h < p->last_head; h = end)
      add_values(VALUE_TILE, c, p, t, h, end = find_group_end(c, p, h), is_bf16);
  for (; t < p->count; t++)
    for (int64_t h = p->head, end; h < p->last_head; h = end)
      add_values(1, c, p, t, h, end = find_group_end(c, p, h), is_bf16);
}

INLINE void attend_piece_of(const attention_call *c, const piece *p, const int is_bf16) {
  compute_scores(c, p, is_bf16);
  for (int64_t h = p->head; h < p->last_head; h++) compute_weights(p, h);
  sum_values(c, p, is_bf16);
}

// One of `cuts` parts of the heads, in blocks.
static void attend_piece(const attention_call *c, int64_t round, int64_t slot, int64_t index, int64_t cut, int64_t cuts) {
  int64_t query = round + slot, stop = c->stops[query], first = find_first(c, query);
  int64_t begin = (first / PIECE_TOKENS + index) * PIECE_TOKENS, end = begin + PIECE_TOKENS;
  if (begin < first) begin = first;
  if (end > stop) end = stop;
  if (begin >= end) return;
  int64_t place = (slot * c->most_pieces + index) * c->heads;
  piece p = {
      .queries = c->queries + slot * c->heads * c->wide_key,
      .head = c->heads * cut / cuts,
      .last_head = c->heads * (cut + 1) / cuts,
      .count = (int)(end - begin),
      .weights = c->weights + omp_get_thread_num() * c->heads * PIECE_TOKENS,
      .sums = c->sums + place * c->wide_value,
      .totals = c->totals + 2 * place,
  };
  const int64_t *pages = c->page_ids + c->starts[query];
  for (int64_t token = begin; token < end; token++)
    p.rows[token - begin] = pages[token / c->page_tokens] * c->page_tokens + token % c->page_tokens;
  int64_t last = p.last_head, blocks = (last - p.head) * c->wide_key / BLOCK_NUMBERS + 1;
  int64_t block = (last - p.head + blocks - 1) / blocks;
  for (; p.head < last; p.head = p.last_head) {
    p.last_head = p.head + block < last ? p.head + block : last;
    if (c->is_bf16) {
      attend_piece_of(c, &p, 1);
    } else {
      attend_piece_of(c, &p, 0);
    }
  }
}

// Scales and widens the query of one head, zeros behind it.
static void widen_query(const attention_call *c, int64_t round, int64_t slot, int64_t head) {
  int64_t source = ((round + slot) * c->heads + head) * c->key_size;
  float *target = c->queries + (slot * c->heads + head) * c->wide_key;
  for (int64_t k = 0; k < c->wide_key; k += LANES) {
    int64_t left = c->key_size - k;
    int count = left > LANES ? LANES : left > 0 ? (int)left : 0;
    store(target + k, load_cached(c->q, source + k, count, c->q_is_bf16) * c->scale);
  }
}

// The weighted mean over all pieces of one head; a sink takes part in it with no value.
static void join_pieces(const attention_call *c, int64_t round, int64_t slot, int64_t head) {
  int64_t query = round + slot, pieces = count_pieces(c, query), place = slot * c->most_pieces * c->heads + head;
  const float *totals = c->totals + 2 * place, *sums = c->sums + place * c->wide_value;
  float largest = c->sinks ? c->sinks[head] : totals[0], total = 0, factors[pieces];
  for (int64_t p = 0; p < pieces; p++) {
    float other = totals[2 * p * c->heads];
    largest = other > largest ? other : largest;
  }
  for (int64_t p = 0; p < pieces; p++) {
    factors[p] = exp_vec(splat(totals[2 * p * c->heads] - largest))[0];
    total += factors[p] * totals[2 * p * c->heads + 1];
  }
  if (c->sinks) total += exp_vec(splat(c->sinks[head] - largest))[0];
  int64_t target = (query * c->heads + head) * c->value_size;
  for (int64_t d = 0; d < c->value_size; d += LANES) {
    int count = c->value_size - d < LANES ? (int)(c->value_size - d) : LANES;
    vec sum = {0};
    for (int64_t p = 0; p < pieces; p++) sum += factors[p] * load(sums + p * c->heads * c->wide_value + d);
    sum /= total;
    if (c->q_is_bf16) {
      store_bf16_head((uint16_t *)c->y + target + d, round_to_bf16(sum), count);
    } else {
      memcpy((float *)c->y + target + d, &sum, 4 * (size_t)count);
    }
  }
}

static void attend_round(const attention_call *c, int64_t round, int64_t queries) {
  int64_t products = 0;
  for (int64_t n = round; n < round + queries; n++)
    products += (c->stops[n] - find_first(c, n)) * c->heads * (c->key_size + c->value_size);
  int threads = products > FEW_PRODUCTS ? c->threads : 1;
  int64_t pieces = queries * c->most_pieces, cuts = pieces < 2 * threads ? (2 * threads + pieces - 1) / pieces : 1;
  if (threads == 1) cuts = 1;
  if (cuts > c->heads) cuts = c->heads;
  block_run runs[threads];
  share_blocks(runs, threads, pieces * cuts);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < queries * c->heads; i++) widen_query(c, round, i / c->heads, i % c->heads);
    for (int64_t block; (block = take_block(runs, threads)) >= 0;) {
      int64_t index = block / cuts;
      attend_piece(c, round, index / c->most_pieces, index % c->most_pieces, block % cuts, cuts);
    }
#pragma omp barrier
#pragma omp for schedule(static)
    for (int64_t i = 0; i < queries * c->heads; i++) join_pieces(c, round, i / c->heads, i % c->heads);
  }
}

INLINE int64_t widen_size(int64_t size) { return (size + LANES - 1) / LANES * LANES; }

// Allocates the scratch memory and returns it, or null.
static float *make_scratch(attention_call *c) {
  int64_t held = c->num_queries < ROUND_QUERIES ? c->num_queries : ROUND_QUERIES;
  c->most_pieces = 1;
  for (int64_t n = 0; n < c->num_queries; n++)
    if (count_pieces(c, n) > c->most_pieces) c->most_pieces = count_pieces(c, n);
  c->wide_key = widen_size(c->key_size);
  c->wide_value = widen_size(c->value_size);
  int64_t queries = held * c->heads * c->wide_key, weights = c->threads * c->heads * PIECE_TOKENS;
  int64_t places = held * c->most_pieces * c->heads;
  float *memory = malloc(4 * (size_t)(queries + weights + places * (c->wide_value + 2)));
  c->queries = memory;
  c->weights = memory + queries;
  c->sums = c->weights + weights;
  c->totals = c->sums + places * c->wide_value;
  return memory;
}

// Returns 0, 1 when memory is lacking, or 2 when a page or a number of tokens is out of range.
int moesys_attend_pages(attention_call *c) {
  if (!is_sound(c)) return 2;
  float *scratch = make_scratch(c);
  if (!scratch) return 1;
  for (int64_t round = 0; round < c->num_queries; round += ROUND_QUERIES) {
    int64_t left = c->num_queries - round;
    attend_round(c, round, left < ROUND_QUERIES ? left : ROUND_QUERIES);
  }
  free(scratch);
  return 0;
}
