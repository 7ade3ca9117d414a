// y = sum_g scale_g * (x codes . u8 codes - zero_point * act_sum) * act_scale + bias; layout n16k4g.
// Built on vpdpbusd over 8 lanes, with the weight as the unsigned operand. 4 rows by 16 columns keep 8 int accumulators
// in registers; the 8 float ones spill. Bound by the multiply, and by memory at few rows.
#include "tile_avxvnni.h"
// clang-format off
#include "tile_vnni.h"
// clang-format on

extern "C" NybbleStatus nybble_w8a8_avxvnni_groups(const NybbleLinearArgs* args) {
  return run_tiles<UnsignedTile<Bytes>, block_rows::w8a8_avxvnni_groups>(args);
}
