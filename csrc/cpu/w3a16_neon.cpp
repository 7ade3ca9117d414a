// y = x ((u3 codes - zero_point) * scale)^T + bias, float activations; layout n16k32: planes of bits, which become
// lines of nibbles in the L1 cache, a group at a time. As w4a16_neon otherwise.
#define NYBBLE_PLANES
#include "tile_neon.h"
// clang-format off
#include "tile_float_neon.h"
// clang-format on

extern "C" NybbleStatus nybble_w3a16_neon(const NybbleLinearArgs* args) {
  return run_fixed<Nibble4, block_rows::w3a16_neon>(args);
}
