// y = x (book[u4 codes] * scale)^T + bias, float activations; layout n16k8. Bound by the lookups and by multiplying.
#include "tile_scalar.h"
// clang-format off
#include "tile_float.h"
// clang-format on

extern "C" NybbleStatus nybble_w4nfa16_scalar(const NybbleLinearArgs* args) {
  return run_float<WeightOfBook, block_rows::w4nfa16_scalar>(args);
}
