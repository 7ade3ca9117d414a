// Rounds images, packs patches and finishes outputs of convolutions, and
// multiplies those with a weight for each channel: see tile_conv.h,
// tile_depthwise.h and tile_pool.h.
#include "tile_neon.h"
// clang-format off
#include "tile_conv.h"
#include "tile_depthwise.h"
#include "tile_pool.h"
// clang-format on

extern "C" const NybbleConvKernels nybble_conv_neon = {extend_range, plan_sample, pixels,  fill, finish,
                                                       depthwise,    pool,        nullptr, 0};
