// The register tile for 8-bit activations in plain C++. Include after tile_scalar.h.
#pragma once

#include "tile_run.h"

namespace {

struct Tile8 : TileDefaults {
  using X = int8_t;
  template <int R, int V>
  using Acc = VI[R][1];

  static constexpr int vectors(int) { return 1; }

  template <int R, int V>
  NYBBLE_INLINE void multiply(VI (&acc)[R][1], const uint8_t* (&w)[V], const int8_t* x) {
    const int8_t* codes = reinterpret_cast<const int8_t*>(w[0]);
    for (int r = 0; r < R; r++)
      for (int i = 0; i < W; i++)
        for (int j = 0; j < 4; j++) acc[r][0].v[i] += x[r * 4 + j] * codes[i * 4 + j];
    w[0] += kLine;
  }

  template <int R, int V>
  NYBBLE_INLINE void run(const NybbleLinearArgs* a, const Place& at, const uint8_t* (&w)[V], VI (&acc)[R][1],
                         Prefetcher&) {
    const int8_t* x = panel_at<int8_t>(a, at.row) + at.begin * R;
    for (int64_t k = at.begin; k < at.end; k += 4, x += 4 * R) multiply<R, V>(acc, w, x);
  }

  template <int R, int V>
  NYBBLE_INLINE void finish(const NybbleLinearArgs* a, int64_t row, int64_t column, const VI (&acc)[R][1]) {
    finish_w8a8<R, 1>(a, row, column, acc, 0);
  }
};

}  // namespace
