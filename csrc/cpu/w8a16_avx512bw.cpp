// y = x (s8 codes)^T * scale + bias with float activations; layout n16k4. Bound by the float multiply.
#include "tile_avx512bw.h"
// clang-format off
#include "tile_float.h"
// clang-format on

extern "C" NybbleStatus nybble_w8a16_avx512bw(const NybbleLinearArgs* args) {
  return run_float<Weight8, block_rows::w8a16_avx512bw>(args);
}
