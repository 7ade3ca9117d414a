// y = sum_g scale_g * (x . (u3 codes - zero_point)) + bias, bfloat16 activations as lines; layout n16k32: planes of
// bits, which become lines of nibbles in the L1 cache, a group at a time. As w4a16_amx otherwise.
#define NYBBLE_PLANES
#include "tile_amx.h"
// clang-format off
#include "tile_amx_pairs.h"
// clang-format on

extern "C" NybbleStatus nybble_w3a16_amx(const NybbleLinearArgs* args) {
  return args->zero_point ? run_amx<NibblePairs<Bf16Nibbles<false>>, block_rows::w3a16_amx>(args)
                          : run_amx<NibblePairs<Bf16Nibbles<true>>, block_rows::w3a16_amx>(args);
}
