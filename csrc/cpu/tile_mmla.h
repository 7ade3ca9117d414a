// The register tiles for 8-bit activations built on smmla, which multiplies two rows by two columns, of eight k each:
// the panel has pairs of words, which are the operand of two rows, and n16k16 and n16k16n those of two columns. In the
// other layouts two lines of packed weights are 64 bytes apart; zip brings the words of a column together, before
// nibbles are taken out of them: the words of two lines of nibbles are those of the panel's pairs. With zip, smmla
// takes fewer instructions than sdot from four rows on; without, with any number. Include after tile_i8mm.h.
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

// Adds the products of words of two columns, [v][pairs of columns], with the pairs of words at x, or words alone.
template <int R, int V, bool kAlone>
NYBBLE_INLINE void multiply_pairs(VI (&acc)[pairs_of(R)][2 * V], const VI (&columns)[V][2], const int8_t* x) {
  constexpr int kPairs = pairs_of(R);
  VI rows[kPairs];
  load_rows<R, kAlone>(rows, x);
#pragma GCC unroll 16
  for (int c = 0; c < 2 * V; c++)
#pragma GCC unroll 16
    for (int p = 0; p < kPairs; p++) mmla_s8(acc[p][c], rows[p], columns[c / 2][c % 2]);
}

// Codes of n16k4, which are signed bytes.
struct Signed {
  static constexpr int kWords = 1;
  template <int i>
  NYBBLE_INLINE VI word(VI line) {
    return line;
  }
};

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
    multiply_pairs<R, V, false>(acc, columns, x + i * 8 * R);
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

// From where W columns of n16k4 and n16k8 begin to where they do in lines side by side: a column has 8 bytes of two.
template <int V>
NYBBLE_INLINE void enter_pairs(int64_t column, const uint8_t* (&w)[V]) {
#pragma GCC unroll 4
  for (int v = 0; v < V; v++) w[v] += (column + v * W) % NYBBLE_TILE_N * 4;
}

// Columns of n16k16, at w[v]: adds the products of 16 k.
template <int R, int V>
NYBBLE_INLINE void multiply_paired(VI (&acc)[pairs_of(R)][2 * V], const uint8_t* (&w)[V], const int8_t* x) {
#pragma GCC unroll 2
  for (int i = 0; i < 2; i++) {
    VI columns[V][2];
#pragma GCC unroll 8
    for (int c = 0; c < 2 * V; c++) columns[c / 2][c % 2] = vi_load(w[c / 2] + i * 2 * kLine + c % 2 * sizeof(VI));
    multiply_pairs<R, V, false>(acc, columns, x + i * 8 * R);
  }
#pragma GCC unroll 4
  for (int v = 0; v < V; v++) w[v] += 4 * kLine;
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
  multiply_pairs<R, V, kAlone>(acc, columns, x);
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
    multiply_all<Signed, R, V>(acc, w, x, (at.end - at.begin) / 4, prefetcher, R <= 2 && a->one_stream);
  }

  template <int R, int V>
  NYBBLE_INLINE void finish(const NybbleLinearArgs* a, int64_t row, int64_t column, const Blocks<R, V>& acc) {
    VI rows[R][V];
    rows_of<R, V>(acc, rows);
    CodesTile<0>::finish<R, V>(a, row, column, rows);
  }
};

// The same of n16k16.
struct PairedTile8 : PairTile8 {
  template <int R, int V>
  NYBBLE_INLINE void run(const NybbleLinearArgs* a, const Place& at, const uint8_t* (&w)[V], Blocks<R, V>& acc,
                         Prefetcher& prefetcher) {
    const int8_t* x = panel_at<int8_t>(a, at.row) + at.begin * R;
    enter_pairs<V>(at.column, w);
    const auto step = [&]() __attribute__((always_inline)) {
      multiply_paired<R, V>(acc, w, x);
      x += 16 * R;
    };
    each_two<4>((at.end - at.begin) / 16, w, prefetcher, R <= 2 && a->one_stream, step);
  }
};

// Lines of which zip brings two together: sums and products as the tiles of groups want them.
template <class Codes>
struct Zipped {
  template <int R, int V>
  using Acc = Blocks<R, V>;

  static constexpr int vectors(int rows) { return fitting_vectors(2 * pairs_of(rows) + 2, pairs_of(rows) + 3); }

  // Adds the products of `size` k; x: where their activations begin.
  template <int R, int V, class Fetch>
  NYBBLE_INLINE void multiply(Blocks<R, V>& acc, const uint8_t* (&w)[V], const int8_t*& x, int64_t size, Fetch& fetch) {
    multiply_all<Codes, R, V>(acc, w, x, size / (4 * Codes::kWords), fetch, false);
  }

  template <int R, int V>
  NYBBLE_INLINE void totals(const Blocks<R, V>& acc, VI (&rows)[R][V]) {
    rows_of<R, V>(acc, rows);
  }

  template <int V>
  NYBBLE_INLINE void enter(int64_t, const uint8_t* (&)[V]) {}
};

// Lines of n16k16n, which lie side by side. Up to three rows are multiplied by sdot, for which a pair of words of the
// panel stands twice in a register: it adds each half of the products of a column alone.
template <class Codes>
struct SideBySide {
  static constexpr int kStep = 2 * 4 * Codes::kWords;  // k of two lines
  static constexpr bool is_few(int rows) { return rows < 4; }
  static constexpr int sums(int rows) { return is_few(rows) ? rows : pairs_of(rows); }

  template <int R, int V>
  using Acc = VI[sums(R)][2 * V];

  static constexpr int vectors(int rows) { return fitting_vectors(2 * sums(rows) + 2, sums(rows) + 3); }

  // Eight bytes, twice. A load that does so would take the place of a multiply in Neoverse's cores.
  NYBBLE_INLINE VI twice(const int8_t* x) {
    uint64_t words;
    memcpy(&words, x, sizeof(words));
    VI both;
    __asm__("dup %0.2d, %1" : "=w"(both) : "r"(words));
    return both;
  }

  // The products of words i and the next ones of both lines.
  template <int R, int V, int i = 0>
  NYBBLE_INLINE void multiply_words(Acc<R, V>& acc, const VI (&lines)[V][2], const int8_t* x) {
    if constexpr (i < Codes::kWords) {
      VI columns[V][2];
#pragma GCC unroll 8
      for (int c = 0; c < 2 * V; c++) columns[c / 2][c % 2] = Codes::template word<i>(lines[c / 2][c % 2]);
      if constexpr (is_few(R)) {
#pragma GCC unroll 3
        for (int r = 0; r < R; r++) {
          const VI row = twice(x + 8 * r);
#pragma GCC unroll 8
          for (int c = 0; c < 2 * V; c++) dot_s8s8(acc[r][c], columns[c / 2][c % 2], row);
        }
      } else {
        multiply_pairs<R, V, false>(acc, columns, x);
      }
      multiply_words<R, V, i + 1>(acc, lines, x + 8 * R);
    }
  }

  template <int R, int V, class Fetch>
  NYBBLE_INLINE void multiply(Acc<R, V>& acc, const uint8_t* (&w)[V], const int8_t*& x, int64_t size, Fetch& fetch) {
    const auto step = [&]() __attribute__((always_inline)) {
      VI lines[V][2];
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) {
        lines[v][0] = vi_load(w[v]);
        lines[v][1] = vi_load(w[v] + sizeof(VI));
        w[v] += 2 * kLine;
      }
      multiply_words<R, V>(acc, lines, x);
      x += kStep * R;
    };
    each_two<2>(size / kStep, w, fetch, false, step);
  }

  template <int R, int V>
  NYBBLE_INLINE void totals(const Acc<R, V>& acc, VI (&rows)[R][V]) {
    if constexpr (is_few(R)) {
#pragma GCC unroll 3
      for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) rows[r][v] = vpaddq_s32(acc[r][2 * v], acc[r][2 * v + 1]);
    } else {
      rows_of<R, V>(acc, rows);
    }
  }

  template <int V>
  NYBBLE_INLINE void enter(int64_t column, const uint8_t* (&w)[V]) {
    enter_pairs<V>(column, w);
  }
};

template <class Codes, class Lines = Zipped<Codes>>
struct PairTile : SignedTile<Codes> {
  // The sums of a group stay in registers, the float sums in the first cache.
  static constexpr int vectors(int rows) { return Lines::vectors(rows); }

  template <int R, int V>
  NYBBLE_INLINE void run(const NybbleLinearArgs* a, const Place& at, const uint8_t* (&w)[V], VF (&sum)[R][V],
                         Prefetcher& prefetcher) {
    const int8_t* x = panel_at<int8_t>(a, at.row) + at.begin * R;
    Lines::template enter<V>(at.column, w);
    GroupNumbers<V> numbers(a, at.column);
    for (int64_t g = at.begin / a->group; g * a->group < at.end; g++) {
      typename Lines::template Acc<R, V> acc;
      each_register(acc, [](auto& one) __attribute__((always_inline)) { zero_register(one); });
      with_nibbles(a, w, prefetcher, [&](auto& from, auto& fetch) __attribute__((always_inline)) {
        Lines::template multiply<R, V>(acc, from, x, a->group, fetch);
      });
      VI start[R][V], rows[R][V];
      PairTile::template start_codes<R, V>(a, at, g, start);
      Lines::template totals<R, V>(acc, rows);
      add_all<R, V>(rows, start);
      PairTile::template add_group<R, V>(a, at, g, rows, sum, numbers);
    }
  }
};

}  // namespace
