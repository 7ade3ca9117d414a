// The register tiles for 8-bit activations of Arm's CPUs: s8 x s8, four products per lane, wrapping, with a word of
// the activations chosen by its lane: a load of 16 bytes brings four words, so the rows need few. Include after a
// header that defines kParts, the registers of a sum, and start_s8, dot_s8 and total_s8.
#pragma once

#include "tile_codes.h"

namespace {

// Lines that are multiplied at a time, so that the words of their activations, so many of each, fill whole registers.
constexpr int whole_lines(int words) { return words % 4 == 0 ? 1 : words % 2 == 0 ? 2 : 4; }

// So many words of the panel, four in a register.
template <int kCount>
struct Words {
  VI four[(kCount + 3) / 4];

  NYBBLE_INLINE Words at(const int8_t* x) {
    Words words;
    load<0>(words, x);
    return words;
  }

  template <int i>
  NYBBLE_INLINE void load(Words& words, const int8_t* x) {
    if constexpr (4 * i < kCount) {
      words.four[i] = vi_load_first<(kCount - 4 * i < 4 ? kCount - 4 * i : 4)>(x + 16 * i);
      load<i + 1>(words, x);
    }
  }
};

// Adds the products of W * V columns with the words from kFirst on, one for each row.
template <int kFirst, int R, int V, int kCount, int r = 0>
NYBBLE_INLINE void dot_rows(VI (&acc)[R][V][kParts], const VI (&codes)[V], const Words<kCount>& words) {
  if constexpr (r < R) {
    constexpr int word = kFirst + r;
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) dot_s8<word % 4>(acc[r][v], codes[v], words.four[word / 4]);
    dot_rows<kFirst, R, V, kCount, r + 1>(acc, codes, words);
  }
}

template <int R, int V>
NYBBLE_INLINE void start_all(VI (&acc)[R][V][kParts], const VI (&sums)[R][V]) {
#pragma GCC unroll 16
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) start_s8(acc[r][v], sums[r][v]);
}

template <int R, int V>
NYBBLE_INLINE void total_all(const VI (&acc)[R][V][kParts], VI (&sums)[R][V]) {
#pragma GCC unroll 16
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) sums[r][v] = total_s8(acc[r][v]);
}

struct Tile8 : CodesTile<0> {
  using X = int8_t;

  template <int R, int V>
  using Acc = VI[R][V][kParts];

  static constexpr int vectors(int rows) { return fitting_vectors(rows * kParts + 1, 3); }

  template <int R, int V>
  NYBBLE_INLINE void start(const NybbleLinearArgs* a, int64_t column, VI (&acc)[R][V][kParts]) {
    TileDefaults::start<R, V>(a, column, acc);
  }

  // The products of line i and the next ones of n.
  template <int R, int V, int n, int i = 0>
  NYBBLE_INLINE void multiply_lines(VI (&acc)[R][V][kParts], const uint8_t* (&w)[V], const Words<R * n>& words) {
    if constexpr (i < n) {
      VI codes[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) {
        codes[v] = vi_load(w[v]);
        w[v] += kLine;
      }
      dot_rows<i * R, R, V, R * n>(acc, codes, words);
      multiply_lines<R, V, n, i + 1>(acc, w, words);
    }
  }

  template <int R, int V>
  NYBBLE_INLINE void multiply(VI (&acc)[R][V][kParts], const uint8_t* (&w)[V], const int8_t* x) {
    multiply_lines<R, V, 1>(acc, w, Words<R>::at(x));
  }

  template <int R, int V>
  NYBBLE_INLINE void run(const NybbleLinearArgs* a, const Place& at, const uint8_t* (&w)[V], VI (&acc)[R][V][kParts],
                         Prefetcher& prefetcher) {
    const int8_t* x = panel_at<int8_t>(a, at.row) + at.begin * R;
    const auto step = [&](auto lines) __attribute__((always_inline)) {
      constexpr int n = decltype(lines)::count;
      multiply_lines<R, V, n>(acc, w, Words<R * n>::at(x));
      x += 4 * R * n;
    };
    each_lines<8, whole_lines(R)>((at.end - at.begin) / 4, w, prefetcher, R <= 2 && a->one_stream, step);
  }

  template <int R, int V>
  NYBBLE_INLINE void finish(const NybbleLinearArgs* a, int64_t row, int64_t column, const VI (&acc)[R][V][kParts]) {
    VI sums[R][V];
    total_all<R, V>(acc, sums);
    CodesTile<0>::finish<R, V>(a, row, column, sums);
  }
};

// The words of four k of a packed line, by their numbers, as signed bytes: nibbles; and the bytes of n16k4g less 128.
struct Nibbles {
  static constexpr int kWords = 2;
  static constexpr bool kUnsigned = false;
  template <int i>
  NYBBLE_INLINE VI word(VI line) {
    const uint8x16_t bytes = vreinterpretq_u8_s32(line);
    return vreinterpretq_s32_u8(i ? vshrq_n_u8(bytes, 4) : vandq_u8(bytes, vdupq_n_u8(15)));
  }
  NYBBLE_INLINE void shift(const NybbleLinearArgs*, GroupStart&) {}
};
struct Bytes {
  static constexpr int kWords = 1;
  template <int i>
  NYBBLE_INLINE VI word(VI line) {
    return vreinterpretq_s32_u8(veorq_u8(vreinterpretq_u8_s32(line), vdupq_n_u8(128)));
  }
  // Zero points are less by 128 too; that of a weight without them, and what is taken off beside a minimum, is 128.
  NYBBLE_INLINE void shift(const NybbleLinearArgs* a, GroupStart& start) {
    start.zero = a->zero_point ? vi_sub(start.zero, vi_set1(128)) : vi_set1(0);
    start.symmetric = false;
  }
};

template <class Codes>
struct SignedTile : GroupsTile {
  static constexpr int kWords = Codes::kWords;

  // The sums of a group stay in registers, the float sums in the first cache.
  static constexpr int vectors(int rows) { return fitting_vectors(kParts * rows + 2, 3); }

  // The products of word i of a line and the next ones. first: word of `words` of the line.
  template <int R, int V, int kFirst, int kCount, int i = 0>
  NYBBLE_INLINE void multiply_words(VI (&acc)[R][V][kParts], const VI (&line)[V], const Words<kCount>& words) {
    if constexpr (i < kWords) {
      VI codes[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) codes[v] = Codes::template word<i>(line[v]);
      dot_rows<kFirst + i * R, R, V, kCount>(acc, codes, words);
      multiply_words<R, V, kFirst, kCount, i + 1>(acc, line, words);
    }
  }

  // The products of line i and the next ones of n.
  template <int R, int V, int n, int i = 0>
  NYBBLE_INLINE void multiply_lines(VI (&acc)[R][V][kParts], const uint8_t* (&w)[V],
                                    const Words<R * n * kWords>& words) {
    if constexpr (i < n) {
      VI line[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) {
        line[v] = vi_load(w[v]);
        w[v] += kLine;
      }
      multiply_words<R, V, i * R * kWords, R * n * kWords>(acc, line, words);
      multiply_lines<R, V, n, i + 1>(acc, w, words);
    }
  }

  template <int R, int V>
  NYBBLE_INLINE void start_codes(const NybbleLinearArgs* a, const Place& at, int64_t g, VI (&acc)[R][V]) {
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) {
      GroupStart start(a, at.row, at.column + v * W, g);
      Codes::shift(a, start);
#pragma GCC unroll 16
      for (int r = 0; r < R; r++) acc[r][v] = start.of_row(r);
    }
  }

  template <int R, int V>
  NYBBLE_INLINE void run(const NybbleLinearArgs* a, const Place& at, const uint8_t* (&w)[V], VF (&sum)[R][V],
                         Prefetcher& prefetcher) {
    const int8_t* x = panel_at<int8_t>(a, at.row) + at.begin * R;
    GroupNumbers<V> numbers(a, at.column);
    for (int64_t g = at.begin / a->group; g * a->group < at.end; g++) {
      VI sums[R][V], acc[R][V][kParts];
      start_codes<R, V>(a, at, g, sums);
      start_all<R, V>(acc, sums);
      with_nibbles(a, w, prefetcher, [&](auto& from, auto& fetch) __attribute__((always_inline)) {
        const auto step = [&](auto lines) __attribute__((always_inline)) {
          constexpr int n = decltype(lines)::count;
          multiply_lines<R, V, n>(acc, from, Words<R * n * kWords>::at(x));
          x += 4 * kWords * R * n;
        };
        each_lines<4, whole_lines(R * kWords)>(a->group / (4 * kWords), from, fetch, false, step);
      });
      total_all<R, V>(acc, sums);
      add_group<R, V>(a, at, g, sums, sum, numbers);
    }
  }
};

using Tile4 = SignedTile<Nibbles>;

}  // namespace
