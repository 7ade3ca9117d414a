// y = x (u4 codes * (scale * first_g) - minimum * second_g)^T + bias, float activations; layout n16k8 with levels: a
// group of 32 has two numbers of 6 bits, a block of 8 groups a scale and a minimum.
// As w4a16_neon otherwise.
#define NYBBLE_LEVELS
#include "tile_neon.h"
// clang-format off
#include "tile_float_neon.h"
// clang-format on

extern "C" NybbleStatus nybble_w4ka16_neon(const NybbleLinearArgs* args) {
  return run_fixed<Nibble4, block_rows::w4ka16_neon>(args);
}
