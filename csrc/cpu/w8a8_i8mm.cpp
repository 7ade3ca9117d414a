// y = (x codes . w codes) * act_scale * scale + bias; layout n16k4, activations as codes.
// Built on smmla. 16 rows by 4 columns keep 16 accumulators in registers. Bound by smmla and the zips of the weights.
#include "tile_i8mm.h"
// clang-format off
#include "tile_mmla.h"
// clang-format on

extern "C" NybbleStatus nybble_w8a8_i8mm(const NybbleLinearArgs* args) {
  return run_tiles<PairTile8<Zipped<Signed>>, block_rows::w8a8_i8mm>(args);
}
