// y = sum_g scale_g * (x codes . u4 codes - zero_point * act_sum) * act_scale + bias in plain C++; layout n16k8.
#include "tile_scalar.h"
// clang-format off
#include "tile_dot_scalar.h"
// clang-format on

extern "C" NybbleStatus nybble_w4a8_scalar(const NybbleLinearArgs* args) {
  return run_tiles<UnsignedTile<2>, block_rows::w4a8_scalar>(args);
}
