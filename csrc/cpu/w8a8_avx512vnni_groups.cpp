// y = sum_g scale_g * (x codes . u8 codes - zero_point * act_sum) * act_scale + bias; layout n16k4g.
// Built on vpdpbusd with the weight as the unsigned operand, so that zero points cost nothing but the start of a
// group's sums. 8 rows by 32 columns keep 16 int accumulators in registers and spill few of the 16 float ones. Bound by
// the multiply, and by memory up to 16 rows.
#include "tile_avx512vnni.h"
// clang-format off
#include "tile_vnni.h"
// clang-format on

extern "C" NybbleStatus nybble_w8a8_avx512vnni_groups(const NybbleLinearArgs* args) {
  return run_tiles<UnsignedTile<Bytes>, block_rows::w8a8_avx512vnni_groups>(args);
}
