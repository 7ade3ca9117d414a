// y = x (book[u4 codes] * scale)^T + bias, float activations; layout n16k8. Two vpermps and a blend
// look up 8 weights. Bound by these with few rows, by the multiply with many.
#include "tile_avx2.h"
// clang-format off
#include "tile_float.h"
// clang-format on

extern "C" NybbleStatus nybble_w4nfa16_avx2(const NybbleLinearArgs* args) {
  return run_float<WeightOfBook, block_rows::w4nfa16_avx2>(args);
}
