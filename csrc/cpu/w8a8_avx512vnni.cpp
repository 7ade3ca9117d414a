// y = (x codes . w codes) * act_scale * scale + bias; layout n16k4, activations as code + 128.
// Built on vpdpbusd. 12 rows by 32 columns keep 24 accumulators in registers; fewer rows take 64 columns. Bound by the
// multiply, and by memory up to 16 rows.
// Reaches 90 % of the multiply's peak at 256 x 4096 x 4096 on 2 cores of Zen 5.
#include "tile_avx512vnni.h"
// clang-format off
#include "tile_vnni.h"
// clang-format on

extern "C" NybbleStatus nybble_w8a8_avx512vnni(const NybbleLinearArgs* args) {
  return run_tiles<Tile8, block_rows::w8a8_avx512vnni>(args);
}
