// Attention with products of 8 bits, see tile_attention8.h.
#include "tile_avxvnni.h"
// clang-format off
#include "tile_attention8_bytes.h"
// clang-format on

extern "C" NybbleStatus nybble_attention8_avxvnni(const NybbleAttentionArgs* args) { return attention8(args); }
