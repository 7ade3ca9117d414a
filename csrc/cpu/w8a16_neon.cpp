// y = x (s8 codes)^T * scale + bias with float activations; layout n16k4. Bound by the float multiply,
// with few rows by widening: a shift or tbl and a conversion for 4 weights.
#include "tile_neon.h"
// clang-format off
#include "tile_float_neon.h"
// clang-format on

extern "C" NybbleStatus nybble_w8a16_neon(const NybbleLinearArgs* args) {
  return run_fixed<Byte8, block_rows::w8a16_neon>(args);
}
