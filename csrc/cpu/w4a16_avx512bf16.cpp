// y = sum_g scale_g * (x . (u4 codes - zero_point)) + bias, bfloat16 activations; layout n16k8. code - zero_point is
// exact in bfloat16, so only the float32 sums are rounded. Built on vpermw, which looks up 32 codes at once, and
// vdpbf16ps. 12 rows by 32 columns keep a group's 24 accumulators in registers, enough to hide the latency of the
// multiply; the 24 totals are in the L1 cache. Bound by the multiply, and by memory up to 8 rows.
// Reaches 90 % of the multiply's peak at 256 x 4096 x 4096 on 2 cores of Zen 5.
#include "tile_avx512bf16.h"
// clang-format off
#include "tile_bf16_nibbles.h"
// clang-format on

extern "C" NybbleStatus nybble_w4a16_avx512bf16(const NybbleLinearArgs* args) {
  return args->zero_point || args->minimum
             ? run_tiles<GroupTile<Bf16Nibbles<false>>, block_rows::w4a16_avx512bf16>(args)
             : run_tiles<GroupTile<Bf16Nibbles<true>>, block_rows::w4a16_avx512bf16>(args);
}
