// y = (x codes . w codes) * act_scale * scale + bias; layout blocks8, activations as codes.
// Built on smull and sadalp, with the register tile of w8a8 over the stored blocks, 8 columns wide. Bound by four
// instructions for 16 products, and by memory at few rows.
#include "tile_mull.h"
// clang-format off
#include "tile_dot.h"
#include "tile_blocks.h"
// clang-format on

extern "C" NybbleStatus nybble_bsw8a8_neon(const NybbleLinearArgs* args) {
  return run_blocks<Tile8, block_rows::bsw8a8_neon>(args);
}
