// y = (x codes . w codes) * act_scale * scale + bias; layout gather8, activations as code + 128 in lines of 64 k.
// Built on tbl and tbx, which gather the activations of 16 nonzero weights from a window of 128, and sdot.
// Bound by tbl and tbx.
#include "tile_neondot.h"
// clang-format off
#include "tile_gather_neon.h"
// clang-format on

extern "C" NybbleStatus nybble_spw8a8_neondot_gather(const NybbleLinearArgs* args) {
  return run_gather<GatherTile, block_rows::spw8a8_neondot_gather>(args);
}
