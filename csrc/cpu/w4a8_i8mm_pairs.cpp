// y = sum_g scale_g * (x codes . u4 codes - zero_point * act_sum) * act_scale + bias; layout n16k16n.
// Built on smmla, whose operands lie in memory as they are multiplied once nibbles are taken apart. 16 rows by 4
// columns keep the sums of a group in registers, the float ones in the L1 cache. Bound by smmla and by taking nibbles
// apart.
#include "tile_i8mm.h"
// clang-format off
#include "tile_mmla.h"
// clang-format on

extern "C" NybbleStatus nybble_w4a8_i8mm_pairs(const NybbleLinearArgs* args) {
  return run_tiles<PairTile<Nibbles, SideBySide<Nibbles>>, block_rows::w4a8_i8mm_pairs>(args);
}
