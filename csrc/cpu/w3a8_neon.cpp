// y = sum_g scale_g * (x codes . u3 codes - zero_point * act_sum) * act_scale + bias; layout n16k32: planes of bits,
// which become lines of nibbles in the L1 cache, a group at a time. As w4a8_neon otherwise.
#define NYBBLE_PLANES
#include "tile_mull.h"
// clang-format off
#include "tile_dot.h"
// clang-format on

extern "C" NybbleStatus nybble_w3a8_neon(const NybbleLinearArgs* args) {
  return run_tiles<Tile4, block_rows::w3a8_neon>(args);
}
