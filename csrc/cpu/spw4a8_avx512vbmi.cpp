// y = sum_g scale_g * (x codes . u4 codes - 8 * act_sum) * act_scale + bias; layout mask4, for a few rows.
// Built on vpexpandb, which expands a line's nibbles by its masks, and vpdpbusd. Bound by the expansion.
#include "tile_avx512vbmi.h"
// clang-format off
#include "tile_mask.h"
// clang-format on

extern "C" NybbleStatus nybble_spw4a8_avx512vbmi(const NybbleLinearArgs* args) {
  return run_mask_tiles<TileMask4, block_rows::spw4a8_avx512vbmi>(args);
}
