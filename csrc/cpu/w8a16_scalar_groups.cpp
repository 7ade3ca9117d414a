// y = x ((u8 codes - zero_point) * scale)^T + bias, float activations; layout n16k4g. Bound by widening and
// multiplying.
#include "tile_scalar.h"
// clang-format off
#include "tile_float.h"
// clang-format on

extern "C" NybbleStatus nybble_w8a16_scalar_groups(const NybbleLinearArgs* args) {
  return run_float<Bytes, block_rows::w8a16_scalar_groups>(args);
}
