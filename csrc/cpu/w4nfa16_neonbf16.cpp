// y = sum_g scale_g * (x . book[u4 codes]) + bias, bfloat16 activations; layout n16k8. The values of the book are
// rounded to bfloat16. As w4a16_neonbf16 otherwise.
#include "tile_neonbf16.h"
// clang-format off
#include "tile_bfmmla.h"
// clang-format on

extern "C" NybbleStatus nybble_w4nfa16_neonbf16(const NybbleLinearArgs* args) {
  return run_bf16<GroupTile, Bf16Book, block_rows::w4nfa16_neonbf16>(args);
}
