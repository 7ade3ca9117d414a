// The register tile for weights with scales by group and bfloat16 activations: pairs of codes become pairs of bfloat16.
// A group has accumulators of its own, which its scale then multiplies. Codes is one of tile_bf16_codes.h. Include
// after tile_avx512bf16.h.
#pragma once

#include "tile_bf16_codes.h"
#include "tile_last_bf16.h"
#include "tile_run.h"

namespace {

template <class Codes>
struct GroupTile : TileDefaults {
  static constexpr int kWords = Codes::kWords;
  template <int R, int V>
  using Acc = VF[R][V];
  static constexpr int kLastRows = kRowsForLast;

  static constexpr int vectors(int rows) { return fitting_vectors(rows + 2, 4); }

  // Accumulators per row, so that few rows still hide the latency of the multiply.
  static constexpr int parts(int rows) { return rows == 1 ? 2 * kWords : rows == 2 ? 2 : 1; }

  // The pairs of a line from the j-th on: of each word of four k those of k = 0 and 2, then those of 1 and 3.
  template <int R, int V, int j = 0>
  NYBBLE_INLINE void multiply_pairs(VF (&acc)[parts(R)][R][V], const VI (&codes)[V], const VI (&origin)[V], VI entries,
                                    const uint8_t* x) {
    const uint8_t* from = x + j % kWords * 8 * R + j / kWords * 4;
    VI pairs[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) pairs[v] = Codes::template pair<j>(codes[v], origin[v], entries);
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
      int32_t two;
      memcpy(&two, from + 8 * r, 4);
      const VI xs = vi_set1(two);
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) dot_bf16(acc[j % parts(R)][r][v], pairs[v], xs);
    }
    if constexpr (j + 1 < 2 * kWords) multiply_pairs<R, V, j + 1>(acc, codes, origin, entries, x);
  }

  template <int R, int V>
  NYBBLE_INLINE void multiply(VF (&acc)[parts(R)][R][V], const uint8_t* (&w)[V], const VI (&origin)[V], VI entries,
                              const uint8_t* x) {
    VI codes[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) {
      codes[v] = vi_load(w[v]);
      w[v] += kLine;
    }
    multiply_pairs<R, V>(acc, codes, origin, entries, x);
  }

  template <int R>
  static void run_last(const NybbleLinearArgs* a, int64_t row, int64_t column) {
    const VI entries = Codes::table(a);
    const uint8_t *w = codes_at(a, column), *x = panel_at<uint8_t>(a, row * 2);
    LastSums<R> total;
    for (int64_t g = 0; g < a->groups; g++) {
      const VI origin = Codes::last_origin(a, column, g);
      LastSums<R> sums;
      if (Codes::kOrigin && a->minimum) {
        LastSums<R> activations;
        activations.add_activations(x, a->group);
        total.add(activations, one_scale(a->minimum, a->scale_dtype, group_at(a, column, g)));
      }
      each_of_four(a->group / 4, [&](int i) __attribute__((always_inline)) {
        sums.add(i % 2, Codes::last(word_at(w), i, origin, entries), x);
        w += i % kWords == kWords - 1 ? kLine : 0;
        x += 8 * R;
      });
      total.add(sums, last_scale(a, column, g));
    }
    VF sum[R][1];
    total.rows(sum);
    finish<R, 1>(a, row, column, sum);
  }

  template <int R, int V>
  NYBBLE_INLINE void finish(const NybbleLinearArgs* a, int64_t row, int64_t column, const VF (&sum)[R][V]) {
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) finish_w4a16<R, V>(a, row, column + v * W, sum, v);
  }

  // What the minimum of a group, whose activations are at x, adds to the sums.
  template <int R, int V>
  NYBBLE_INLINE void add_minimums(const NybbleLinearArgs* a, int64_t column, int64_t g, const uint8_t* x,
                                  VF (&sum)[R][V]) {
    LastSums<R> activations;
    activations.add_activations(x, a->group);
    VF of_row[R][1];
    activations.rows(of_row);
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) {
      const VF minimum = group_minimum(a, column + v * W, g);
#pragma GCC unroll 16
      for (int r = 0; r < R; r++) sum[r][v] = vf_fma(of_row[r][0], minimum, sum[r][v]);
    }
  }

  template <int R, int V>
  NYBBLE_INLINE void run(const NybbleLinearArgs* a, const Place& at, const uint8_t* (&w)[V], VF (&sum)[R][V],
                         Prefetcher& prefetcher) {
    const VI entries = Codes::table(a);
    const uint8_t* x = panel_at<uint8_t>(a, at.row * 2) + at.begin * R * 2;
    for (int64_t g = at.begin / a->group; g * a->group < at.end; g++) {
      if (Codes::kOrigin && a->minimum) add_minimums<R, V>(a, at.column, g, x, sum);
      constexpr int kSums = R * parts(R);
      VF acc[parts(R)][R][V];
      VI origin[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) {
        origin[v] = Codes::origin(a, at.column + v * W, g);
#pragma GCC unroll 16
        for (int i = 0; i < kSums; i++) acc[i / R][i % R][v] = vf_set1(0.0f);
      }
      each_line<4>(a->group / (4 * kWords), w, prefetcher, false, [&]() __attribute__((always_inline)) {
        multiply<R, V>(acc, w, origin, entries, x);
        x += 8 * kWords * R;
      });
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) {
        const VF scale = group_scale(a, at.column + v * W, g);
#pragma GCC unroll 16
        for (int r = 0; r < R; r++) {
          VF all = acc[0][r][v];
          if constexpr (parts(R) == 2) all = vf_add(all, acc[1][r][v]);
          if constexpr (parts(R) == 4) all = vf_add(vf_add(all, acc[1][r][v]), vf_add(acc[2][r][v], acc[3][r][v]));
          sum[r][v] = vf_fma(all, scale, sum[r][v]);
        }
      }
    }
  }
};

}  // namespace
