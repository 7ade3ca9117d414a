// y = sum_g scale_g * (x codes . u4 codes - zero_point * act_sum) * act_scale + bias; layout n16k8.
// Built on vpdpbusd with the nibble as the unsigned operand. 8 rows by 32 columns keep 16 int accumulators in registers
// and spill few of the 16 float ones. Bound by the multiply, and by memory up to 16 rows.
// Reaches 85 % of the multiply's peak at 256 x 4096 x 4096 with groups of 128 on 2 cores of Zen 5.
#include "tile_avx512vnni.h"
// clang-format off
#include "tile_vnni.h"
// clang-format on

extern "C" NybbleStatus nybble_w4a8_avx512vnni(const NybbleLinearArgs* args) {
  return run_tiles<Tile4, block_rows::w4a8_avx512vnni>(args);
}
