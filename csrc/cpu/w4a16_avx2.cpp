// y = x ((u4 codes - zero_point) * scale)^T + bias, float activations; layout n16k8. Bound by the float multiply, with
// few rows by widening: and, convert, fused multiply-add for 8 weights.
// 85 % of two 8-lane FMAs a cycle at 128 x 4096 x 4096, of 2 cores of Zen 5 held to AVX2.
#include "tile_avx2.h"
// clang-format off
#include "tile_float.h"
// clang-format on

extern "C" NybbleStatus nybble_w4a16_avx2(const NybbleLinearArgs* args) {
  return run_float<Weight4, block_rows::w4a16_avx2>(args);
}
