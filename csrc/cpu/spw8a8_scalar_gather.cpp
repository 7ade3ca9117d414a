// y = (x codes . w codes) * act_scale * scale + bias in plain C++; layout gather8, activations as code + 128.
#include "tile_scalar.h"
// clang-format off
#include "tile_gather.h"
// clang-format on

namespace {

struct Tile {
  static constexpr int kTiles = 1;

  template <int R, int T>
  static void run(const NybbleLinearArgs* a, int64_t row, int64_t tile) {
    const int64_t segments = a->k_padded / NYBBLE_SEGMENT_K;
    constexpr int halves = NYBBLE_TILE_N / W;
    VI acc[R][halves];
    for (int h = 0; h < halves; h++)
      for (int r = 0; r < R; r++)
        acc[r][h] = vi_mul(vi_load(a->column_sum + tile * NYBBLE_TILE_N + h * W), vi_set1(-128));
    const uint8_t *vector = vectors_at(a, tile), *x = panel_at<uint8_t>(a, row);
    for (int64_t s = 0; s < segments; s++, x += R * NYBBLE_SEGMENT_K)
      for (int v = a->count[tile * segments + s]; v > 0; v--, vector += kVectorBytes)
        for (int r = 0; r < R; r++)
          for (int i = 0; i < 64; i++)
            acc[r][i / 4 / W].v[i / 4 % W] +=
                x[r * NYBBLE_SEGMENT_K + (vector[i] & 127)] * static_cast<int8_t>(vector[64 + i]);
    for (int h = 0; h < halves; h++) finish_gather<R, halves>(a, row, tile * NYBBLE_TILE_N + h * W, acc, h);
  }
};

}  // namespace

extern "C" NybbleStatus nybble_spw8a8_scalar_gather(const NybbleLinearArgs* args) { return run_gather<Tile, 4>(args); }
