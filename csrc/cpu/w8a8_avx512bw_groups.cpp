// y = sum_g scale_g * (x codes . u8 codes - zero_point * act_sum) * act_scale + bias; layout n16k4g,
// activations as 16-bit codes. Built on vpmaddwd over 16 lanes. Bound by vpmaddwd + vpaddd: two instructions for 32
// products.
#include "tile_avx512bw.h"
// clang-format off
#include "tile_madd.h"
// clang-format on

extern "C" NybbleStatus nybble_w8a8_avx512bw_groups(const NybbleLinearArgs* args) {
  return run_madd_groups<block_rows::w8a8_avx512bw_groups>(args);
}
