// y = (x codes . w codes) * act_scale * scale + bias; layout n16k4, activations as code + 128.
// Built on vpdpbusd (u8 x s8, wrapping): the 128 is taken out again with the column sums of the codes, mod 2^32, so the
// result is exact. 12 rows by 32 columns keep 24 accumulators. Bound by the multiply.
#include "tile_avx512vnni.h"
// clang-format off
#include "tile_run.h"
// clang-format on

namespace {

template <int kVectors>
struct Tile {
  template <int R>
  static void run(const NybbleLinearArgs* a, int64_t row, int64_t column) {
    const uint8_t* w[kVectors];
    VI acc[R][kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; v++) {
      w[v] = codes_at(a, column + v * W, 4);
      const VI start = vi_mul(vi_load(a->column_sum + column + v * W), vi_set1(-128));
#pragma GCC unroll 12
      for (int r = 0; r < R; r++) acc[r][v] = start;
    }
    const uint8_t* x = panel_at<uint8_t>(a, row);
    for (int64_t k = 0; k < a->k_padded; k += 4, x += 4 * R) {
      VI ws[kVectors];
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; v++) ws[v] = vi_load(w[v] + 16 * k);
#pragma GCC unroll 12
      for (int r = 0; r < R; r++) {
        int32_t four;
        memcpy(&four, x + 4 * r, 4);
        const VI xs = vi_set1(four);
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; v++) dot_u8s8(acc[r][v], xs, ws[v]);
      }
    }
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; v++) {
      const Columns8 columns{a, column + v * W};
#pragma GCC unroll 12
      for (int r = 0; r < R; r++) columns.finish(row + r, acc[r][v]);
    }
  }
};

}  // namespace

extern "C" NybbleStatus nybble_w8a8_avx512vnni(const NybbleLinearArgs* args) { return run_tiles<Tile, 2, 12>(args); }
