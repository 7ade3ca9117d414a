// y = x ((u8 codes - zero_point) * scale)^T + bias, float activations; layout n16k4g. Bound by the float multiply,
// with few rows by widening: shift, and, subtract, convert, fused multiply-add for 4 weights.
#include "tile_neon.h"
// clang-format off
#include "tile_float.h"
// clang-format on

extern "C" NybbleStatus nybble_w8a16_neon_groups(const NybbleLinearArgs* args) {
  return run_float<Bytes, block_rows::w8a16_neon_groups>(args);
}
