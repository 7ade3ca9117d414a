// y = sum_g scale_g * (x . (u8 codes - zero_point)) + bias, bfloat16 activations; layout n16k4g. As w8a16_neonbf16
// otherwise.
#include "tile_neonbf16.h"
// clang-format off
#include "tile_bfmmla.h"
// clang-format on

extern "C" NybbleStatus nybble_w8a16_neonbf16_groups(const NybbleLinearArgs* args) {
  return run_bf16<GroupTile, Bf16Bytes, block_rows::w8a16_neonbf16_groups>(args);
}
