// y = (x codes . w codes) * act_scale * scale + bias in plain C++; layout blocks8.
#include "tile_scalar.h"
// clang-format off
#include "tile_dot_scalar.h"
#include "tile_blocks.h"
// clang-format on

extern "C" NybbleStatus nybble_bsw8a8_scalar(const NybbleLinearArgs* args) {
  return run_blocks<Tile8, block_rows::bsw8a8_scalar>(args);
}
