// y = (x codes . w codes) * act_scale * scale + bias; layout blocks8, activations as code + 128.
// Built on vpdpbusd, with the register tile of w8a8 over the blocks that are stored. Bound by the multiply, and by
// memory up to 16 rows.
#include "tile_avx512vnni.h"
// clang-format off
#include "tile_vnni.h"
#include "tile_blocks.h"
// clang-format on

extern "C" NybbleStatus nybble_bsw8a8_avx512vnni(const NybbleLinearArgs* args) {
  return run_blocks<BlockTile<Tile8>, 12>(args);
}
