// y = sum_g scale_g * (x codes . u3 codes - zero_point * act_sum) * act_scale + bias; layout n16k32: planes of bits,
// which become lines of nibbles in the L1 cache, a group at a time. As w4a8_i8mm otherwise.
#define NYBBLE_PLANES
#include "tile_i8mm.h"
// clang-format off
#include "tile_mmla.h"
// clang-format on

extern "C" NybbleStatus nybble_w3a8_i8mm(const NybbleLinearArgs* args) {
  return run_tiles<PairTile<Nibbles>, block_rows::w3a8_i8mm>(args);
}
