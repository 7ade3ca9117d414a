// y = x (u4 codes * (scale * first_g) - minimum * second_g)^T + bias, bfloat16 activations; layout n16k8 with levels: a
// group of 32 has two numbers of 6 bits, a block of 8 groups a scale and a minimum. As w4a16_neonbf16 otherwise.
#define NYBBLE_LEVELS
#include "tile_neonbf16.h"
// clang-format off
#include "tile_bfmmla.h"
// clang-format on

extern "C" NybbleStatus nybble_w4ka16_neonbf16(const NybbleLinearArgs* args) {
  return run_bf16<GroupTile, Bf16Nibbles, block_rows::w4ka16_neonbf16>(args);
}
