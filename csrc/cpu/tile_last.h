// The case n % 16 == 1 with many rows: for the single last column, lanes hold rows instead of columns. One multiply
// then serves all rows; with columns in the lanes it would take one per row, using 1 lane of 16. Include after a
// target's tile header.
#pragma once

#include "tile_codes.h"

namespace {

// Fewest rows for which this pays off: kLastRows of a Tile that has run_last.
constexpr int kRowsForLast = 6;

// The sums of the codes of R rows in a group, row r in lane r.
template <int R>
inline VI last_sums(const NybbleLinearArgs* a, int64_t row, int64_t g) {
  int32_t sums[W] = {};
  for (int r = 0; r < R; r++) sums[r] = a->act_sum[(row + r) * a->groups + g];
  return vi_load(sums);
}

// Like GroupStart, for one column, with row r in lane r.
template <int R>
inline VI last_start(const NybbleLinearArgs* a, int64_t row, int64_t column, int64_t g) {
  if (a->minimum) return vi_mul(last_sums<R>(a, row, g), vi_set1(start_beside_minimum(a)));
  return vi_mul(last_sums<R>(a, row, g), vi_set1(a->zero_point ? a->zero_point[group_at(a, column, g)] : 1));
}

// Like group_scale, for one column, in every lane.
inline VF last_scale(const NybbleLinearArgs* a, int64_t column, int64_t g) {
  return one_scale(a->scale, a->scale_dtype, group_at(a, column, g));
}

// Like add_minimum, for one column.
template <int R>
inline VF with_last_minimum(const NybbleLinearArgs* a, int64_t row, int64_t column, int64_t g, VF sum) {
  if (!a->minimum) return sum;
  return vf_fma(vf_of_int(last_sums<R>(a, row, g)), one_scale(a->minimum, a->scale_dtype, group_at(a, column, g)), sum);
}

// Calls step(i % 4) for each i in [0, count): four accumulators in turn hide the latency of the multiply.
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
