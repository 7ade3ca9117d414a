// The w8a8 register tile built on vpmaddwd over sign-extended codes: exact for every input, unlike vpmaddubsw, which
// saturates (255 * 127 * 2). A register holds two partial sums for each of 4 columns, so that one 16-byte load of
// weights feeds one multiply. Include after tile_avx2.h.
#pragma once

#include "tile_run.h"

namespace {

struct Tile8 : TileDefaults {
  using X = int16_t;
  template <int R, int V>  // per vector of columns: sums of its first and of its second four columns
  using Acc = VI[R][V][2];

  static constexpr int vectors(int rows) { return fitting_vectors(2 * rows + 2, 1); }

  NYBBLE_INLINE VI widen(const uint8_t* p) {
    return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }

  template <int R, int V>
  NYBBLE_INLINE void multiply(VI (&acc)[R][V][2], const uint8_t* (&w)[V], const int16_t* x) {
    VI codes[V][2];
#pragma GCC unroll 2
    for (int v = 0; v < V; v++) {
      codes[v][0] = widen(w[v]);
      codes[v][1] = widen(w[v] + 16);
      w[v] += kLine;
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      int64_t four;
      memcpy(&four, x + 4 * r, 8);
      const VI xs = _mm256_set1_epi64x(four);
#pragma GCC unroll 2
      for (int v = 0; v < V; v++) {
        dot_s16(acc[r][v][0], codes[v][0], xs);
        dot_s16(acc[r][v][1], codes[v][1], xs);
      }
    }
  }

  template <int R, int V>
  NYBBLE_INLINE void finish(const NybbleLinearArgs* a, int64_t row, int64_t column, const VI (&acc)[R][V][2]) {
    VI sum[R][V];
#pragma GCC unroll 2
    for (int v = 0; v < V; v++) {
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) {
        const VI pairs = _mm256_hadd_epi32(acc[r][v][0], acc[r][v][1]);  // columns 0 1 4 5 | 2 3 6 7
        sum[r][v] = _mm256_permute4x64_epi64(pairs, _MM_SHUFFLE(3, 1, 2, 0));
      }
      finish_w8a8<R, V>(a, row, column + v * W, sum, v);
    }
  }

  template <int R, int V>
  NYBBLE_INLINE void run(const NybbleLinearArgs* a, const Place& at, const uint8_t* (&w)[V], VI (&acc)[R][V][2],
                         Prefetcher& prefetcher) {
    const int16_t* x = panel_at<int16_t>(a, at.row) + at.begin * R;
    each_line<8>((at.end - at.begin) / 4, w, prefetcher, false, [&]() __attribute__((always_inline)) {
      multiply<R, V>(acc, w, x);
      x += 4 * R;
    });
  }
};

}  // namespace
