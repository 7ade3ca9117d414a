// y = sum_g (scale * first_g * (x codes . u4 codes) - minimum * second_g * act_sum_g) * act_scale + bias; layout n16k8
// with levels: a group of 32 has two numbers of 6 bits, a block of 8 groups a scale and a minimum.
// As w4a8_i8mm otherwise.
#define NYBBLE_LEVELS
#include "tile_i8mm.h"
// clang-format off
#include "tile_mmla.h"
// clang-format on

extern "C" NybbleStatus nybble_w4ka8_i8mm(const NybbleLinearArgs* args) {
  return run_tiles<PairTile<Nibbles>, block_rows::w4ka8_i8mm>(args);
}
