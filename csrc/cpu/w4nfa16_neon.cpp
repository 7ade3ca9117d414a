// y = x (book[u4 codes] * scale)^T + bias, float activations; layout n16k8. A tbl of four registers, which hold the 16
// floats, looks up 4 weights. Bound by it with few rows, by the multiply with many.
#include "tile_neon.h"
// clang-format off
#include "tile_float.h"
// clang-format on

extern "C" NybbleStatus nybble_w4nfa16_neon(const NybbleLinearArgs* args) {
  return run_float<WeightOfBook, block_rows::w4nfa16_neon>(args);
}
