// The register tile of 4-bit weights and 8-bit activations in plain C++. Include after tile_scalar.h.
#pragma once

#include "tile_run.h"

namespace {

struct NibbleTile : TileDefaults {
  template <int R, int V>
  using Acc = VF[R][1];

  static constexpr int vectors(int) { return 1; }

  template <int R, int V>
  NYBBLE_INLINE void run(const NybbleLinearArgs* a, const Place& at, const uint8_t* (&w)[V], VF (&sum)[R][1],
                         Prefetcher& prefetcher) {
    const int8_t* x = panel_at<int8_t>(a, at.row) + at.begin * R;
    for (int64_t g = at.begin / a->group; g * a->group < at.end; g++) {
      const GroupStart start(a, at.row, at.column, g);
      VI acc[R];
      for (int r = 0; r < R; r++) acc[r] = start.of_row(r);
      with_nibbles(a, w, prefetcher, [&](auto& from, auto&) __attribute__((always_inline)) {
        for (int64_t k = 0; k < a->group; k += 8, from[0] += kLine, x += 8 * R) add_line<R>(from[0], x, acc);
      });
      const VF scale = group_scale(a, at.column, g);
      for (int r = 0; r < R; r++) sum[r][0] = vf_fma(vf_of_int(acc[r]), scale, sum[r][0]);
      add_minimum<R>(a, at.row, at.column, g, [&](int r) -> VF& { return sum[r][0]; });
    }
  }

  // Adds the products of a line.
  template <int R>
  NYBBLE_INLINE void add_line(const uint8_t* w, const int8_t* x, VI (&acc)[R]) {
    for (int r = 0; r < R; r++)
      for (int i = 0; i < W; i++)
        for (int j = 0; j < 4; j++)
          acc[r].v[i] += x[r * 4 + j] * (w[i * 4 + j] & 15) + x[(R + r) * 4 + j] * (w[i * 4 + j] >> 4);
  }

  template <int R, int V>
  NYBBLE_INLINE void finish(const NybbleLinearArgs* a, int64_t row, int64_t column, const VF (&sum)[R][1]) {
    finish_w4a8<R, 1>(a, row, column, sum, 0);
  }
};

}  // namespace
