// Rows of tokens through their experts: up (and gate) product, activation, down product.
//
// Rows are read where they lie, through their ids. Each phase is cut into (expert, block of weight rows), so that
// every weight is read from memory once, with a barrier between the phases; an expert with many rows has its block made
// into panels first. Where one view holds every expert, a third phase sums each token's rows.
#include <stdlib.h>

#include "blocks.h"
#include "operands.h"
#include "panels.h"
#include "row_sum.h"

#define UNITS 32         // inner units per block, two weight rows each with a gate
#define UNITS_INT8 64    // a whole group, which is rounded where it is computed
#define LARGEST_UNITS 64
#define BLOCK_COLUMNS 64
#define BLOCK_WEIGHT_ROWS (2 * LARGEST_UNITS)  // the most that a block in panels has

// In the order of `_ACTIVATIONS` in library.py.
enum activation { SWIGLU, CLAMPED_SWIGLU, GELU, RELU };

typedef struct {
  activations x;
  const int64_t *row_ids, *offsets;
  const int64_t *slots;  // by expert, -1 for none; NULL where slot e holds expert e
  int64_t num_experts, num_rows, num_assignments, num_slots;
  matrix gate_up, down;
  const float *gate_up_bias, *down_bias;
  int32_t activation;
  float limit, alpha;
  int64_t inner;
  activations inner_rows;
  void *y;  // float32; bfloat16 where only its sums are wanted, and in bfloat16
  row_sums sums;  // of y; results are NULL where rows are wanted and not sums
  int32_t threads;
} experts_call;

typedef float unit_rows[TILE_ROWS][LARGEST_UNITS];
typedef float column_rows[TILE_ROWS][BLOCK_COLUMNS];

INLINE int64_t get_slot(const experts_call *c, int64_t expert) { return c->slots ? c->slots[expert] : expert; }

INLINE int64_t count_rows(const experts_call *c, int64_t expert) {
  return c->offsets[expert + 1] - c->offsets[expert];
}

// Whether rows are wanted for their sums only, and those in bfloat16, to which rows are rounded before.
INLINE int sums_halves(const experts_call *c) { return c->sums.results && c->sums.is_bf16; }

INLINE int has_gate(const experts_call *c) { return c->activation == SWIGLU || c->activation == CLAMPED_SWIGLU; }

// gate and up rows to inner activations, in place of `up`.
static void activate(const experts_call *c, int rows, int units, unit_rows gate, unit_rows up) {
  for (int i = 0; i < rows; i++) {
    if (c->activation == GELU) {
      for (int u = 0; u < units; u++) up[i][u] = 0.5f * up[i][u] * (1.0f + erff(up[i][u] * 0.70710678118654752f));
      continue;
    }
    for (int u = 0; u < units; u += LANES) {
      vec b = load(up[i] + u);
      if (c->activation == RELU) {
        vec_i32 negative = b < 0;
        store(up[i] + u, (vec)(~negative & (vec_i32)b));
        continue;
      }
      vec a = load(gate[i] + u);
      if (c->activation == CLAMPED_SWIGLU) {
        vec limit = splat(c->limit);
        a = clamp(a, splat(-INFINITY), limit);
        b = clamp(b, -limit, limit) + 1.0f;
        store(up[i] + u, a * sigmoid_vec(a * c->alpha) * b);
      } else {
        store(up[i] + u, a * sigmoid_vec(a) * b);
      }
    }
  }
}

// Units [unit, unit + count) of a tile's assignments, `width` of them at a time, half of the weight rows gates if that is
// half of TILE_COLUMNS.
INLINE void multiply_units(const experts_call *c, int64_t slot, const row_tile *x, int64_t unit, int count,
                           const int width, unit_rows gate, unit_rows up) {
  for (int u = 0; u < count; u += width) {
    int64_t columns[TILE_COLUMNS];
    float result[TILE_ROWS][TILE_COLUMNS];
    for (int j = 0; j < TILE_COLUMNS; j++) {
      int64_t row = least(unit + u + j % width, unit + count - 1);
      columns[j] = j < width ? row : c->inner + row;
    }
    multiply_tile(x, &c->gate_up, slot, columns, width, result);
    for (int i = 0; i < x->count; i++) {
      if (width < TILE_COLUMNS) memcpy(gate[i] + u, result[i], 4 * width);
      memcpy(up[i] + u, result[i] + TILE_COLUMNS - width, 4 * width);
    }
  }
}

static void make_unit_panels(const experts_call *c, int64_t slot, int64_t unit, int count, float *panels) {
  int width = has_gate(c) ? PANEL / 2 : PANEL;
  for (int u = 0; u < count; u += width) {
    int64_t rows[PANEL];
    for (int j = 0; j < PANEL; j++) {
      int64_t row = least(unit + u + j % width, unit + count - 1);
      rows[j] = j < width ? row : c->inner + row;
    }
    panels = make_panel(&c->x, &c->gate_up, slot, rows, panels);
  }
}

static void multiply_unit_panels(const experts_call *c, const row_tile *x, int count, const float *panels,
                                 unit_rows gate, unit_rows up) {
  int64_t words = count_words(&c->x, &c->gate_up);
  for (int u = 0; u < count; panels += PANEL * words) {
    float *gated[PANEL_VECTORS] = {gate[0] + u, up[0] + u}, *plain[PANEL_VECTORS] = {up[0] + u, up[0] + u + LANES};
    multiply_panel(x, panels, words, has_gate(c) ? gated : plain, LARGEST_UNITS);
    u += has_gate(c) ? LANES : PANEL;
  }
}

static void add_biases(const experts_call *c, int64_t slot, int rows, int64_t unit, int count, unit_rows gate,
                       unit_rows up) {
  const float *bias = c->gate_up_bias + slot * c->gate_up.rows + unit;
  for (int i = 0; i < rows; i++)
    for (int u = 0; u < count; u++) {
      if (has_gate(c)) gate[i][u] += bias[u];
      up[i][u] += bias[has_gate(c) ? c->inner + u : u];
    }
}

// Stores units [unit, unit + count) of an assignment's inner activations as the down matrix wants them.
static void store_inner(const experts_call *c, int64_t assignment, int64_t unit, int count, const float *values) {
  const activations *inner = &c->inner_rows;
  int64_t index = assignment * inner->columns + unit;
#if MULTIPLIES_BF16
  if (meets_halves(inner, &c->down)) {
    store_bf16((uint16_t *)inner->rounded + index, values, count);
    return;
  }
#endif
  memcpy(inner->values + index, values, 4 * (size_t)count);
  if (c->down.format != WEIGHT_W8A8) return;
  memset(inner->values + index + count, 0, 4 * (size_t)(num_groups(count) * GROUP - count));
  round_row(inner, assignment, unit, unit + count);
}

static void compute_inner(const experts_call *c, int64_t expert, int64_t unit, int count, float *panels) {
  int64_t slot = get_slot(c, expert);
  int in_panels = wants_panels(&c->x, &c->gate_up, count_rows(c, expert));
  if (in_panels) make_unit_panels(c, slot, unit, count, panels);
  for (int64_t a = c->offsets[expert]; a < c->offsets[expert + 1]; a += TILE_ROWS) {
    int rows = (int)least(TILE_ROWS, c->offsets[expert + 1] - a);
    row_tile tile;
    find_rows(&tile, &c->x, &c->gate_up, rows, c->row_ids + a);
    unit_rows gate, up;
    if (count % LANES) memset(gate, 0, sizeof gate), memset(up, 0, sizeof up);
    if (in_panels) {
      multiply_unit_panels(c, &tile, count, panels, gate, up);
    } else if (has_gate(c)) {
      multiply_units(c, slot, &tile, unit, count, TILE_COLUMNS / 2, gate, up);
    } else {
      multiply_units(c, slot, &tile, unit, count, TILE_COLUMNS, gate, up);
    }
    if (c->gate_up_bias) add_biases(c, slot, rows, unit, count, gate, up);
    activate(c, rows, count, gate, up);
    for (int i = 0; i < rows; i++) store_inner(c, a + i, unit, count, up[i]);
  }
}

static void make_column_panels(const experts_call *c, int64_t slot, int64_t column, int64_t column_end, float *panels) {
  for (int64_t j = column; j < column_end; j += PANEL) {
    int64_t rows[PANEL];
    for (int n = 0; n < PANEL; n++) rows[n] = least(j + n, column_end - 1);
    panels = make_panel(&c->inner_rows, &c->down, slot, rows, panels);
  }
}

// Columns [column, column_end) of the results of a tile of inner rows.
INLINE void multiply_columns(const experts_call *c, int64_t slot, const row_tile *x, int64_t column, int64_t column_end,
                             column_rows results) {
  for (int64_t j = column; j < column_end; j += TILE_COLUMNS) {
    int64_t columns[TILE_COLUMNS];
    float result[TILE_ROWS][TILE_COLUMNS];
    for (int n = 0; n < TILE_COLUMNS; n++) columns[n] = least(j + n, column_end - 1);
    multiply_tile(x, &c->down, slot, columns, TILE_COLUMNS, result);
    for (int i = 0; i < x->count; i++) memcpy(results[i] + (j - column), result[i], sizeof result[i]);
  }
}

static void multiply_column_panels(const experts_call *c, const row_tile *x, int count, const float *panels,
                                   column_rows results) {
  int64_t words = count_words(&c->inner_rows, &c->down);
  for (int n = 0; n < count; n += PANEL, panels += PANEL * words)
    multiply_panel(x, panels, words, (float *[]){results[0] + n, results[0] + n + LANES}, BLOCK_COLUMNS);
}

// Stores columns [column, column + count) of an assignment's result, with their biases.
static void store_outer(const experts_call *c, int64_t slot, int64_t assignment, int64_t column, int count,
                        float *values) {
  if (c->down_bias)
    for (int n = 0; n < count; n++) values[n] += c->down_bias[slot * c->down.rows + column + n];
  int64_t index = assignment * c->down.rows + column;
  if (!sums_halves(c)) {
    memcpy((float *)c->y + index, values, 4 * (size_t)count);
    return;
  }
  uint16_t *target = (uint16_t *)c->y + index;
  int n = 0;
  for (; n + LANES <= count; n += LANES) store_bf16_head(target + n, round_to_bf16(load(values + n)), LANES);
  if (n < count) store_bf16_head(target + n, round_to_bf16(load_head(values + n, count - n)), count - n);
}

static void compute_outer(const experts_call *c, int64_t expert, int64_t column, int64_t column_end, float *panels) {
  int64_t slot = get_slot(c, expert);
  int count = (int)(column_end - column);
  int in_panels = wants_panels(&c->inner_rows, &c->down, count_rows(c, expert));
  if (in_panels) make_column_panels(c, slot, column, column_end, panels);
  for (int64_t a = c->offsets[expert]; a < c->offsets[expert + 1]; a += TILE_ROWS) {
    int rows = (int)least(TILE_ROWS, c->offsets[expert + 1] - a);
    int64_t ids[TILE_ROWS];
    for (int i = 0; i < rows; i++) ids[i] = a + i;
    row_tile tile;
    find_rows(&tile, &c->inner_rows, &c->down, rows, ids);
    column_rows results;
    if (in_panels) {
      multiply_column_panels(c, &tile, count, panels, results);
    } else {
      multiply_columns(c, slot, &tile, column, column_end, results);
    }
    for (int i = 0; i < rows; i++) store_outer(c, slot, a + i, column, count, results[i]);
  }
}

static int is_sound(const experts_call *c) {
  for (int64_t e = 0; e < c->num_experts; e++)
    if (get_slot(c, e) < -1 || get_slot(c, e) >= c->num_slots) return 0;
  return are_offsets(c->offsets, c->num_experts, c->num_assignments) &&
         are_ids(c->row_ids, c->num_assignments, c->num_rows) &&
         (!c->sums.results || is_sound_sum(&c->sums, c->num_assignments));
}

// Floats that a thread's panels take; 0 where no expert has them.
static int64_t count_panel_floats(const experts_call *c) {
  int64_t most_rows = 0, words = 0;
  for (int64_t e = 0; e < c->num_experts; e++)
    if (get_slot(c, e) >= 0 && count_rows(c, e) > most_rows) most_rows = count_rows(c, e);
  if (wants_panels(&c->x, &c->gate_up, most_rows)) words = count_words(&c->x, &c->gate_up);
  if (wants_panels(&c->inner_rows, &c->down, most_rows)) {
    int64_t inner_words = count_words(&c->inner_rows, &c->down);
    words = inner_words > words ? inner_words : words;
  }
  return BLOCK_WEIGHT_ROWS * words;
}

// Returns 0, 1 when there is no memory for the list of experts or for panels, or 2 when an index is out of range.
int moesys_experts(const experts_call *c) {
  if (!is_sound(c)) return 2;
  int64_t panel_floats = count_panel_floats(c);
  int64_t *busy = malloc(sizeof(int64_t) * (size_t)(c->num_experts + 1));
  float *panels = panel_floats ? aligned_alloc(64, 4 * (size_t)(panel_floats * c->threads)) : 0;
  if (!busy || (panel_floats && !panels)) {
    free(busy);
    free(panels);
    return 1;
  }
  int64_t num_busy = 0;
  for (int64_t e = 0; e < c->num_experts; e++)
    if (get_slot(c, e) >= 0 && c->offsets[e + 1] > c->offsets[e]) busy[num_busy++] = e;
  int units = c->down.format == WEIGHT_W8A8 ? UNITS_INT8 : UNITS;
  int64_t unit_blocks = (c->inner + units - 1) / units;
  int64_t column_blocks = (c->down.rows + BLOCK_COLUMNS - 1) / BLOCK_COLUMNS;
  if (c->gate_up.format == WEIGHT_W8A8) round_rows(&c->x, c->num_rows, c->threads);
  block_run inner_runs[c->threads], outer_runs[c->threads], sum_runs[c->threads];
  share_blocks(inner_runs, c->threads, num_busy * unit_blocks);
  share_blocks(outer_runs, c->threads, num_busy * column_blocks);
  share_blocks(sum_runs, c->threads, c->sums.results ? count_sum_blocks(&c->sums, c->down.rows) : 0);
#pragma omp parallel num_threads(c->threads)
  {
    float *own_panels = panels ? panels + omp_get_thread_num() * panel_floats : 0;
    for (int64_t block; (block = take_block(inner_runs, c->threads)) >= 0;) {
      int64_t unit = block % unit_blocks * units;
      compute_inner(c, busy[block / unit_blocks], unit, (int)least(units, c->inner - unit), own_panels);
    }
#pragma omp barrier
    for (int64_t block; (block = take_block(outer_runs, c->threads)) >= 0;) {
      int64_t column = block % column_blocks * BLOCK_COLUMNS;
      compute_outer(c, busy[block / column_blocks], column, least(column + BLOCK_COLUMNS, c->down.rows),
                    own_panels);
    }
#pragma omp barrier
    for (int64_t block; (block = take_block(sum_runs, c->threads)) >= 0;)
      sum_block(&c->sums, c->y, sums_halves(c), c->down.rows, block);
  }
  free(panels);
  free(busy);
  return 0;
}
