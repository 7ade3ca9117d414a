// For many rows and the last column of a tile, where no others are left (n % 16 == 1): rows in the lanes instead of
// columns, so that one multiply serves as many rows, where a column in one lane of 16 would take one a row.
// Include after a target's tile header.
#pragma once

#include "tile_run.h"

namespace {

// Whether it pays for R rows in a tile of V vectors, and whether its first column is the last.
template <int R, int V>
constexpr bool kMayBeLast = R >= 6 && V * W == NYBBLE_TILE_N;

inline bool is_last(const NybbleLinearArgs* a, int64_t column) { return a->n - column == 1; }

// Four bytes in every lane.
inline VI word_at(const void* p) {
  int32_t word;
  memcpy(&word, p, 4);
  return vi_set1(word);
}

// GroupStart of the column, with row r in lane r.
template <int R>
inline VI last_start(const NybbleLinearArgs* a, int64_t row, int64_t column, int64_t g) {
  int32_t sums[W] = {};
  for (int r = 0; r < R; r++) sums[r] = a->act_sum[(row + r) * a->groups + g];
  return vi_mul(vi_load(sums), vi_set1(a->zero_point ? a->zero_point[group_at(a, column, g)] : 1));
}

// group_scale of the column, in every lane.
inline VF last_scale(const NybbleLinearArgs* a, int64_t column, int64_t g) {
  const uint32_t bits = uint32_t{static_cast<const uint16_t*>(a->scale)[group_at(a, column, g)]} << 16;
  float scale;
  memcpy(&scale, &bits, 4);
  return vf_set1(scale);
}

// step(i % 4) for each i of `count`: four sums in turn cover the latency of the multiply.
template <class Step>
NYBBLE_INLINE void each_of_four(int64_t count, const Step& step) {
  for (; count >= 4; count -= 4) {
    step(0);
    step(1);
    step(2);
    step(3);
  }
  if (count > 0) step(0);
  if (count > 1) step(1);
  if (count > 2) step(2);
}

}  // namespace
