// y = sum_g scale_g * (x codes . u8 codes - zero_point * act_sum) * act_scale + bias; layout n16k4g,
// activations as 16-bit codes. Built on vpmaddwd over zero-extended codes. Bound by vpmaddwd + vpaddd: two instructions
// for 16 products; the float sums of a group spill.
#include "tile_avx2.h"
// clang-format off
#include "tile_madd.h"
// clang-format on

extern "C" NybbleStatus nybble_w8a8_avx2_groups(const NybbleLinearArgs* args) {
  return run_madd_groups<block_rows::w8a8_avx2_groups>(args);
}
