// y = sum_g scale_g * (x codes . u8 codes - zero_point * act_sum) * act_scale + bias; layout n16k16g.
// Built on usmmla, whose operands lie in memory as they are multiplied. 16 rows by 4 columns keep the sums of a group
// in registers, the float ones in the L1 cache. Bound by usmmla, and at one row by memory.
#include "tile_i8mm.h"
// clang-format off
#include "tile_mmla.h"
// clang-format on

extern "C" NybbleStatus nybble_w8a8_i8mm_groups(const NybbleLinearArgs* args) {
  return run_tiles<PairTile<Unsigned, SideBySide<Unsigned>>, block_rows::w8a8_i8mm_groups>(args);
}
