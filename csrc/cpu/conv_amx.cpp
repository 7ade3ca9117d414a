// Rounds images, packs patches and finishes outputs of convolutions, and multiplies those whose patches are read where
// they lie by tiles, and those with a weight for each channel: see tile_conv.h, tile_depthwise.h, tile_direct_tiles.h
// and tile_pool.h.
#include "tile_avx512vnni.h"
// clang-format off
#include "tile_conv.h"
#include "tile_depthwise.h"
#include "tile_direct.h"
#include "tile_direct_tiles.h"
#include "tile_pool.h"
// clang-format on

extern "C" const NybbleConvKernels nybble_conv_amx = {extend_range, plan_sample, pixels,       fill, finish,
                                                      depthwise,    pool,        direct_tiles, 1};
