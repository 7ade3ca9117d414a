// y = sum_g scale_g * (x . book[u4 codes]) + bias, bfloat16 activations; layout n16k8. The values of the book are
// rounded to bfloat16. As w4a16_avx512bf16, which looks up codes too: vpermw and vdpbf16ps. Bound
// by the multiply, and by memory up to 8 rows.
#include "tile_avx512bf16.h"
// clang-format off
#include "tile_bf16_nibbles.h"
// clang-format on

extern "C" NybbleStatus nybble_w4nfa16_avx512bf16(const NybbleLinearArgs* args) {
  return run_tiles<GroupTile<Bf16Book>, block_rows::w4nfa16_avx512bf16>(args);
}
