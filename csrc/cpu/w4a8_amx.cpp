// y = sum_g scale_g * (x codes . (u4 codes - zero_point)) * act_scale + bias; layout n16k8, activations as lines of
// codes. Nibbles become signed bytes less their zero point, once per K block of a pass, so that no sum of activations
// is needed; then as w8a8 on tdpbssd. Each group's 16 x 16 int32 sums pass through the stack to be scaled in float32:
// at 32 rows by 32 columns and groups of 128, 128 cycles of multiplies against 64 stores and 64 fused steps of vectors,
// which other tiles' multiplies can hide. Bound by the multiply for groups of 128 and more, by the scaling for groups
// of 32. On 2 cores of Emerald Rapids: 2,070 GOP/s at 256 x 4096 x 4096 with groups of 128, 23 % of the multiply's peak
// and twice the VNNI kernel. Groups of 32 are scaled in strips (tile_amx_strips.h): of 32 x 512 x 4096 on 1 core 1.25
// times the speed of the VNNI kernel.
#include "tile_amx.h"
// clang-format off
#include "tile_amx_nibbles.h"
// clang-format on

extern "C" NybbleStatus nybble_w4a8_amx(const NybbleLinearArgs* args) {
  return run_amx<Nibbles, block_rows::w4a8_amx>(args);
}
