// The register tile for float activations, for every target: codes are widened to float32 in registers. Weight8 and
// Weight4 decode a packed 64-byte line:
//   kBlock                    number of k per line
//   Weight{args, column}      per-column state
//   enter(g)                  starts group g
//   decode<k>(v)              the W weights at k of the line, as floats
//   finish(sum)               applies a scale that decode did not
#pragma once

#include "tile_run.h"

namespace {

struct Weight8 {
  static constexpr int kBlock = 4;
  const NybbleLinearArgs* a;
  int64_t column;

  void enter(int64_t) {}
  template <int k>
  VF decode(VI v) const {
    return vf_of_int(vi_byte_s<k>(v));
  }
  VF finish(VF sum) const { return vf_mul(sum, vf_load(static_cast<const float*>(a->scale) + column)); }
};

// code * scale - zero_point * scale has at most 13 significant bits, so the fused multiply-add is exact.
struct Weight4 {
  static constexpr int kBlock = 8;
  const NybbleLinearArgs* a;
  int64_t column;
  VF scale = vf_set1(0.0f), offset = vf_set1(0.0f);

  void enter(int64_t g) {
    scale = group_scale(a, column, g);
    const VI zero = a->zero_point ? vi_load_u8(a->zero_point + group_at(a, column, g)) : vi_set1(8);
    offset = vf_neg(vf_mul(scale, vf_of_int(zero)));
  }
  template <int k>
  VF decode(VI v) const {
    return vf_fma_fast(vf_of_int(vi_field_u<(k % 4) * 8 + (k / 4) * 4, 4>(v)), scale, offset);
  }
  VF finish(VF sum) const { return sum; }
};

template <class Weight>
struct FloatTiles {
  struct Tile : TileDefaults {
    static constexpr int vectors(int) { return 1; }

    // Independent accumulators per row, so that few rows still hide the latency of the multiply.
    static constexpr int splits(int rows) { return rows == 1 ? 4 : rows <= 4 ? 2 : 1; }

    template <int R, int V>
    using Acc = VF[splits(R)][R];

    template <int R, int k>
    static inline void multiply(VF (&acc)[splits(R)][R], const Weight& weight, VI v, const float* x) {
      if constexpr (k < Weight::kBlock) {
        const VF w = weight.template decode<k>(v);
#pragma GCC unroll 16
        for (int r = 0; r < R; r++) {
          VF& sum = acc[k % splits(R)][r];
          sum = vf_fma_fast(vf_set1(x[(k / 4 * R + r) * 4 + k % 4]), w, sum);
        }
        multiply<R, k + 1>(acc, weight, v, x);
      }
    }

    template <int R, int V>
    NYBBLE_INLINE void run(const NybbleLinearArgs* a, const Place& at, const uint8_t* (&w)[V], VF (&acc)[splits(R)][R],
                           Prefetcher& prefetcher) {
      Weight weight{a, at.column};
      const float* x = panel_at<float>(a, at.row) + at.begin * R;
      const int64_t ks = at.end - at.begin, step = a->group < ks ? a->group : ks;  // 8 bits: one group of all K
      for (int64_t k = at.begin; k < at.end; k += step) {
        weight.enter(k / a->group);
        each_line<4>(step / Weight::kBlock, w, prefetcher, false, [&]() __attribute__((always_inline)) {
          multiply<R, 0>(acc, weight, vi_load(w[0]), x);
          w[0] += kLine;
          x += Weight::kBlock * R;
        });
      }
    }

    template <int R, int V>
    NYBBLE_INLINE void finish(const NybbleLinearArgs* a, int64_t row, int64_t column, VF (&acc)[splits(R)][R]) {
      const Weight weight{a, column};
      const VF bias = bias_at(a, column);
      store_rows<R>(a, row, column, [&](int r) __attribute__((always_inline)) {
        VF sum = acc[0][r];
        if constexpr (splits(R) == 2) sum = vf_add(sum, acc[1][r]);
        if constexpr (splits(R) == 4) sum = vf_add(vf_add(sum, acc[1][r]), vf_add(acc[2][r], acc[3][r]));
        return vf_add(weight.finish(sum), bias);
      });
    }
  };
};

template <class Weight, int kRows>
inline NybbleStatus run_float(const NybbleLinearArgs* a) {
  return run_tiles<typename FloatTiles<Weight>::Tile, kRows>(a);
}

}  // namespace
