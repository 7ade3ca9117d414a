// The register tiles for 8-bit activations built on smmla, which multiplies two rows by two columns, of eight k each:
// the panel has pairs of words, which are the operand of two rows, and layouts whose lines lie side by side (n16k16,
// n16k16g, n16k16n) have those of two columns. In the other layouts two lines of packed weights are 64 bytes apart; zip
// brings the words of a column together, before nibbles are taken out of them: the words of two lines of nibbles are
// those of the panel's pairs. With zip, smmla takes fewer instructions than sdot from four rows on; without, with any
// number. Include after tile_i8mm.h.
#pragma once

#include "tile_dot.h"

namespace {

constexpr int pairs_of(int rows) { return (rows + 1) / 2; }

inline VI zip_low(VI a, VI b) { return vzip1q_s32(a, b); }
inline VI zip_high(VI a, VI b) { return vzip2q_s32(a, b); }

// The sums of two rows and W columns, as 2 x 2 blocks: [pairs of rows][pairs of columns].
template <int R, int V>
using Blocks = VI[pairs_of(R)][2 * V];

// Rows 2 p and 2 p + 1 of the panel, each a pair of words; kAlone: a word, and 0. The row after an odd last one is 0.
template <int R, bool kAlone, int p>
NYBBLE_INLINE VI row_pair(const int8_t* x) {
  constexpr int rows = R - 2 * p < 2 ? R - 2 * p : 2;
  if constexpr (kAlone)
    return zip_low(vi_load_first<rows>(x + 8 * p), vi_set1(0));
  else
    return vi_load_first<2 * rows>(x + 16 * p);
}

template <int R, bool kAlone, int p = 0>
NYBBLE_INLINE void load_rows(VI (&rows)[pairs_of(R)], const int8_t* x) {
  if constexpr (p < pairs_of(R)) {
    rows[p] = row_pair<R, kAlone, p>(x);
    load_rows<R, kAlone, p + 1>(rows, x);
  }
}

// Codes that are signed bytes, of n16k4 and n16k16.
struct Signed {
  static constexpr int kWords = 1;
  static constexpr bool kUnsigned = false;
  template <int i>
  NYBBLE_INLINE VI word(VI line) {
    return line;
  }
};

// Those of n16k16g, from 0 to 255, as their zero points are.
struct Unsigned : Signed {
  static constexpr bool kUnsigned = true;
  NYBBLE_INLINE void shift(const NybbleLinearArgs*, GroupStart&) {}
};

// Adds the products of words of two columns, [v][pairs of columns], with the pairs of words at x, or words alone.
template <class Codes, int R, int V, bool kAlone>
NYBBLE_INLINE void multiply_pairs(VI (&acc)[pairs_of(R)][2 * V], const VI (&columns)[V][2], const int8_t* x) {
  constexpr int kPairs = pairs_of(R);
  VI rows[kPairs];
  load_rows<R, kAlone>(rows, x);
#pragma GCC unroll 16
  for (int c = 0; c < 2 * V; c++)
#pragma GCC unroll 16
    for (int p = 0; p < kPairs; p++)
      if constexpr (Codes::kUnsigned)
        mmla_u8s8(acc[p][c], columns[c / 2][c % 2], rows[p]);
      else
        mmla_s8(acc[p][c], rows[p], columns[c / 2][c % 2]);
}

// Lines of 16 k.
template <class Codes>
constexpr int kUnit = 4 / Codes::kWords;

// Adds the products of word i and the next ones of the lines that were zipped to `codes`.
template <class Codes, int R, int V, int i = 0>
NYBBLE_INLINE void multiply_words(VI (&acc)[pairs_of(R)][2 * V], const VI (&codes)[V][2], const int8_t* x) {
  if constexpr (i < Codes::kWords) {
    VI columns[V][2];
#pragma GCC unroll 8
    for (int c = 0; c < 2 * V; c++) columns[c / 2][c % 2] = Codes::template word<i>(codes[c / 2][c % 2]);
    multiply_pairs<Codes, R, V, false>(acc, columns, x + i * 8 * R);
    multiply_words<Codes, R, V, i + 1>(acc, codes, x);
  }
}

// Calls step(), which uses kLines lines, `count` times; prefetches after two.
template <int64_t kLines, int V, class Fetch, class Step>
NYBBLE_INLINE void each_two(int64_t count, const uint8_t* (&w)[V], Fetch& prefetcher, bool light, const Step& step) {
  for (; count >= 2; count -= 2) {
    int64_t steps = 2;
    __asm__("" : "+r"(steps));  // GCC 12 would write the steps one after another
    for (; steps > 0; steps--) step();
    prefetcher.used(w, 2 * kLines, light);
  }
  if (count > 0) step();
}

// Adds the products of 16 k.
template <class Codes, int R, int V>
NYBBLE_INLINE void multiply_unit(VI (&acc)[pairs_of(R)][2 * V], const uint8_t* (&w)[V], const int8_t* x) {
  constexpr int half = kUnit<Codes> / 2;
#pragma GCC unroll 2
  for (int i = 0; i < half; i++) {
    VI codes[V][2];
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) {
      const VI first = vi_load(w[v] + i * kLine), second = vi_load(w[v] + (i + half) * kLine);
      codes[v][0] = zip_low(first, second);
      codes[v][1] = zip_high(first, second);
    }
    multiply_words<Codes, R, V>(acc, codes, x + i * 8 * R);
  }
#pragma GCC unroll 4
  for (int v = 0; v < V; v++) w[v] += kUnit<Codes> * kLine;
}

// Adds the products of two words of four k; of one, alone, if it is the last of the panel.
template <class Codes, int R, int V, bool kAlone>
NYBBLE_INLINE void multiply_two(VI (&acc)[pairs_of(R)][2 * V], const uint8_t* (&w)[V], const int8_t* x) {
  constexpr int lines = kAlone || Codes::kWords == 2 ? 1 : 2;
  VI columns[V][2];
#pragma GCC unroll 4
  for (int v = 0; v < V; v++) {
    const VI first = Codes::template word<0>(vi_load(w[v])), last = vi_load(w[v] + (lines - 1) * kLine);
    const VI second = kAlone ? vi_set1(0) : Codes::template word<Codes::kWords - 1>(last);
    columns[v][0] = zip_low(first, second);
    columns[v][1] = zip_high(first, second);
    w[v] += lines * kLine;
  }
  multiply_pairs<Codes, R, V, kAlone>(acc, columns, x);
}

// Adds the products of so many lines; x: where their activations begin. The last lines of all may be no 16 k.
template <class Codes, int R, int V, class Fetch>
NYBBLE_INLINE void multiply_all(VI (&acc)[pairs_of(R)][2 * V], const uint8_t* (&w)[V], const int8_t*& x, int64_t lines,
                                Fetch& prefetcher, bool light) {
  const auto step = [&]() __attribute__((always_inline)) {
    multiply_unit<Codes, R, V>(acc, w, x);
    x += 16 * R;
  };
  each_two<kUnit<Codes>>(lines / kUnit<Codes>, w, prefetcher, light, step);
  lines %= kUnit<Codes>;
  if (lines * Codes::kWords >= 2) {
    multiply_two<Codes, R, V, false>(acc, w, x);
    x += 8 * R;
  }
  if constexpr (Codes::kWords == 1)
    if (lines % 2) multiply_two<Codes, R, V, true>(acc, w, x);
}

// Row by row. A block has both columns of the first row and then of the second; of unsigned codes, whose columns are
// the first operand, both rows of the first column and then of the second.
template <class Codes, int R, int V>
NYBBLE_INLINE void rows_of(const VI (&acc)[pairs_of(R)][2 * V], VI (&rows)[R][V]) {
#pragma GCC unroll 16
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) {
      const VI left = acc[r / 2][2 * v], right = acc[r / 2][2 * v + 1];
      if constexpr (Codes::kUnsigned) {
        rows[r][v] = r % 2 ? vuzp2q_s32(left, right) : vuzp1q_s32(left, right);
      } else {
        const int64x2_t first = vreinterpretq_s64_s32(left), second = vreinterpretq_s64_s32(right);
        rows[r][v] = vreinterpretq_s32_s64(r % 2 ? vzip2q_s64(first, second) : vzip1q_s64(first, second));
      }
    }
}

// Lines of which zip brings two together.
template <class Codes>
struct Zipped {
  template <int V>
  NYBBLE_INLINE void enter(int64_t, const uint8_t* (&)[V]) {}

  // Adds the products of `size` k; x: where their activations begin.
  template <int R, int V, class Fetch>
  NYBBLE_INLINE void multiply(Blocks<R, V>& acc, const uint8_t* (&w)[V], const int8_t*& x, int64_t size, Fetch& fetch,
                              bool light) {
    multiply_all<Codes, R, V>(acc, w, x, size / (4 * Codes::kWords), fetch, light);
  }
};

// Lines that lie side by side, two by two.
template <class Codes>
struct SideBySide {
  static constexpr int64_t kStep = 2 * 4 * Codes::kWords;  // k of two lines

  // w[v] is where a column begins that has 4 bytes of a line; here it has 8 of two lines.
  template <int V>
  NYBBLE_INLINE void enter(int64_t column, const uint8_t* (&w)[V]) {
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) w[v] += (column + v * W) % NYBBLE_TILE_N * 4;
  }

  template <int R, int V, class Fetch>
  NYBBLE_INLINE void multiply(Blocks<R, V>& acc, const uint8_t* (&w)[V], const int8_t*& x, int64_t size, Fetch& fetch,
                              bool light) {
    const auto step = [&]() __attribute__((always_inline)) {
      VI lines[V][2];
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) {
        lines[v][0] = vi_load(w[v]);
        lines[v][1] = vi_load(w[v] + sizeof(VI));
        w[v] += 2 * kLine;
      }
      multiply_words<Codes, R, V>(acc, lines, x);
      x += kStep * R;
    };
    each_two<2>(size / kStep, w, fetch, light, step);
  }
};

// Weights with a scale a column.
template <class Lines>
struct PairTile8 : TileDefaults {
  template <int R, int V>
  using Acc = Blocks<R, V>;

  static constexpr int vectors(int rows) { return fitting_vectors(2 * pairs_of(rows), pairs_of(rows) + 4); }

  template <int R, int V>
  NYBBLE_INLINE void run(const NybbleLinearArgs* a, const Place& at, const uint8_t* (&w)[V], Blocks<R, V>& acc,
                         Prefetcher& prefetcher) {
    const int8_t* x = panel_at<int8_t>(a, at.row) + at.begin * R;
    Lines::template enter<V>(at.column, w);
    Lines::template multiply<R, V>(acc, w, x, at.end - at.begin, prefetcher, R <= 2 && a->one_stream);
  }

  template <int R, int V>
  NYBBLE_INLINE void finish(const NybbleLinearArgs* a, int64_t row, int64_t column, const Blocks<R, V>& acc) {
    VI rows[R][V];
    rows_of<Signed, R, V>(acc, rows);
    CodesTile<0>::finish<R, V>(a, row, column, rows);
  }
};

// Weights with scales by group.
template <class Codes, class Lines = Zipped<Codes>>
struct PairTile : SignedTile<Codes> {
  // The sums of a group stay in registers, the float sums in the first cache.
  static constexpr int vectors(int rows) { return fitting_vectors(2 * pairs_of(rows) + 2, pairs_of(rows) + 3); }

  template <int R, int V>
  NYBBLE_INLINE void run(const NybbleLinearArgs* a, const Place& at, const uint8_t* (&w)[V], VF (&sum)[R][V],
                         Prefetcher& prefetcher) {
    const int8_t* x = panel_at<int8_t>(a, at.row) + at.begin * R;
    Lines::template enter<V>(at.column, w);
    GroupNumbers<V> numbers(a, at.column);
    for (int64_t g = at.begin / a->group; g * a->group < at.end; g++) {
      Blocks<R, V> acc;
      each_register(acc, [](auto& one) __attribute__((always_inline)) { zero_register(one); });
      with_nibbles(a, w, prefetcher, [&](auto& from, auto& fetch) __attribute__((always_inline)) {
        Lines::template multiply<R, V>(acc, from, x, a->group, fetch, false);
      });
      VI start[R][V], rows[R][V];
      PairTile::template start_codes<R, V>(a, at, g, start);
      rows_of<Codes, R, V>(acc, rows);
      add_all<R, V>(rows, start);
      PairTile::template add_group<R, V>(a, at, g, rows, sum, numbers);
    }
  }
};

}  // namespace
