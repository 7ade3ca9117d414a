// y = sum_g scale_g * (x . (u3 codes - zero_point)) + bias, bfloat16 activations; layout n16k32: planes of bits, which
// become lines of nibbles in the L1 cache, a group at a time. As w4a16_neonbf16 otherwise.
#define NYBBLE_PLANES
#include "tile_neonbf16.h"
// clang-format off
#include "tile_bfmmla.h"
// clang-format on

extern "C" NybbleStatus nybble_w3a16_neonbf16(const NybbleLinearArgs* args) {
  return run_bf16<GroupTile, Bf16Nibbles, block_rows::w3a16_neonbf16>(args);
}
