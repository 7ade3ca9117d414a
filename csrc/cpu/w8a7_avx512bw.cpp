// y = (x codes . w codes) * act_scale * scale + bias; layout n16k4, activations of 7 bits as code + 64.
// Built on vpmaddubsw over 16 lanes, whose sums are widened once for two lines by vpmaddwd: five instructions for 128
// products, of which the three multiplies bound it.
// 1,190 GOP/s at 256 x 2048 x 2048 on 2 cores of Zen 5; never run on a CPU without VNNI.
#include "tile_avx512bw.h"
// clang-format off
#include "tile_maddubs.h"
// clang-format on

extern "C" NybbleStatus nybble_w8a7_avx512bw(const NybbleLinearArgs* args) {
  return args->large ? run_tiles<Tile7, block_rows::w8a7_avx512bw>(args) : NYBBLE_UNSUPPORTED;
}
