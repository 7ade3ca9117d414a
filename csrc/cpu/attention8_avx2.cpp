// Attention with products of 8 bits, see tile_attention8.h.
#include "tile_avx2.h"
// clang-format off
#include "tile_attention8_words.h"
// clang-format on

extern "C" NybbleStatus nybble_attention8_avx2(const NybbleAttentionArgs* args) { return attention8(args); }
