// y = (x codes . w codes) * act_scale * scale + bias; layout blocks8, activations as 16-bit codes.
// Built on vpmaddwd over 16 lanes, with the register tile of w8a8 over the stored blocks. Bound by vpmaddwd + vpaddd:
// two instructions for 32 products.
#include "tile_avx512bw.h"
// clang-format off
#include "tile_madd.h"
#include "tile_blocks.h"
// clang-format on

extern "C" NybbleStatus nybble_bsw8a8_avx512bw(const NybbleLinearArgs* args) {
  return run_blocks<Tile8, block_rows::bsw8a8_avx512bw>(args);
}
