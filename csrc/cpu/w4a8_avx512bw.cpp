// y = sum_g scale_g * (x codes . u4 codes - zero_point * act_sum) * act_scale + bias; layout n16k8.
// Built on vpmaddubsw over 16 lanes with the nibble as the unsigned operand; vpmaddwd widens only every eighth sum.
// Bound by vpmaddubsw + vpaddw: two instructions for 64 products.
// Reaches 70 % of the multiply's peak at 1024 x 4096 x 4096 with groups of 128 on 2 cores of Zen 5; never run on a CPU
// without VNNI.
#include "tile_avx512bw.h"
// clang-format off
#include "tile_maddubs.h"
// clang-format on

extern "C" NybbleStatus nybble_w4a8_avx512bw(const NybbleLinearArgs* args) {
  return run_nibbles<block_rows::w4a8_avx512bw>(args);
}
