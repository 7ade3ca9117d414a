// y = x (s8 codes)^T * scale + bias, bfloat16 activations; layout n16k4. Codes are exact in bfloat16, so only the
// float32 sums are rounded. Built on bfmmla: 8 rows by 8 columns keep 16 accumulators in registers. Bound by widening,
// 13 instructions for 16 weights; decoded once for many rows, by bfmmla.
#include "tile_neonbf16.h"
// clang-format off
#include "tile_bfmmla.h"
// clang-format on

extern "C" NybbleStatus nybble_w8a16_neonbf16(const NybbleLinearArgs* args) {
  return run_bf16<ColumnsTile, Bf16Signed, block_rows::w8a16_neonbf16>(args);
}
