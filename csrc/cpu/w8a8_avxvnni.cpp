// y = (x codes . w codes) * act_scale * scale + bias; layout n16k4, activations as code + 128.
// Built on vpdpbusd over 8 lanes. 6 rows by 16 columns keep 12 accumulators in registers. Bound by the multiply, and by
// memory at few rows.
// Reaches 88 % of the multiply's peak at 256 x 4096 x 4096 on 2 cores of Zen 5.
#include "tile_avxvnni.h"
// clang-format off
#include "tile_vnni.h"
// clang-format on

extern "C" NybbleStatus nybble_w8a8_avxvnni(const NybbleLinearArgs* args) {
  return run_tiles<Tile8, block_rows::w8a8_avxvnni>(args);
}
