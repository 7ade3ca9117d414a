// Attention with products of 8 bits, see tile_attention8.h.
#include "tile_i8mm.h"
// clang-format off
#include "tile_attention8_bytes.h"
// clang-format on

extern "C" NybbleStatus nybble_attention8_i8mm(const NybbleAttentionArgs* args) { return attention8(args); }
