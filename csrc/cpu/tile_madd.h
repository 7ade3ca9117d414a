// The w8a8 register tiles built on vpmaddwd over codes widened to 16 bits: exact for every input, unlike vpmaddubsw,
// which saturates (255 * 127 * 2). Four k of a column lie in 4 bytes; its even and its odd k make two vectors of 16-bit
// pairs, which the panel's order 0 2 1 3 matches. Include after the vector header of a target without VNNI.
#pragma once

#include "tile_codes.h"

namespace {

// Even and odd codes of a packed line, widened.
struct PackedCodes {
  static constexpr int64_t kDecodedLine = 0, kBytes = kLine;
  NYBBLE_INLINE VI first(const uint8_t* line) { return vi_even_s8(vi_load(line)); }
  NYBBLE_INLINE VI second(const uint8_t* line) { return vi_odd_s8(vi_load(line)); }
};

// The same of n16k4g, whose codes are unsigned.
struct PackedBytes {
  static constexpr int64_t kDecodedLine = 0, kBytes = kLine;
  NYBBLE_INLINE VI first(const uint8_t* line) { return vi_and(vi_load(line), vi_set1(0x00ff00ff)); }
  NYBBLE_INLINE VI second(const uint8_t* line) { return vi_shift_right<8>(vi_load(line)); }
};

// What both tiles share.
template <class Codes, class Sums>
struct MaddSteps : Sums {
  using X = int16_t;
  static constexpr int64_t kDecodedLine = Codes::kDecodedLine;

  static constexpr int vectors(int rows) {
    return kDecodedLine > 0 ? decoded_vectors(rows + 1, 2) : fitting_vectors(rows + 1, 2);
  }

  template <int R, int V>
  NYBBLE_INLINE void dot(VI (&acc)[R][V], const VI (&codes)[V], const int16_t* x) {
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
      const VI xs = word_at(x + 4 * r);
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) dot_s16(acc[r][v], codes[v], xs);
    }
  }

  template <int R, int V>
  NYBBLE_INLINE void multiply(VI (&acc)[R][V], const uint8_t* (&w)[V], const int16_t* x) {
    VI codes[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) codes[v] = Codes::first(w[v]);
    dot<R, V>(acc, codes, x);
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) {
      codes[v] = Codes::second(w[v]);
      w[v] += Codes::kBytes;
    }
    dot<R, V>(acc, codes, x + 2);
  }
};

template <class Codes>
struct MaddTile : MaddSteps<Codes, CodesTile<0>> {
  template <int R, int V>
  NYBBLE_INLINE void run(const NybbleLinearArgs* a, const Place& at, const uint8_t* (&w)[V], VI (&acc)[R][V],
                         Prefetcher& prefetcher) {
    const int16_t* x = panel_at<int16_t>(a, at.row) + at.begin * R;
    each_line<8>((at.end - at.begin) / 4, w, prefetcher, false, [&]() __attribute__((always_inline)) {
      MaddTile::template multiply<R, V>(acc, w, x);
      x += 4 * R;
    });
  }

  static void decode(const NybbleLinearArgs* a, int64_t column, int64_t begin, int64_t end, uint8_t* to) {
    decode_halves<PackedCodes>(codes_at(a, column) + begin * NYBBLE_TILE_N, (end - begin) / 4, to);
  }
};

using Tile8 = MaddTile<PackedCodes>;

// Of weights with scales by group.
template <class Codes>
struct MaddGroups : MaddSteps<Codes, GroupsTile> {
  template <int R, int V>
  NYBBLE_INLINE void run(const NybbleLinearArgs* a, const Place& at, const uint8_t* (&w)[V], VF (&sum)[R][V],
                         Prefetcher& prefetcher) {
    const int16_t* x = panel_at<int16_t>(a, at.row) + at.begin * R;
    GroupNumbers<V> numbers(a, at.column);
    for (int64_t g = at.begin / a->group; g * a->group < at.end; g++) {
      VI acc[R][V];
      MaddGroups::template start_group<R, V>(a, at, g, acc);
      each_line<4>(a->group / 4, w, prefetcher, false, [&]() __attribute__((always_inline)) {
        MaddGroups::template multiply<R, V>(acc, w, x);
        x += 4 * R;
      });
      MaddGroups::template add_group<R, V>(a, at, g, acc, sum, numbers);
    }
  }

  static void decode(const NybbleLinearArgs* a, int64_t column, int64_t begin, int64_t end, uint8_t* to) {
    decode_halves<PackedBytes>(codes_at(a, column) + begin * NYBBLE_TILE_N, (end - begin) / 4, to);
  }
};

template <int kRows>
inline NybbleStatus run_madd(const NybbleLinearArgs* a) {
  return a->decoded ? run_tiles<MaddTile<DecodedHalves>, kRows>(a) : run_tiles<Tile8, kRows>(a);
}

template <int kRows>
inline NybbleStatus run_madd_groups(const NybbleLinearArgs* a) {
  return a->decoded ? run_tiles<MaddGroups<DecodedHalves>, kRows>(a) : run_tiles<MaddGroups<PackedBytes>, kRows>(a);
}

}  // namespace
