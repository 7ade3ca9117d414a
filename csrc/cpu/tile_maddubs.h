// The register tiles built on vpmaddubsw (u8 x s8, pairs summed to 16 bits, saturating) where no sum can saturate.
// Include after the vector header of a target without VNNI.
#pragma once

#include "tile_codes.h"

namespace {

// 7-bit activations as code + 64, in [0, 127]: a pair is at most 2 * 127 * 128 = 32512. The pairs of two lines are
// summed in 16 bits, so that one vpmaddwd serves both, but where the packed weight says that they may be too large.
struct Tile7 : CodesTile<64> {
  using X = uint8_t;

  static constexpr int vectors(int rows) { return fitting_vectors(rows + 2, 4); }

  template <int R, int V>
  NYBBLE_INLINE void multiply(VI (&acc)[R][V], const uint8_t* (&w)[V], const uint8_t* x) {
    const VI ones = vi_set1(0x10001);
    VI codes[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) {
      codes[v] = vi_load(w[v]);
      w[v] += kLine;
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
      const VI xs = word_at(x + 4 * r);
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) dot_u7s8(acc[r][v], xs, codes[v], ones);
    }
  }

  template <int R, int V>
  NYBBLE_INLINE void multiply_twice(VI (&acc)[R][V], const uint8_t* (&w)[V], const uint8_t* x) {
    VI codes[V], second[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) {
      codes[v] = vi_load(w[v]);
      second[v] = vi_load(w[v] + kLine);
      w[v] += 2 * kLine;
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
      const VI xs = word_at(x + 4 * r), xs2 = word_at(x + 4 * (R + r));
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) dot_u7s8_twice(acc[r][v], xs, codes[v], xs2, second[v]);
    }
  }

  template <int R, int V>
  NYBBLE_INLINE void run(const NybbleLinearArgs* a, const Place& at, const uint8_t* (&w)[V], VI (&acc)[R][V],
                         Prefetcher& prefetcher) {
    constexpr int kTiles = V * W > 16 ? V * W / 16 : 1;
    const uint8_t* x = panel_at<uint8_t>(a, at.row) + at.begin * R;
    const int64_t bytes = nybble_large_bytes(a->k_padded);
    const uint8_t* large = a->large + at.column / NYBBLE_TILE_N * bytes;
    for (int64_t k = at.begin; k < at.end; k += NYBBLE_LARGE_K) {
      int any = 0;
#pragma GCC unroll 4
      for (int t = 0; t < kTiles; t++) any |= large[t * bytes + k / NYBBLE_LARGE_K];
      const int64_t left = at.end - k, lines = left < NYBBLE_LARGE_K ? left / 4 : NYBBLE_LARGE_K / 4;
      // A loop of its own for the pairs before a large one: GCC 12 would load for both cases before a branch, and
      // spill.
      for (int pairs = static_cast<int>(lines / 2); pairs >= 0; pairs--) {
        const int small = __builtin_ctz(any | 1 << pairs);
        for (int i = 0; i < small; i++, x += 8 * R) multiply_twice<R, V>(acc, w, x);
        pairs -= small;
        any >>= small + 1;
        for (int64_t i = pairs ? 2 : lines % 2; i > 0; i--, x += 4 * R) multiply<R, V>(acc, w, x);
      }
      prefetcher.used(w, lines, false);
    }
  }
};

// Low and high nibbles of a packed line.
struct PackedNibbles {
  static constexpr int64_t kDecodedLine = 0, kBytes = kLine;
  NYBBLE_INLINE VI first(const uint8_t* line) { return vi_and(vi_load(line), vi_set1(0x0f0f0f0f)); }
  NYBBLE_INLINE VI second(const uint8_t* line) { return vi_and(vi_shift_right<4>(vi_load(line)), vi_set1(0x0f0f0f0f)); }
};

// The nibble is the unsigned operand: a pair is at most 2 * 15 * 128 = 3840, so 8 pairs fit in 16 bits. They are
// widened to int32 sums of a group, which lie in memory: the 16-bit sums take the registers.
template <class Nibbles>
struct NibbleTile : GroupsTile {
  static constexpr int64_t kDecodedLine = Nibbles::kDecodedLine;
  static constexpr int64_t kWidenEvery = 4;  // lines, of two pairs each

  static constexpr int vectors(int rows) {
    return kDecodedLine > 0 ? decoded_vectors(rows + 1, 2) : fitting_vectors(rows + 1, 2);
  }

  template <int R, int V, bool kFirst>
  NYBBLE_INLINE void dot(VI (&sum)[R][V], const VI (&nibbles)[V], const int8_t* x) {
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
      const VI xs = word_at(x + 4 * r);
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) {
        if constexpr (kFirst)
          sum[r][v] = mul_u8s8_16(nibbles[v], xs);
        else
          dot_u8s8_16(sum[r][v], nibbles[v], xs);
      }
    }
  }

  template <int R, int V, bool kFirst>
  NYBBLE_INLINE void multiply(VI (&sum)[R][V], const uint8_t* (&w)[V], const int8_t*& x) {
    VI nibbles[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) nibbles[v] = Nibbles::first(w[v]);
    dot<R, V, kFirst>(sum, nibbles, x);
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) {
      nibbles[v] = Nibbles::second(w[v]);
      w[v] += Nibbles::kBytes;
    }
    dot<R, V, false>(sum, nibbles, x + 4 * R);
    x += 8 * R;
  }

  // acc += the products of so many lines, at most kWidenEvery.
  template <int R, int V>
  NYBBLE_INLINE void add_lines(VI (&acc)[R][V], const uint8_t* (&w)[V], const int8_t*& x, int64_t lines) {
    VI sum[R][V];
    multiply<R, V, true>(sum, w, x);
    for (; lines > 1; lines--) multiply<R, V, false>(sum, w, x);
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) acc[r][v] = vi_add(acc[r][v], vi_sum_pairs_s16(sum[r][v]));
  }

  template <int R, int V>
  NYBBLE_INLINE void run(const NybbleLinearArgs* a, const Place& at, const uint8_t* (&w)[V], VF (&sum)[R][V],
                         Prefetcher& prefetcher) {
    const int8_t* x = panel_at<int8_t>(a, at.row) + at.begin * R;
    GroupNumbers<V> numbers(a, at.column);
    for (int64_t g = at.begin / a->group; g * a->group < at.end; g++) {
      VI acc[R][V];
      start_group<R, V>(a, at, g, acc);
      with_nibbles(a, w, prefetcher, [&](auto& from, auto& fetch) __attribute__((always_inline)) {
        int64_t lines = a->group / 8;
        for (; lines >= kWidenEvery; lines -= kWidenEvery) {
          add_lines<R, V>(acc, from, x, kWidenEvery);
          fetch.used(from, kWidenEvery, false);
        }
        if (lines > 0) add_lines<R, V>(acc, from, x, lines);
      });
      add_group<R, V>(a, at, g, acc, sum, numbers);
    }
  }

  static void decode(const NybbleLinearArgs* a, int64_t column, int64_t begin, int64_t end, uint8_t* to) {
    decode_halves<PackedNibbles>(codes_at(a, column) + begin * NYBBLE_TILE_N / 2, (end - begin) / 8, to);
  }
};

template <int kRows>
inline NybbleStatus run_nibbles(const NybbleLinearArgs* a) {
  if constexpr (kPlanes)
    return run_tiles<NibbleTile<PackedNibbles>, kRows>(a);  // kernels.def: never decoded before
  else
    return a->decoded ? run_tiles<NibbleTile<DecodedHalves>, kRows>(a) : run_tiles<NibbleTile<PackedNibbles>, kRows>(a);
}

}  // namespace
