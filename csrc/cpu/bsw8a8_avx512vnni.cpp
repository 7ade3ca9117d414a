// y = (x codes . w codes) * act_scale * scale + bias; layout blocks8, activations as code + 128.
// Built on vpdpbusd, with the register tile of w8a8 over the blocks that are stored. Bound by the multiply, and by
// memory up to 16 rows.
#include "tile_avx512vnni.h"
// clang-format off
#include "tile_vnni.h"
#include "tile_blocks.h"
// clang-format on

namespace {

constexpr int64_t kAhead = 4096;

struct Tile {
  static constexpr int vectors(int rows) { return Tile8::vectors(rows) < 2 ? 1 : 2; }

  template <int R, int V>
  static void run(const NybbleLinearArgs* a, int64_t row, int64_t column) {
    VI acc[R][V];
    Tile8::start<R, V>(a, column, acc);
    const Blocks blocks(a, column);
    for (uint64_t block = blocks.begin; block < blocks.end; block++) {
      const uint8_t* w[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) w[v] = block_at(a, block, column + v * W);
      const uint8_t* x = panel_at<uint8_t>(a, row) + a->index[block] * a->block_k * R;
      for (int64_t k = 0; k < a->block_k; k += 4, x += 4 * R) {
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) __builtin_prefetch(w[v] + kAhead);
        Tile8::multiply<R, V>(acc, w, x);
      }
    }
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) finish_w8a8<R, V>(a, row, column + v * W, acc, v);
  }
};

}  // namespace

extern "C" NybbleStatus nybble_bsw8a8_avx512vnni(const NybbleLinearArgs* args) { return run_blocks<Tile, 12>(args); }
