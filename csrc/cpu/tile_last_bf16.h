// tile_last.h for bfloat16 activations, two pairs per row and line: lane 2 r + p holds pair p of row r.
#pragma once

#include "tile_last.h"

namespace {

inline VI vi_pairs(int32_t even, int32_t odd) {
  int32_t lanes[W];
  for (int i = 0; i < W; i += 2) {
    lanes[i] = even;
    lanes[i + 1] = odd;
  }
  return vi_load(lanes);
}

constexpr int32_t kTwoOnes = 0x3f803f80;  // as bfloat16

// The accumulators of one column for R rows, in two parts to hide the latency of the multiply.
template <int R>
struct LastSums {
  static constexpr int kVectors = (2 * R + W - 1) / W, kTail = 2 * R - (kVectors - 1) * W;
  VF part[2][kVectors];

  LastSums() {
    for (auto& sums : part)
      for (auto& sum : sums) sum = vf_set1(0.0f);
  }

  // Adds the products of one line; every two lanes of `pairs` hold its two pairs of weights.
  void add(int i, VI pairs, const uint8_t* x) {
    if constexpr (kVectors == 2) dot_bf16(part[i][0], vi_load(x), pairs);
    dot_bf16(part[i][kVectors - 1], vi_load_first<kTail>(x + (kVectors - 1) * 64), pairs);
  }

  void add(const LastSums& sums, VF scale) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; v++) part[0][v] = vf_fma(vf_add(sums.part[0][v], sums.part[1][v]), scale, part[0][v]);
  }

  // Adds the activations of `count` k themselves, a multiple of 4.
  void add_activations(const uint8_t* x, int64_t count) {
    for (int64_t i = 0; i < count / 4; i++, x += 8 * R) add(static_cast<int>(i % 2), vi_set1(kTwoOnes), x);
  }

  void rows(VF (&of_row)[R][1]) const {
    float pairs[kVectors * W];
    for (int v = 0; v < kVectors; v++) vf_store(pairs + v * W, vf_add(part[0][v], part[1][v]));
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) of_row[r][0] = vf_set1(pairs[2 * r] + pairs[2 * r + 1]);
  }
};

}  // namespace
