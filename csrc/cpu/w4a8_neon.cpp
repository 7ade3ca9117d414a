// y = sum_g scale_g * (x codes . u4 codes - zero_point * act_sum) * act_scale + bias; layout n16k8.
// Built on smull and sadalp: a nibble is a signed byte too. 4 rows by 8 columns keep the sums of a group and the
// float ones in registers. Bound by four instructions for 16 products, and by memory at few rows.
#include "tile_mull.h"
// clang-format off
#include "tile_dot.h"
// clang-format on

extern "C" NybbleStatus nybble_w4a8_neon(const NybbleLinearArgs* args) {
  return run_tiles<Tile4, block_rows::w4a8_neon>(args);
}
