// y = x (book[u4 codes] * scale)^T + bias, float activations; layout n16k8. vpermps looks up 16
// weights. Bound by memory with few rows, by the multiply with many.
#include "tile_avx512bw.h"
// clang-format off
#include "tile_float.h"
// clang-format on

extern "C" NybbleStatus nybble_w4nfa16_avx512bw(const NybbleLinearArgs* args) {
  return run_float<WeightOfBook, block_rows::w4nfa16_avx512bw>(args);
}
