// y = sum_g scale_g * (x codes . u8 codes - zero_point * act_sum) * act_scale + bias; layout n16k4g.
// Built on sdot by lane; the codes less 128 are signed. 16 rows by 4 columns keep the sums of a group in
// registers, the float ones in the L1 cache. Bound by sdot, and by memory at few rows.
#include "tile_neondot.h"
// clang-format off
#include "tile_dot.h"
// clang-format on

extern "C" NybbleStatus nybble_w8a8_neondot_groups(const NybbleLinearArgs* args) {
  return run_tiles<SignedTile<Bytes>, block_rows::w8a8_neondot_groups>(args);
}
