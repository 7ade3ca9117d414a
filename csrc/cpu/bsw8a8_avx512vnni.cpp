// y = (x codes . w codes) * act_scale * scale + bias; layout blocks8, activations as code + 128.
// Built on vpdpbusd, with the register tile of w8a8 over the stored blocks. Bound by the multiply, and by memory up to
// 16 rows. At one or two rows blocks are read in storage order; at more, the next block's activations are prefetched.
// Compared with w8a8 at 4096 x 4096, with 50 / 75 / 90 % of the 32 x 32 blocks zero, on 2 cores of Zen 5: 1.9 / 3.5 /
// 7.5 times as fast at 256 rows (at 90 %, quantizing activations and storing bfloat16 outputs take a quarter of the
// time); at one row 0.91 / 0.86 / 0.78 of the ratio of bytes read, because of 6 us overhead per call.
#include "tile_avx512vnni.h"
// clang-format off
#include "tile_vnni.h"
#include "tile_blocks.h"
// clang-format on

extern "C" NybbleStatus nybble_bsw8a8_avx512vnni(const NybbleLinearArgs* args) {
  return run_blocks<Tile8, block_rows::bsw8a8_avx512vnni>(args);
}
