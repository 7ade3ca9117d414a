// y = x ((u8 codes - zero_point) * scale)^T + bias, float activations; layout n16k4g. Bound by the float multiply,
// with few rows by widening.
#include "tile_avx512bw.h"
// clang-format off
#include "tile_float.h"
// clang-format on

extern "C" NybbleStatus nybble_w8a16_avx512bw_groups(const NybbleLinearArgs* args) {
  return run_float<Bytes, block_rows::w8a16_avx512bw_groups>(args);
}
