// The register tiles for 8-bit activations built on smmla, which multiplies two rows by two columns, of eight k each.
// Two lines of packed weights are 64 bytes apart; zip brings the words of a column together, before nibbles are taken
// out of them, and those of a row likewise. From four rows on that takes fewer instructions than sdot. Include after
// tile_i8mm.h.
#pragma once

#include "tile_dot.h"

namespace {

constexpr int pairs_of(int rows) { return (rows + 1) / 2; }

inline VI zip_low(VI a, VI b) { return vzip1q_s32(a, b); }
inline VI zip_high(VI a, VI b) { return vzip2q_s32(a, b); }

// The sums of two rows and W columns, as 2 x 2 blocks: [pairs of rows][pairs of columns].
template <int R, int V>
using Blocks = VI[pairs_of(R)][2 * V];

// Word i of two lines of the panel, kWords each, for pairs of rows. kWhole: else of one line, and the others are 0. The
// row after an odd last one is 0.
template <int R, int kWords, bool kWhole>
struct RowPairs {
  VI at[pairs_of(R) + 1];

  NYBBLE_INLINE RowPairs of(const int8_t* x, int i) {
    RowPairs pairs;
    const Words<R> first = Words<R>::at(x + i * 4 * R);
    if constexpr (kWhole)
      join<0>(pairs, first, Words<R>::at(x + (kWords + i) * 4 * R));
    else
      join<0>(pairs, first, Words<R>{});
    return pairs;
  }

  template <int i>
  NYBBLE_INLINE void join(RowPairs& pairs, const Words<R>& first, const Words<R>& second) {
    if constexpr (2 * i < pairs_of(R)) {
      pairs.at[2 * i] = zip_low(first.four[i], second.four[i]);
      pairs.at[2 * i + 1] = zip_high(first.four[i], second.four[i]);
      join<i + 1>(pairs, first, second);
    }
  }
};

// Codes of n16k4, which are signed bytes.
struct Signed {
  static constexpr int kWords = 1;
  template <int i>
  NYBBLE_INLINE VI word(VI line) {
    return line;
  }
};

// Adds the products of the words of two lines from the i-th on, `codes` by columns; or of one line.
template <class Codes, int R, int V, bool kWhole, int i = 0>
NYBBLE_INLINE void multiply_words(VI (&acc)[pairs_of(R)][2 * V], const VI (&codes)[V][2], const int8_t* x) {
  if constexpr (i < Codes::kWords) {
    constexpr int kPairs = pairs_of(R);
    const auto rows = RowPairs<R, Codes::kWords, kWhole>::of(x, i);
#pragma GCC unroll 8
    for (int c = 0; c < 2 * V; c++) {
      const VI columns = Codes::template word<i>(codes[c / 2][c % 2]);
#pragma GCC unroll 8
      for (int p = 0; p < kPairs; p++) mmla_s8(acc[p][c], rows.at[p], columns);
    }
    multiply_words<Codes, R, V, kWhole, i + 1>(acc, codes, x);
  }
}

// Adds the products of two lines, or of one.
template <class Codes, int R, int V, bool kWhole>
NYBBLE_INLINE void multiply_pairs(VI (&acc)[pairs_of(R)][2 * V], const uint8_t* (&w)[V], const int8_t* x) {
  VI codes[V][2];
#pragma GCC unroll 4
  for (int v = 0; v < V; v++) {
    const VI first = vi_load(w[v]), second = kWhole ? vi_load(w[v] + kLine) : vi_set1(0);
    codes[v][0] = zip_low(first, second);
    codes[v][1] = zip_high(first, second);
    w[v] += kWhole ? 2 * kLine : kLine;
  }
  multiply_words<Codes, R, V, kWhole>(acc, codes, x);
}

// Row by row.
template <int R, int V>
NYBBLE_INLINE void rows_of(const VI (&acc)[pairs_of(R)][2 * V], VI (&rows)[R][V]) {
#pragma GCC unroll 16
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) {
      const int64x2_t left = vreinterpretq_s64_s32(acc[r / 2][2 * v]);
      const int64x2_t right = vreinterpretq_s64_s32(acc[r / 2][2 * v + 1]);
      rows[r][v] = vreinterpretq_s32_s64(r % 2 ? vzip2q_s64(left, right) : vzip1q_s64(left, right));
    }
}

struct PairTile8 : TileDefaults {
  template <int R, int V>
  using Acc = Blocks<R, V>;

  static constexpr int vectors(int rows) { return fitting_vectors(2 * pairs_of(rows), pairs_of(rows) + 4); }

  template <int R, int V>
  NYBBLE_INLINE void run(const NybbleLinearArgs* a, const Place& at, const uint8_t* (&w)[V], Blocks<R, V>& acc,
                         Prefetcher& prefetcher) {
    const int8_t* x = panel_at<int8_t>(a, at.row) + at.begin * R;
    const auto step = [&](auto lines) __attribute__((always_inline)) {
      multiply_pairs<Signed, R, V, lines.count == 2>(acc, w, x);
      x += 4 * R * lines.count;
    };
    each_lines<8, 2>((at.end - at.begin) / 4, w, prefetcher, R <= 2 && a->one_stream, step);
  }

  template <int R, int V>
  NYBBLE_INLINE void finish(const NybbleLinearArgs* a, int64_t row, int64_t column, const Blocks<R, V>& acc) {
    VI rows[R][V];
    rows_of<R, V>(acc, rows);
    CodesTile<0>::finish<R, V>(a, row, column, rows);
  }
};

template <class Codes>
struct PairTile : SignedTile<Codes> {
  // The sums of a group stay in registers, the float sums in the first cache.
  static constexpr int vectors(int rows) { return fitting_vectors(2 * pairs_of(rows) + 2, pairs_of(rows) + 3); }

  template <int R, int V>
  NYBBLE_INLINE void run(const NybbleLinearArgs* a, const Place& at, const uint8_t* (&w)[V], VF (&sum)[R][V],
                         Prefetcher& prefetcher) {
    const int8_t* x = panel_at<int8_t>(a, at.row) + at.begin * R;
    GroupNumbers<V> numbers(a, at.column);
    for (int64_t g = at.begin / a->group; g * a->group < at.end; g++) {
      Blocks<R, V> acc;
      each_register(acc, [](auto& one) __attribute__((always_inline)) { zero_register(one); });
      with_nibbles(a, w, prefetcher, [&](auto& from, auto& fetch) __attribute__((always_inline)) {
        const auto step = [&](auto lines) __attribute__((always_inline)) {
          multiply_pairs<Codes, R, V, lines.count == 2>(acc, from, x);
          x += 4 * Codes::kWords * R * lines.count;
        };
        each_lines<4, 2>(a->group / (4 * Codes::kWords), from, fetch, false, step);
      });
      VI start[R][V], rows[R][V];
      PairTile::template start_codes<R, V>(a, at, g, start);
      rows_of<R, V>(acc, rows);
      add_all<R, V>(rows, start);
      PairTile::template add_group<R, V>(a, at, g, rows, sum, numbers);
    }
  }
};

}  // namespace
