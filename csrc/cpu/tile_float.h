// The register tile for float activations, for every target: codes become float32 weights, in registers or once for
// many rows. Both ways give the same weights and the same order of sums. A Weight is the codes of W columns:
//   kBlock                    number of k per packed line
//   kFixed                    registers that two vectors of columns need beside their sums; with less, one is better
//   k_of(i)                   the i-th k of a line that is multiplied
//   Weight{args, column}
//   enter(g)                  starts group g
//   decode<i>(line)           the W weights at k_of(i) of a line, as floats
//   finish(sum)               applies a scale that decode did not
#pragma once

#include "tile_run.h"

namespace {

struct Weight8 {
  static constexpr int kBlock = 4;
  static constexpr int64_t kLineBytes = kLine, kDecodedLine = 0;
  const NybbleLinearArgs* a;
  int64_t column;

  static constexpr int kFixed = 4;
  static constexpr int k_of(int i) { return i; }
  void enter(int64_t) {}
  template <int i>
  VF decode(const uint8_t* line) const {
    return vf_of_int(vi_byte_s<i>(vi_load(line)));
  }
  VF finish(VF sum) const { return vf_mul(sum, vf_load(static_cast<const float*>(a->scale) + column)); }
};

// A nibble is converted where it lies among 16 bits, times 16^(i % 4), which the scale takes out again: no shift. The
// fused multiply-add is exact for scales of 16 bits, since code * scale - zero_point * scale has at most 16 significant
// bits. The offset may be a minimum.
struct Weight4 {
  static constexpr int kBlock = 8;
  static constexpr int64_t kLineBytes = kLine, kDecodedLine = 0;
  const NybbleLinearArgs* a;
  int64_t column;
  VF scale[4] = {}, offset = vf_set1(0.0f);

  static constexpr int kFixed = 8;
  static constexpr int k_of(int i) { return i / 2 + i % 2 * 4; }
  void enter(int64_t g) {
    scale[0] = group_scale(a, column, g);
    const VI zero = a->zero_point ? vi_load_u8(a->zero_point + group_at(a, column, g)) : vi_set1(kMiddle);
    offset = a->minimum ? group_minimum(a, column, g) : vf_neg(vf_mul(scale[0], vf_of_int(zero)));
#pragma GCC unroll 4
    for (int i = 1; i < 4; i++) scale[i] = vf_mul(scale[i - 1], vf_set1(0x1p-4f));
  }
  template <int i>
  VF decode(const uint8_t* line) const {
    VI codes = vi_load(line);
    if constexpr (i >= 4) codes = vi_shift_right_32<16>(codes);
    return vf_fma_fast(vf_of_int(vi_and(codes, vi_set1(15 << i % 4 * 4))), scale[i % 4], offset);
  }
  VF finish(VF sum) const { return sum; }
};

// A byte of n16k4g. Its difference from the zero point is exact, and multiplied with the scale in one rounding.
struct Bytes {
  static constexpr int kBlock = 4;
  static constexpr int64_t kLineBytes = kLine, kDecodedLine = 0;
  const NybbleLinearArgs* a;
  int64_t column;
  VI zero = vi_set1(0);
  VF scale = vf_set1(0.0f), offset = vf_set1(0.0f);

  static constexpr int kFixed = 8;
  static constexpr int k_of(int i) { return i; }
  void enter(int64_t g) {
    scale = group_scale(a, column, g);
    zero = a->zero_point ? vi_load_u8(a->zero_point + group_at(a, column, g)) : vi_set1(128);
    if (a->minimum) offset = group_minimum(a, column, g);
  }
  template <int i>
  VF decode(const uint8_t* line) const {
    const VI steps = vi_sub(vi_field_u<8 * i, 8>(vi_load(line)), zero);
    return vf_fma_fast(vf_of_int(steps), scale, offset);
  }
  VF finish(VF sum) const { return sum; }
};

// A nibble picks one of 16 values. The product with the scale is rounded, as by a library that dequantizes first.
struct WeightOfBook {
  static constexpr int kBlock = 8;
  static constexpr int64_t kLineBytes = kLine, kDecodedLine = 0;
  const NybbleLinearArgs* a;
  int64_t column;
  Table16 table = {};
  VF scale = vf_set1(0.0f);

  static constexpr int kFixed = 8;
  static constexpr int k_of(int i) { return Weight4::k_of(i); }
  void enter(int64_t g) {
    table = table16(a->book);
    scale = group_scale(a, column, g);
  }
  template <int i>
  VF decode(const uint8_t* line) const {
    return vf_mul(vf_lookup<4 * i>(table, vi_load(line)), scale);
  }
  VF finish(VF sum) const { return sum; }
};

// The weights that Weight decoded before.
template <class Weight>
struct Decoded {
  static constexpr int kBlock = Weight::kBlock;
  static constexpr int64_t kDecodedLine = kBlock * NYBBLE_TILE_N * 4, kLineBytes = kDecodedLine;
  const NybbleLinearArgs* a;
  int64_t column;

  static constexpr int kFixed = 4;
  static constexpr int k_of(int i) { return Weight::k_of(i); }
  void enter(int64_t) {}
  template <int i>
  VF decode(const uint8_t* line) const {
    return vf_load(reinterpret_cast<const float*>(line + i * NYBBLE_TILE_N * 4));
  }
  VF finish(VF sum) const { return Weight{a, column}.finish(sum); }

  template <int i>
  NYBBLE_INLINE void store_line(const Weight& weight, const uint8_t* from, uint8_t* to) {
    if constexpr (i < kBlock) {
      vf_store(reinterpret_cast<float*>(to + i * NYBBLE_TILE_N * 4), weight.template decode<i>(from));
      store_line<i + 1>(weight, from, to);
    }
  }
};

template <class Weight>
struct FloatTile : TileDefaults {
  static constexpr int kBlock = Weight::kBlock;
  static constexpr int64_t kDecodedLine = Weight::kDecodedLine;

  // Independent accumulators per output, so that few rows still hide the latency of the multiply.
  static constexpr int splits(int rows) { return rows == 1 ? 4 : rows <= 3 ? 2 : 1; }
  static constexpr int vectors(int rows) {
    if (rows * 2 + Weight::kFixed > kRegisters) return 1;
    const int sums = rows * splits(rows);
    return kDecodedLine > 0 ? decoded_vectors(sums + 1, 2) : fitting_vectors(sums + 1, 2);
  }

  template <int R, int V>
  using Acc = VF[splits(R)][R][V];

  template <int R, int V, int i>
  NYBBLE_INLINE void multiply(VF (&acc)[splits(R)][R][V], const Weight (&weight)[V], const uint8_t* const (&w)[V],
                              const float* x) {
    if constexpr (i < kBlock) {
      constexpr int k = Weight::k_of(i);
      VF values[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) values[v] = weight[v].template decode<i>(w[v]);
#pragma GCC unroll 16
      for (int r = 0; r < R; r++) {
        const VF xs = vf_set1(x[(k / 4 * R + r) * 4 + k % 4]);
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) {
          VF& sum = acc[i % splits(R)][r][v];
          sum = vf_fma_fast(xs, values[v], sum);
        }
      }
      multiply<R, V, i + 1>(acc, weight, w, x);
    }
  }

  template <int V>
  NYBBLE_INLINE void place(const NybbleLinearArgs* a, int64_t column, Weight (&weight)[V]) {
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) {
      weight[v].a = a;
      weight[v].column = column + v * W;
    }
  }

  template <int R, int V>
  NYBBLE_INLINE void run(const NybbleLinearArgs* a, const Place& at, const uint8_t* (&w)[V], VF (&acc)[splits(R)][R][V],
                         Prefetcher& prefetcher) {
    Weight weight[V];
    place<V>(a, at.column, weight);
    const float* x = panel_at<float>(a, at.row) + at.begin * R;
    const int64_t ks = at.end - at.begin, step = a->group < ks ? a->group : ks;  // 8 bits: one group of all K
    for (int64_t k = at.begin; k < at.end; k += step) {
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) weight[v].enter(k / a->group);
      with_nibbles(a, w, prefetcher, [&](auto& from, auto& fetch) __attribute__((always_inline)) {
        each_line<4>(step / kBlock, from, fetch, false, [&]() __attribute__((always_inline)) {
          multiply<R, V, 0>(acc, weight, from, x);
#pragma GCC unroll 4
          for (int v = 0; v < V; v++) from[v] += Weight::kLineBytes;
          x += kBlock * R;
        });
      });
    }
  }

  template <int R, int V>
  NYBBLE_INLINE void finish(const NybbleLinearArgs* a, int64_t row, int64_t column, VF (&acc)[splits(R)][R][V]) {
    Weight weight[V];
    place<V>(a, column, weight);
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) {
      const VF bias = bias_at(a, column + v * W);
      store_rows<R>(a, row, column + v * W, [&](int r) __attribute__((always_inline)) {
        VF sum = acc[0][r][v];
        if constexpr (splits(R) == 2) sum = vf_add(sum, acc[1][r][v]);
        if constexpr (splits(R) == 4) sum = vf_add(vf_add(sum, acc[1][r][v]), vf_add(acc[2][r][v], acc[3][r][v]));
        return vf_add(weight[v].finish(sum), bias);
      });
    }
  }
};

template <class Weight>
struct DecodedTile : FloatTile<Decoded<Weight>> {
  static void decode(const NybbleLinearArgs* a, int64_t column, int64_t begin, int64_t end, uint8_t* to) {
    const int64_t ks = end - begin, step = a->group < ks ? a->group : ks;
    for (int64_t c = 0; c < NYBBLE_TILE_N; c += W) {
      Weight weight{a, column + c};
      const uint8_t* from = codes_at(a, column + c) + begin / Weight::kBlock * kLine;
      uint8_t* line = to + c * 4;
      for (int64_t k = begin; k < end; k += step) {
        weight.enter(k / a->group);
        for (int64_t i = 0; i < step; i += Weight::kBlock, from += kLine, line += Decoded<Weight>::kDecodedLine)
          Decoded<Weight>::template store_line<0>(weight, from, line);
      }
    }
  }
};

template <class Weight, int kRows>
inline NybbleStatus run_float(const NybbleLinearArgs* a) {
  if constexpr (kPlanes)
    return run_tiles<FloatTile<Weight>, kRows>(a);  // kernels.def: never decoded before
  else
    return a->decoded ? run_tiles<DecodedTile<Weight>, kRows>(a) : run_tiles<FloatTile<Weight>, kRows>(a);
}

}  // namespace
