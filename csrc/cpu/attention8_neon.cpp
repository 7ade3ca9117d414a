// Attention with products of 8 bits, see tile_attention8.h.
#include "tile_mull.h"
// clang-format off
#include "tile_attention8_dots.h"
// clang-format on

extern "C" NybbleStatus nybble_attention8_neon(const NybbleAttentionArgs* args) { return attention8(args); }
