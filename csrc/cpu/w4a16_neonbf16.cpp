// y = sum_g scale_g * (x . (u4 codes - zero_point)) + bias, bfloat16 activations; layout n16k8. code - zero_point is
// exact in bfloat16, so only the float32 sums are rounded. Built on bfmmla, and on tbl, which looks up 16 bytes at
// once: 13 instructions for 32 weights. 8 rows by 8 columns keep the 16 accumulators of a group in registers. Bound by
// bfmmla and the lookups; decoded once for many rows, by bfmmla.
#include "tile_neonbf16.h"
// clang-format off
#include "tile_bfmmla.h"
// clang-format on

extern "C" NybbleStatus nybble_w4a16_neonbf16(const NybbleLinearArgs* args) {
  return run_bf16<GroupTile, Bf16Nibbles, block_rows::w4a16_neonbf16>(args);
}
