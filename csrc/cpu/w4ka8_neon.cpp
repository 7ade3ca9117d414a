// y = sum_g (scale * first_g * (x codes . u4 codes) - minimum * second_g * act_sum_g) * act_scale + bias; layout n16k8
// with levels: a group of 32 has two numbers of 6 bits, a block of 8 groups a scale and a minimum.
// As w4a8_neon otherwise.
#define NYBBLE_LEVELS
#include "tile_mull.h"
// clang-format off
#include "tile_dot.h"
// clang-format on

extern "C" NybbleStatus nybble_w4ka8_neon(const NybbleLinearArgs* args) {
  return run_tiles<Tile4, block_rows::w4ka8_neon>(args);
}
