// y = (x codes . w codes) * act_scale * scale + bias; layout gather8, activations as code + 128 in segments of 128 ks.
// Built on vpermi2b, which picks 64 of a segment's activations by the weights' places, and vpdpbusd: 1 cycle a pair on
// Zen 5 for 64 weights that are not 0. Bound by that pair, and by memory at a few rows.
#include "tile_avx512vbmi.h"
// clang-format off
#include "tile_gather.h"
// clang-format on

namespace {

struct Tile {
  static constexpr int kTiles = 2;  // that share a segment while it is in the first-level cache

  template <int R, int T>
  static void run(const NybbleLinearArgs* a, int64_t row, int64_t tile) {
    const int64_t segments = a->k_padded / NYBBLE_SEGMENT_K;
    VI acc[R][T];
    const uint8_t* vector[T];
#pragma GCC unroll 2
    for (int t = 0; t < T; t++) {
      vector[t] = vectors_at(a, tile + t);
      const VI start = vi_mul(vi_load(a->column_sum + (tile + t) * W), vi_set1(-128));
#pragma GCC unroll 16
      for (int r = 0; r < R; r++) acc[r][t] = start;
    }
    const uint8_t* x = panel_at<uint8_t>(a, row);
    for (int64_t s = 0; s < segments; s++, x += R * NYBBLE_SEGMENT_K) {
#pragma GCC unroll 2
      for (int t = 0; t < T; t++) {
        for (int v = a->count[(tile + t) * segments + s]; v > 0; v--) {
          const VI places = vi_load(vector[t]), codes = vi_load(vector[t] + 64);
          __builtin_prefetch(vector[t] + 2048);
          __builtin_prefetch(vector[t] + 2048 + 64);
          vector[t] += kVectorBytes;
#pragma GCC unroll 16
          for (int r = 0; r < R; r++) {
            const uint8_t* segment = x + r * NYBBLE_SEGMENT_K;
            dot_u8s8(acc[r][t], vi_gather128(places, vi_load(segment), vi_load(segment + 64)), codes);
          }
        }
      }
    }
#pragma GCC unroll 2
    for (int t = 0; t < T; t++) finish_gather<R, T>(a, row, (tile + t) * W, acc, t);
  }
};

}  // namespace

extern "C" NybbleStatus nybble_spw8a8_avx512vbmi_gather(const NybbleLinearArgs* args) {
  return run_gather<Tile, 12>(args);
}
