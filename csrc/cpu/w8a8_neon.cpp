// y = (x codes . w codes) * act_scale * scale + bias; layout n16k4, activations as codes.
// Built on smull and sadalp. 6 rows by 8 columns keep 24 accumulators in registers. Bound by four instructions
// for 16 products, and by memory at few rows.
#include "tile_mull.h"
// clang-format off
#include "tile_dot.h"
// clang-format on

extern "C" NybbleStatus nybble_w8a8_neon(const NybbleLinearArgs* args) {
  return run_tiles<Tile8, block_rows::w8a8_neon>(args);
}
