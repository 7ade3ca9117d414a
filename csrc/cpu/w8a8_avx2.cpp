// y = (x codes . w codes) * act_scale * scale + bias; layout n16k4, activations as 16-bit codes.
// Built on vpmaddwd. Bound by vpmaddwd + vpaddd: two instructions for 16 products.
// Reaches 82 % of the multiply's peak at 256 x 4096 x 4096 on 2 cores of Zen 5.
#include "tile_avx2.h"
// clang-format off
#include "tile_madd.h"
// clang-format on

extern "C" NybbleStatus nybble_w8a8_avx2(const NybbleLinearArgs* args) { return run_tiles<Tile8, 6>(args); }
