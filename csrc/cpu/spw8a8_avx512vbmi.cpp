// y = (x codes . w codes) * act_scale * scale + bias; layout mask8, activations as code + 128, for a few rows.
// Built on vpexpandb, which expands a line's values by its mask, and vpdpbusd. Bound by memory down to a density of
// 10 %, below that by the expansion.
#include "tile_avx512vbmi.h"
// clang-format off
#include "tile_mask.h"
// clang-format on

extern "C" NybbleStatus nybble_spw8a8_avx512vbmi(const NybbleLinearArgs* args) {
  return run_mask_tiles<TileMask8, block_rows::spw8a8_avx512vbmi>(args);
}
