// y = sum_g scale_g * (x codes . u4 codes - zero_point * act_sum) * act_scale + bias in plain C++; layout n16k8.
#include "tile_scalar.h"
// clang-format off
#include "tile_run.h"
// clang-format on

namespace {

template <int kVectors>
struct Tile {
  template <int R>
  static void run(const NybbleLinearArgs* a, int64_t row, int64_t column) {
    const uint8_t* w = codes_at(a, column, 8);
    const int8_t* x = panel_at<int8_t>(a, row);
    VF sum[R];
    for (auto& s : sum) s = vf_set1(0.0f);
    for (int64_t g = 0; g < a->groups; g++) {
      VI acc[R];
      for (auto& s : acc) s = vi_set1(0);
      for (int64_t k = 0; k < a->group; k += 8, w += 64, x += 8 * R)
        for (int r = 0; r < R; r++)
          for (int i = 0; i < W; i++)
            for (int j = 0; j < 4; j++)
              acc[r].v[i] += x[r * 4 + j] * (w[i * 4 + j] & 15) + x[(R + r) * 4 + j] * (w[i * 4 + j] >> 4);
      const VF scale = group_scale(a, column, g);
      const VI zero = group_zero(a, column, g);
      for (int r = 0; r < R; r++) sum[r] = finish_group(a, row + r, g, scale, zero, acc[r], sum[r]);
    }
    for (int r = 0; r < R; r++) finish_w4a8(a, row + r, column, sum[r]);
  }
};

}  // namespace

extern "C" NybbleStatus nybble_w4a8_scalar(const NybbleLinearArgs* args) { return run_tiles<Tile, 1, 4>(args); }
