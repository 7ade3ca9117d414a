// y = (x codes . w codes) * act_scale * scale + bias in plain C++; layout n16k4. Runs on every machine.
#include "tile_scalar.h"
// clang-format off
#include "tile_run.h"
// clang-format on

namespace {

struct Tile {
  static constexpr int vectors(int) { return 1; }

  template <int R, int V>
  static void run(const NybbleLinearArgs* a, int64_t row, int64_t column, Prefetcher&) {
    const int8_t* w = reinterpret_cast<const int8_t*>(codes_at(a, column));
    const int8_t* x = panel_at<int8_t>(a, row);
    VI acc[R][1];
    for (auto& sum : acc) sum[0] = vi_set1(0);
    for (int64_t k = 0; k < a->k_padded; k += 4, w += 64, x += 4 * R)
      for (int r = 0; r < R; r++)
        for (int i = 0; i < W; i++)
          for (int j = 0; j < 4; j++) acc[r][0].v[i] += x[r * 4 + j] * w[i * 4 + j];
    finish_w8a8<R, 1>(a, row, column, acc, 0);
  }
};

}  // namespace

extern "C" NybbleStatus nybble_w8a8_scalar(const NybbleLinearArgs* args) { return run_tiles<Tile, 4>(args); }
