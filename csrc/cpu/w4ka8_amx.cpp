// y = sum_g (scale * first_g * (x codes . u4 codes) - minimum * second_g * act_sum_g) * act_scale + bias; layout n16k8
// with levels: a group of 32 has two numbers of 6 bits, a block of 8 groups a scale and a minimum.
// As w4a8_amx otherwise: bound by the scaling of groups. Of 32 x 512 x 4096 on 1 core of Emerald Rapids 1.1 times the
// speed of w4ka8_avx512vnni, which is faster for 17 to 27 rows.
#define NYBBLE_LEVELS
#include "tile_amx.h"
// clang-format off
#include "tile_amx_nibbles.h"
// clang-format on

extern "C" NybbleStatus nybble_w4ka8_amx(const NybbleLinearArgs* args) {
  return run_amx<Nibbles, block_rows::w4ka8_amx>(args);
}
