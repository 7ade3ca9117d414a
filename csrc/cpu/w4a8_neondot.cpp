// y = sum_g scale_g * (x codes . u4 codes - zero_point * act_sum) * act_scale + bias; layout n16k8.
// Built on sdot by lane: a nibble is a signed byte too. 16 rows by 4 columns keep the sums of a group in registers,
// the float ones in the L1 cache. Bound by sdot, and by memory at few rows.
#include "tile_neondot.h"
// clang-format off
#include "tile_dot.h"
// clang-format on

extern "C" NybbleStatus nybble_w4a8_neondot(const NybbleLinearArgs* args) {
  return run_tiles<Tile4, block_rows::w4a8_neondot>(args);
}
