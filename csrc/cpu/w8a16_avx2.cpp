// y = x (s8 codes)^T * scale + bias with float activations; layout n16k4. Bound by the float multiply.
// 90 % of two 8-lane FMAs a cycle at 1024 x 4096 x 4096, of 2 cores of Zen 5 held to AVX2.
#include "tile_avx2.h"
// clang-format off
#include "tile_float.h"
// clang-format on

extern "C" NybbleStatus nybble_w8a16_avx2(const NybbleLinearArgs* args) {
  return run_float<Weight8, block_rows::w8a16_avx2>(args);
}
