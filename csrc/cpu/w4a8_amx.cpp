// y = sum_g scale_g * (x codes . (u4 codes - zero_point)) * act_scale + bias; layout n16k8, activations as lines of
// codes. Nibbles become signed bytes less their zero point, once per K block of a pass, so that no sum of activations
// is needed; then as w8a8 on tdpbssd. Each group's 16 x 16 int32 sums pass through the stack to be scaled in float32:
// at 32 rows by 32 columns and groups of 128, 128 cycles of multiplies against 64 stores and 64 fused steps of vectors,
// which other tiles' multiplies can hide. Bound by the multiply for groups of 128 and more, by the scaling for groups
// of 32. Never run on a CPU with AMX: emulated and counted only.
#include "tile_amx.h"
// clang-format off
#include "tile_amx_nibbles.h"
// clang-format on

extern "C" NybbleStatus nybble_w4a8_amx(const NybbleLinearArgs* args) {
  return run_amx<Nibbles, block_rows::w4a8_amx>(args);
}
