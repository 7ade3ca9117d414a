// The register tiles for 8-bit activations in plain C++. Include after tile_scalar.h.
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

// Weights with scales by group, kWords words of four k in a line: bytes of n16k4g, or nibbles of n16k8.
template <int kWords>
struct UnsignedTile : TileDefaults {
  template <int R, int V>
  using Acc = VF[R][1];

  static constexpr int vectors(int) { return 1; }

  static int code(uint8_t byte, int word) { return kWords == 1 ? byte : byte >> 4 * word & 15; }

  template <int R, int V>
  NYBBLE_INLINE void run(const NybbleLinearArgs* a, const Place& at, const uint8_t* (&streams)[V], VF (&sum)[R][1],
                         Prefetcher& prefetcher) {
    const int8_t* x = panel_at<int8_t>(a, at.row) + at.begin * R;
    for (int64_t g = at.begin / a->group; g * a->group < at.end; g++) {
      const GroupStart start(a, at.row, at.column, g);
      VI acc[R];
      for (int r = 0; r < R; r++) acc[r] = start.of_row(r);
      with_nibbles(a, streams, prefetcher, [&](auto& from, auto&) __attribute__((always_inline)) {
        for (int64_t k = 0; k < a->group; k += 4 * kWords, from[0] += kLine)
          for (int word = 0; word < kWords; word++, x += 4 * R) add_word<R>(from[0], word, x, acc);
      });
      const VF scale = group_scale(a, at.column, g);
      for (int r = 0; r < R; r++) sum[r][0] = vf_fma(vf_of_int(acc[r]), scale, sum[r][0]);
      if (a->minimum)
        add_minimum<R>(a, at.row, g, group_minimum(a, at.column, g), [&](int r) -> VF& { return sum[r][0]; });
    }
  }

  // Adds the products of four k.
  template <int R>
  NYBBLE_INLINE void add_word(const uint8_t* line, int word, const int8_t* x, VI (&acc)[R]) {
    for (int r = 0; r < R; r++)
      for (int i = 0; i < W; i++)
        for (int j = 0; j < 4; j++) acc[r].v[i] += x[r * 4 + j] * code(line[i * 4 + j], word);
  }

  template <int R, int V>
  NYBBLE_INLINE void finish(const NybbleLinearArgs* a, int64_t row, int64_t column, const VF (&sum)[R][1]) {
    finish_w4a8<R, 1>(a, row, column, sum, 0);
  }
};

}  // namespace
