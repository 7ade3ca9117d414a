// y = x ((u4 codes - zero_point) * scale)^T + bias, float activations; layout n16k8. Bound by widening and multiplying.
#include "tile_scalar.h"
// clang-format off
#include "tile_float.h"
// clang-format on

extern "C" NybbleStatus nybble_w4a16_scalar(const NybbleLinearArgs* args) {
  return run_float<Weight4, block_rows::w4a16_scalar>(args);
}
