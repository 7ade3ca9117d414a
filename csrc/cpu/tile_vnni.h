// The register tiles for 8-bit activations built on vpdpbusd (u8 x s8, four products per lane, wrapping), for vectors
// of any width. Include after a target's tile header, which defines dot_u8s8 and kRegisters.
#pragma once

#include "tile_last.h"
#include "tile_run.h"

namespace {

// Activations are code + 128.
struct Tile8 : CodesTile<128> {
  using X = uint8_t;
  static constexpr int kLastRows = kRowsForLast;
  static constexpr bool kInOrder = false;  // several streams without software prefetching are as fast

  static constexpr int vectors(int rows) { return fitting_vectors(rows + 1, 1); }

  template <int R, int V>
  NYBBLE_INLINE void dot(VI (&acc)[R][V], const VI (&codes)[V], const uint8_t* x) {
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
      const VI xs = word_at(x + 4 * r);
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) dot_u8s8(acc[r][v], xs, codes[v]);
    }
  }

  template <int R, int V>
  NYBBLE_INLINE void multiply(VI (&acc)[R][V], const uint8_t* (&w)[V], const uint8_t* x) {
    VI codes[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) {
      codes[v] = vi_load(w[v]);
      w[v] += kLine;
    }
    dot<R, V>(acc, codes, x);
  }

  template <int R>
  static void run_last(const NybbleLinearArgs* a, int64_t row, int64_t column) {
    const uint8_t *w = codes_at(a, column), *x = panel_at<uint8_t>(a, row);
    VI part[4] = {vi_set1(-128 * a->column_sum[column]), vi_set1(0), vi_set1(0), vi_set1(0)};
    each_of_four(a->k_padded / 4, [&](int i) __attribute__((always_inline)) {
      dot_u8s8(part[i], vi_load_first<R>(x), word_at(w));
      w += kLine;
      x += 4 * R;
    });
    int32_t of_row[W];
    vi_store(of_row, vi_add(vi_add(part[0], part[1]), vi_add(part[2], part[3])));
    VI acc[R][1];
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) acc[r][0] = vi_set1(of_row[r]);
    finish_w8a8<R, 1>(a, row, column, acc, 0);
  }

  template <int R, int V>
  NYBBLE_INLINE void run(const NybbleLinearArgs* a, const Place& at, const uint8_t* (&w)[V], VI (&acc)[R][V],
                         Prefetcher& prefetcher) {
    const uint8_t* x = panel_at<uint8_t>(a, at.row) + at.begin * R;
    each_line<8>((at.end - at.begin) / 4, w, prefetcher, R <= 2 && a->one_stream, [&]() __attribute__((always_inline)) {
      multiply<R, V>(acc, w, x);
      x += 4 * R;
    });
  }
};

// The words of four k of a packed line, by their numbers: nibbles, and the bytes of n16k4g. high_word(line): the second
// 2^kHigh times as large, where that is faster.
struct Nibbles {
  static constexpr int kWords = 2, kHigh = 4;
  static constexpr int32_t kCodes = kPlanes ? 0x07070707 : 0x0f0f0f0f;
  template <int i>
  NYBBLE_INLINE VI word(VI line) {
    return vi_and(i ? vi_shift_right<4>(line) : line, vi_set1(kCodes));
  }
  NYBBLE_INLINE VI high_word(VI line) { return vi_and(line, vi_set1(static_cast<int32_t>(kCodes * 16u))); }
};
struct Bytes {
  static constexpr int kWords = 1, kHigh = 0;
  template <int i>
  NYBBLE_INLINE VI word(VI line) {
    return line;
  }
};

// Divides sums by 2^kBits, of which they are multiples.
template <int kBits, int R, int V>
NYBBLE_INLINE void shift_all(VI (&sums)[R][V]) {
#pragma GCC unroll 4
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) sums[r][v] = vi_shift_right_s32<kBits>(sums[r][v]);
}

// The weight is the unsigned operand, so the activations need no offset.
template <class Codes>
struct UnsignedTile : GroupsTile {
  static constexpr int kWords = Codes::kWords, kLastRows = kPlanes ? TileDefaults::kLastRows : kRowsForLast;

  static constexpr int vectors(int rows) { return fitting_vectors(rows + 2, 4); }

  template <int R, int V>
  NYBBLE_INLINE void multiply_half(VI (&acc)[R][V], const VI (&codes)[V], const int8_t* x) {
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
      const VI xs = word_at(x + 4 * r);
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) dot_u8s8(acc[r][v], codes[v], xs);
    }
  }

  // Whether the sums that take turns are of the first and of the second words, so that these need no shift.
  template <int kTurns>
  static constexpr bool kApart = kTurns > 1 && Codes::kHigh > 0;
  static constexpr int64_t kMostApart = 1 << 16;  // k whose sums of codes 16 times as large fit in int32

  // Adds the products of the words from i on of a line to the sums that take turns, from `turn` on.
  template <int R, int V, int kTurns, int i = 0>
  NYBBLE_INLINE void multiply(VI (&acc)[kTurns][R][V], int turn, const uint8_t* (&w)[V], const int8_t* x) {
    VI codes[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) {
      if constexpr (i == 1 && kApart<kTurns>)
        codes[v] = Codes::high_word(vi_load(w[v]));
      else
        codes[v] = Codes::template word<i>(vi_load(w[v]));
      if (i + 1 == kWords) w[v] += kLine;
    }
    multiply_half<R, V>(acc[turn % kTurns], codes, x);
    if constexpr (i + 1 < kWords) multiply<R, V, kTurns, i + 1>(acc, turn + 1, w, x + 4 * R);
  }

  template <int R>
  static void run_last(const NybbleLinearArgs* a, int64_t row, int64_t column) {
    const uint8_t* w = codes_at(a, column);
    const int8_t* x = panel_at<int8_t>(a, row);
    VF sum = vf_set1(0.0f);
    for (int64_t g = 0; g < a->groups; g++) {
      VI part[4] = {last_start<R>(a, row, column, g), vi_set1(0), vi_set1(0), vi_set1(0)};
      each_of_four(a->group / 4, [&](int i) __attribute__((always_inline)) {
        const VI four = word_at(w);
        const bool last = i % kWords == kWords - 1;
        dot_u8s8(part[i], last ? Codes::template word<kWords - 1>(four) : Codes::template word<0>(four),
                 vi_load_first<R>(x));
        w += last ? kLine : 0;
        x += 4 * R;
      });
      const VI all = vi_add(vi_add(part[0], part[1]), vi_add(part[2], part[3]));
      sum = with_last_minimum<R>(a, row, column, g, vf_fma(vf_of_int(all), last_scale(a, column, g), sum));
    }
    float of_row[W];
    vf_store(of_row, sum);
    VF sums[R][1];
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) sums[r][0] = vf_set1(of_row[r]);
    finish_w4a8<R, 1>(a, row, column, sums, 0);
  }

  // Adds the sums that took turns to the first.
  template <int R, int V, int kTurns>
  NYBBLE_INLINE void add_turns(VI (&acc)[kTurns][R][V]) {
#pragma GCC unroll 4
    for (int i = 2; i < kTurns; i++) add_all(acc[i % 2], acc[i]);
    if constexpr (kApart<kTurns>) shift_all<Codes::kHigh>(acc[1]);
    if constexpr (kTurns > 1) add_all(acc[0], acc[1]);
  }

  template <int R, int V>
  NYBBLE_INLINE void run(const NybbleLinearArgs* a, const Place& at, const uint8_t* (&w)[V], VF (&sum)[R][V],
                         Prefetcher& prefetcher) {
    // Sums that take turns, so that few outputs still hide the latency of the multiply.
    constexpr int kTurns = R * V == 1 ? 4 : R * V == 2 ? 2 : 1;
    const int8_t* x = panel_at<int8_t>(a, at.row) + at.begin * R;
    GroupNumbers<V> numbers(a, at.column);
    for (int64_t g = at.begin / a->group; g * a->group < at.end; g++) {
      VI acc[kTurns][R][V];
      start_group<R, V>(a, at, g, acc[0]);
      with_nibbles<false>(a, w, prefetcher, [&](auto& from, auto& fetch) __attribute__((always_inline)) {
        const auto step = [&](auto lines) __attribute__((always_inline)) {
#pragma GCC unroll 4
          for (int i = 0; i < lines.count; i++, x += 4 * kWords * R) multiply<R, V, kTurns>(acc, kWords * i, from, x);
        };
        for (int64_t left = a->group; left > 0; left -= kMostApart) {
#pragma GCC unroll 4
          for (int i = 1; i < kTurns; i++) zero_all(acc[i]);
          const int64_t ks = left < kMostApart ? left : kMostApart;
          each_lines<4, (kTurns > kWords ? kTurns / kWords : 1)>(ks / (4 * kWords), from, fetch, false, step);
          add_turns(acc);
        }
      });
      add_group<R, V>(a, at, g, acc[0], sum, numbers);
    }
  }
};

using Tile4 = UnsignedTile<Nibbles>;

}  // namespace
