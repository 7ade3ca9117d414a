// y = sum_g scale_g * (x codes . u4 codes - zero_point * act_sum) * act_scale + bias in plain C++; layout n16k8.
#include "tile_scalar.h"
// clang-format off
#include "tile_run.h"
// clang-format on

namespace {

struct Tile {
  static constexpr int vectors(int) { return 1; }

  template <int R, int V>
  static void run(const NybbleLinearArgs* a, int64_t row, int64_t column, Prefetcher&) {
    const uint8_t* w = codes_at(a, column);
    const int8_t* x = panel_at<int8_t>(a, row);
    VF sum[R][1];
    for (auto& s : sum) s[0] = vf_set1(0.0f);
    for (int64_t g = 0; g < a->groups; g++) {
      const GroupStart start(a, row, column, g);
      VI acc[R];
      for (int r = 0; r < R; r++) acc[r] = start.of_row(r);
      for (int64_t k = 0; k < a->group; k += 8, w += 64, x += 8 * R)
        for (int r = 0; r < R; r++)
          for (int i = 0; i < W; i++)
            for (int j = 0; j < 4; j++)
              acc[r].v[i] += x[r * 4 + j] * (w[i * 4 + j] & 15) + x[(R + r) * 4 + j] * (w[i * 4 + j] >> 4);
      const VF scale = group_scale(a, column, g);
      for (int r = 0; r < R; r++) sum[r][0] = vf_fma(vf_of_int(acc[r]), scale, sum[r][0]);
    }
    finish_w4a8<R, 1>(a, row, column, sum, 0);
  }
};

}  // namespace

extern "C" NybbleStatus nybble_w4a8_scalar(const NybbleLinearArgs* args) { return run_tiles<Tile, 4>(args); }
