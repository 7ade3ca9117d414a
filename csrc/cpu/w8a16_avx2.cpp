// y = x (s8 codes)^T * scale + bias with float activations; layout n16k4. Bound by the float multiply.
// Five rows leave registers to decode two vectors beside their sums: faster here, at any number of rows, than to decode
// once for all rows.
#include "tile_avx2.h"
// clang-format off
#include "tile_float.h"
// clang-format on

extern "C" NybbleStatus nybble_w8a16_avx2(const NybbleLinearArgs* args) {
  return run_tiles<FloatTile<Weight8>, block_rows::w8a16_avx2>(args);
}
