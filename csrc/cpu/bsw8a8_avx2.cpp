// y = (x codes . w codes) * act_scale * scale + bias; layout blocks8, activations as 16-bit codes.
// Built on vpmaddwd, with the register tile of w8a8 over the stored blocks. Bound by vpmaddwd + vpaddd: two
// instructions for 16 products.
#include "tile_avx2.h"
// clang-format off
#include "tile_madd.h"
#include "tile_blocks.h"
// clang-format on

extern "C" NybbleStatus nybble_bsw8a8_avx2(const NybbleLinearArgs* args) {
  return run_blocks<Tile8, block_rows::bsw8a8_avx2>(args);
}
