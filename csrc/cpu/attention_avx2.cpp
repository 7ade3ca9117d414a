// Attention, see tile_attention.h.
#include "tile_avx2.h"
// clang-format off
#include "tile_attention.h"
// clang-format on

extern "C" NybbleStatus nybble_attention_avx2(const NybbleAttentionArgs* args) { return attention(args); }
