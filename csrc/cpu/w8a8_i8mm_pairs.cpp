// y = (x codes . w codes) * act_scale * scale + bias; layout n16k16, activations as codes.
// Built on smmla, whose operands lie in memory as they are multiplied. 16 rows by 4 columns, or fewer rows by up to 16,
// keep the accumulators in registers. Bound by smmla, and at one row by memory.
#include "tile_i8mm.h"
// clang-format off
#include "tile_mmla.h"
// clang-format on

extern "C" NybbleStatus nybble_w8a8_i8mm_pairs(const NybbleLinearArgs* args) {
  return run_tiles<PairTile8<SideBySide<Signed>>, block_rows::w8a8_i8mm_pairs>(args);
}
