// y = sum_g scale_g * (x . (u8 codes - zero_point)) + bias, bfloat16 activations; layout n16k4g. code - zero_point is
// exact in bfloat16, so only the float32 sums are rounded. A byte becomes the last bits of 2^23 + code as a float, from
// which 2^23 + zero_point is taken: three instructions for 16 codes; then vdpbf16ps. Bound by the multiply, with few
// rows by the widening or by memory.
#include "tile_avx512bf16.h"
// clang-format off
#include "tile_bf16_nibbles.h"
// clang-format on

extern "C" NybbleStatus nybble_w8a16_avx512bf16_groups(const NybbleLinearArgs* args) {
  return run_tiles<GroupTile<Bf16Bytes>, block_rows::w8a16_avx512bf16_groups>(args);
}
