// y = (x codes . w codes) * act_scale * scale + bias in plain C++; layout gather8.
#include "tile_scalar.h"
// clang-format off
#include "tile_gather.h"
// clang-format on

namespace {

struct Tile {
  template <int R>
  static void run(const NybbleLinearArgs* a, int64_t row, int64_t tile, int64_t end) {
    for (; tile < end; tile++) run_one<R>(a, row, tile);
  }

  template <int R>
  static void run_one(const NybbleLinearArgs* a, int64_t row, int64_t tile) {
    constexpr int halves = NYBBLE_TILE_N / W;
    VI acc[R][halves];
    for (int h = 0; h < halves; h++)
      for (int r = 0; r < R; r++)
        acc[r][h] = vi_mul(vi_load(a->column_sum + tile * NYBBLE_TILE_N + h * W), vi_set1(-128));
    const uint8_t *x = panel_at<uint8_t>(a, row),
                  *places = a->codes + static_cast<int64_t>(a->start[tile]) * kStepBytes;
    for (uint64_t step = a->start[tile]; step < a->start[tile + 1]; step++)
      for (int half = 0; half < 2; half++, places += 128)
        for (int r = 0; r < R; r++)
          for (int i = 0; i < 64; i++) {
            const int k = places[i] & 127;
            const int64_t line = a->window[step] + k / NYBBLE_LINE_K;
            acc[r][i / 4 / W].v[i / 4 % W] +=
                x[(line * R + r) * NYBBLE_LINE_K + k % NYBBLE_LINE_K] * static_cast<int8_t>(places[64 + i]);
          }
    for (int h = 0; h < halves; h++) finish_gather<R, halves>(a, row, tile * NYBBLE_TILE_N + h * W, acc, h);
  }
};

}  // namespace

extern "C" NybbleStatus nybble_spw8a8_scalar_gather(const NybbleLinearArgs* args) {
  return run_gather<Tile, block_rows::spw8a8_scalar_gather>(args);
}
