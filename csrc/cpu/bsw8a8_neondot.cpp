// y = (x codes . w codes) * act_scale * scale + bias; layout blocks8, activations as codes.
// Built on sdot by lane, with the register tile of w8a8 over the stored blocks, 8 columns wide. Bound by sdot, and by
// memory at few rows.
#include "tile_neondot.h"
// clang-format off
#include "tile_dot.h"
#include "tile_blocks.h"
// clang-format on

extern "C" NybbleStatus nybble_bsw8a8_neondot(const NybbleLinearArgs* args) {
  return run_blocks<Tile8, block_rows::bsw8a8_neondot>(args);
}
