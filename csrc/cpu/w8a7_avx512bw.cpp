// y = (x codes . w codes) * act_scale * scale + bias; layout n16k4, activations of 7 bits as code + 64.
// Built on vpmaddubsw, vpmaddwd and vpaddd over 16 lanes, which bound it: three instructions for 64 products.
// Reaches 96 % of the multiply's peak at 1024 x 4096 x 4096 on 2 cores of Zen 5; never run on a CPU without VNNI.
#include "tile_avx512bw.h"
// clang-format off
#include "tile_maddubs.h"
// clang-format on

extern "C" NybbleStatus nybble_w8a7_avx512bw(const NybbleLinearArgs* args) {
  return run_tiles<Tile7, block_rows::w8a7_avx512bw>(args);
}
