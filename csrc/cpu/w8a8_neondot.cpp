// y = (x codes . w codes) * act_scale * scale + bias; layout n16k4, activations as codes.
// Built on sdot by lane. 8 rows by 8 columns keep 16 accumulators in registers. Bound by sdot, and by memory at few
// rows.
#include "tile_neondot.h"
// clang-format off
#include "tile_dot.h"
// clang-format on

extern "C" NybbleStatus nybble_w8a8_neondot(const NybbleLinearArgs* args) {
  return run_tiles<Tile8, block_rows::w8a8_neondot>(args);
}
