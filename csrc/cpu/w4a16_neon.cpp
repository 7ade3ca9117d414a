// y = x ((u4 codes - zero_point) * scale)^T + bias, float activations; layout n16k8. Bound by the float multiply, with
// few rows by widening: and, convert, fused multiply-add for 4 weights.
#include "tile_neon.h"
// clang-format off
#include "tile_float_neon.h"
// clang-format on

extern "C" NybbleStatus nybble_w4a16_neon(const NybbleLinearArgs* args) {
  return run_fixed<Nibble4, block_rows::w4a16_neon>(args);
}
