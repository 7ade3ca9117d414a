// y = sum_g scale_g * (x . (u4 codes - zero_point)) + bias, bfloat16 activations as lines; layout n16k8.
// code - zero_point becomes bfloat16, which holds it exactly, once per K block of a pass; then as w4a8 on tdpbf16ps,
// with 32 k a step: 128 cycles of multiplies for each 64 k of 32 rows by 32 columns. Only the float32 sums are rounded.
// Bound by the multiply, by the scaling for groups of 32, and by memory and the decoding up to about 32 rows.
// On 2 cores of Emerald Rapids: 1,160 GFLOP/s at 1024 x 4096 x 4096 with groups of 128, 26 % of the multiply's peak.
#include "tile_amx.h"
// clang-format off
#include "tile_amx_pairs.h"
// clang-format on

extern "C" NybbleStatus nybble_w4a16_amx(const NybbleLinearArgs* args) {
  return args->zero_point ? run_amx<NibblePairs<Bf16Nibbles<false>>, block_rows::w4a16_amx>(args)
                          : run_amx<NibblePairs<Bf16Nibbles<true>>, block_rows::w4a16_amx>(args);
}
