// y = sum_g (scale * first_g * (x codes . u4 codes) - minimum * second_g * act_sum_g) * act_scale + bias; layout n16k8
// with levels: a group of 32 has two numbers of 6 bits, a block of 8 groups a scale and a minimum.
// As w4a8_scalar otherwise.
#define NYBBLE_LEVELS
#include "tile_scalar.h"
// clang-format off
#include "tile_dot_scalar.h"
// clang-format on

extern "C" NybbleStatus nybble_w4ka8_scalar(const NybbleLinearArgs* args) {
  return run_tiles<UnsignedTile<2>, block_rows::w4ka8_scalar>(args);
}
