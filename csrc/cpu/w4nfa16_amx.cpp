// y = sum_g scale_g * (x . book[u4 codes]) + bias, bfloat16 activations as lines; layout n16k8. The values of the book
// are rounded to bfloat16. As w4a16_amx otherwise.
#include "tile_amx.h"
// clang-format off
#include "tile_amx_pairs.h"
// clang-format on

extern "C" NybbleStatus nybble_w4nfa16_amx(const NybbleLinearArgs* args) {
  return run_amx<NibblePairs<Bf16Book>, block_rows::w4nfa16_amx>(args);
}
