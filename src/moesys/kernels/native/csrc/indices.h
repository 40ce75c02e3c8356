// Whether indices lie where they may. They come from layers and dispatchers that users replace.
#pragma once

#include <stdint.h>

// Offsets of `count` groups rise from 0 to `end`.
static inline int are_offsets(const int64_t *offsets, int64_t count, int64_t end) {
  if (offsets[0] != 0 || offsets[count] != end) return 0;
  for (int64_t i = 0; i < count; i++)
    if (offsets[i] > offsets[i + 1]) return 0;
  return 1;
}

static inline int are_ids(const int64_t *ids, int64_t count, int64_t end) {
  for (int64_t i = 0; i < count; i++)
    if (ids[i] < 0 || ids[i] >= end) return 0;
  return 1;
}
