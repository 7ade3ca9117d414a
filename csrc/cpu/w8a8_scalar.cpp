// y = (x codes . w codes) * act_scale * scale + bias in plain C++; layout n16k4. Runs on every machine.
#include "tile_scalar.h"
// clang-format off
#include "tile_dot_scalar.h"
// clang-format on

extern "C" NybbleStatus nybble_w8a8_scalar(const NybbleLinearArgs* args) {
  return run_tiles<Tile8, block_rows::w8a8_scalar>(args);
}
