// y = (x codes . w codes) * act_scale * scale + bias; layout n16k4, activations as 16-bit codes.
// Built on vpmaddwd. Bound by vpmaddwd + vpaddd: two instructions for 16 products.
// At 4096 x 4096, 88 % of the peak of that pair with 128 rows and 85 % with 1024, of 2 cores of Zen 5 held to AVX2.
#include "tile_avx2.h"
// clang-format off
#include "tile_madd.h"
// clang-format on

extern "C" NybbleStatus nybble_w8a8_avx2(const NybbleLinearArgs* args) { return run_madd<block_rows::w8a8_avx2>(args); }
