// y = sum_g scale_g * (x codes . u8 codes - zero_point * act_sum) * act_scale + bias; layout n16k4g.
// Built on smmla; the codes less 128 are signed. 16 rows by 4 columns keep the sums of a group in registers,
// the float ones in the L1 cache. Bound by smmla and the zips of the weights.
#include "tile_i8mm.h"
// clang-format off
#include "tile_mmla.h"
// clang-format on

extern "C" NybbleStatus nybble_w8a8_i8mm_groups(const NybbleLinearArgs* args) {
  return run_tiles<PairTile<Bytes>, block_rows::w8a8_i8mm_groups>(args);
}
