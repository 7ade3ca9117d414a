// What the register tiles of quantized activations share. Include after a target's vector header.
#pragma once

#include "tile_run.h"

namespace {

// The same four bytes in every lane.
inline VI word_at(const void* p) {
  int32_t word;
  memcpy(&word, p, 4);
  return vi_set1(word);
}

template <int R, int V>
NYBBLE_INLINE void zero_all(VI (&sums)[R][V]) {
#pragma GCC unroll 16
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) sums[r][v] = vi_set1(0);
}

template <int R, int V>
NYBBLE_INLINE void add_all(VI (&to)[R][V], const VI (&sums)[R][V]) {
#pragma GCC unroll 16
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) to[r][v] = vi_add(to[r][v], sums[r][v]);
}

// How a tile reads a line in two halves: Packed has first(line) and second(line), which decode it each time; or the
// line was decoded before.
struct DecodedHalves {
  static constexpr int64_t kDecodedLine = 2 * kLine, kBytes = kDecodedLine;
  NYBBLE_INLINE VI first(const uint8_t* line) { return vi_load(line); }
  NYBBLE_INLINE VI second(const uint8_t* line) { return vi_load(line + kLine); }
};

template <class Packed>
inline void decode_halves(const uint8_t* from, int64_t lines, uint8_t* to) {
  for (; lines > 0; lines--, from += kLine, to += DecodedHalves::kBytes)
#pragma GCC unroll 2
    for (int64_t i = 0; i < kLine; i += sizeof(VI)) {
      vi_store(to + i, Packed::first(from + i));
      vi_store(to + kLine + i, Packed::second(from + i));
    }
}

// Weights of 8 bits with a scale a column, activations of code + kZero. The sums start at -kZero * column_sum, mod
// 2^32, so they are exact.
template <int kZero>
struct CodesTile : TileDefaults {
  template <int R, int V>
  using Acc = VI[R][V];

  template <int R, int V>
  NYBBLE_INLINE void start(const NybbleLinearArgs* a, int64_t column, VI (&acc)[R][V]) {
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) {
      const VI offset = kZero ? vi_mul(vi_load(a->column_sum + column + v * W), vi_set1(-kZero)) : vi_set1(0);
#pragma GCC unroll 16
      for (int r = 0; r < R; r++) acc[r][v] = offset;
    }
  }

  template <int R, int V>
  NYBBLE_INLINE void finish(const NybbleLinearArgs* a, int64_t row, int64_t column, const VI (&acc)[R][V]) {
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) finish_w8a8<R, V>(a, row, column + v * W, acc, v);
  }
};

// The scales and minimums of groups of V * W columns from `column` on. Where they have two levels, those of a block of
// groups are converted once.
template <int V>
class GroupNumbers {
 public:
  GroupNumbers(const NybbleLinearArgs* a, int64_t column) : a_(a), column_(column) {}

  // Must be called before those of a group are asked for.
  void enter(int64_t g) {
    g_ = g;
    if (!kLevels || g / NYBBLE_BLOCK_GROUPS == block_) return;
    block_ = g / NYBBLE_BLOCK_GROUPS;
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) {
      const int64_t place = scale_at(a_, column_ + v * W, g);
      vf_store(scale_[v], vf_load_as(scale_place(a_->scale, NYBBLE_F16, place), NYBBLE_F16, W));
      vf_store(minimum_[v], vf_neg(vf_load_as(scale_place(a_->minimum, NYBBLE_F16, place), NYBBLE_F16, W)));
    }
  }
  VF scale(int v) const { return kLevels ? of_level<false>(v, scale_[v]) : group_scale(a_, column_ + v * W, g_); }
  VF minimum(int v) const { return kLevels ? of_level<true>(v, minimum_[v]) : group_minimum(a_, column_ + v * W, g_); }

 private:
  template <bool kMinimum>
  VF of_level(int v, const float* block) const {
    const uint8_t* level = level_at<kMinimum>(a_, column_ + v * W, g_);
    if (!kMinimum) __builtin_prefetch(level + kLevelsAhead);
    return vf_mul(vf_of_int(vi_load_u8(level)), vf_load(block));
  }

  const NybbleLinearArgs* a_;
  int64_t column_, g_ = 0, block_ = -1;
  alignas(64) float scale_[V][W] = {}, minimum_[V][W] = {};
};

// Weights with scales by group. The int32 sums of a group are scaled in float32.
struct GroupsTile : TileDefaults {
  template <int R, int V>
  using Acc = VF[R][V];

  template <int R, int V>
  NYBBLE_INLINE void start_group(const NybbleLinearArgs* a, const Place& at, int64_t g, VI (&acc)[R][V]) {
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) {
      const GroupStart start(a, at.row, at.column + v * W, g);
#pragma GCC unroll 16
      for (int r = 0; r < R; r++) acc[r][v] = start.of_row(r);
    }
  }

  template <int R, int V>
  NYBBLE_INLINE void add_group(const NybbleLinearArgs* a, const Place& at, int64_t g, const VI (&acc)[R][V],
                               VF (&sum)[R][V], GroupNumbers<V>& numbers) {
    numbers.enter(g);
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) {
      const VF scale = numbers.scale(v);
#pragma GCC unroll 16
      for (int r = 0; r < R; r++) sum[r][v] = vf_fma(vf_of_int(acc[r][v]), scale, sum[r][v]);
      if (a->minimum)
        add_minimum<R>(a, at.row, g, numbers.minimum(v),
                       [&](int r) __attribute__((always_inline)) -> VF& { return sum[r][v]; });
    }
  }

  template <int R, int V>
  NYBBLE_INLINE void finish(const NybbleLinearArgs* a, int64_t row, int64_t column, const VF (&sum)[R][V]) {
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) finish_w4a8<R, V>(a, row, column + v * W, sum, v);
  }
};

}  // namespace
