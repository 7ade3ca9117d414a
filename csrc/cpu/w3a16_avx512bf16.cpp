// y = x ((u3 codes - zero_point) * scale)^T + bias, float activations; layout n16k32: planes of bits, which become
// lines of nibbles in the L1 cache, a group at a time. As w4a16_avx512bf16 otherwise.
#define NYBBLE_PLANES
#include "tile_avx512bf16.h"
// clang-format off
#include "tile_bf16_nibbles.h"
// clang-format on

extern "C" NybbleStatus nybble_w3a16_avx512bf16(const NybbleLinearArgs* args) {
  return args->zero_point || args->minimum
             ? run_tiles<GroupTile<Bf16Nibbles<false>>, block_rows::w3a16_avx512bf16>(args)
             : run_tiles<GroupTile<Bf16Nibbles<true>>, block_rows::w3a16_avx512bf16>(args);
}
