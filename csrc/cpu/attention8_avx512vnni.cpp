// Attention with products of 8 bits, see tile_attention8.h.
#include "tile_avx512vnni.h"
// clang-format off
#include "tile_attention8_bytes.h"
// clang-format on

extern "C" NybbleStatus nybble_attention8_avx512vnni(const NybbleAttentionArgs* args) { return attention8(args); }
