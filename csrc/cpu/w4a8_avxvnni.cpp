// y = sum_g scale_g * (x codes . u4 codes - zero_point * act_sum) * act_scale + bias; layout n16k8.
// Built on vpdpbusd over 8 lanes, with the nibble as the unsigned operand. 4 rows by 16 columns keep 8 int accumulators
// in registers; the 8 float ones spill. Bound by the multiply, and by memory at few rows.
// Reaches 78 % of the multiply's peak at 256 x 4096 x 4096 with groups of 128 on 2 cores of Zen 5.
#include "tile_avxvnni.h"
// clang-format off
#include "tile_vnni.h"
// clang-format on

extern "C" NybbleStatus nybble_w4a8_avxvnni(const NybbleLinearArgs* args) {
  return run_tiles<Tile4, block_rows::w4a8_avxvnni>(args);
}
