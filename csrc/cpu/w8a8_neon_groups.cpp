// y = sum_g scale_g * (x codes . u8 codes - zero_point * act_sum) * act_scale + bias; layout n16k4g.
// Built on smull and sadalp; the codes less 128 are signed. 4 rows by 8 columns keep the sums of a group and the
// float ones in registers. Bound by four instructions for 16 products, and by memory at few rows.
#include "tile_mull.h"
// clang-format off
#include "tile_dot.h"
// clang-format on

extern "C" NybbleStatus nybble_w8a8_neon_groups(const NybbleLinearArgs* args) {
  return run_tiles<SignedTile<Bytes>, block_rows::w8a8_neon_groups>(args);
}
