// y = sum_g scale_g * (x codes . u8 codes - zero_point * act_sum) * act_scale + bias in plain C++; layout n16k4g.
#include "tile_scalar.h"
// clang-format off
#include "tile_dot_scalar.h"
// clang-format on

extern "C" NybbleStatus nybble_w8a8_scalar_groups(const NybbleLinearArgs* args) {
  return run_tiles<UnsignedTile<1>, block_rows::w8a8_scalar_groups>(args);
}
