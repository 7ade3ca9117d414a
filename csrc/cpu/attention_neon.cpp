// Attention, see tile_attention.h.
#include "tile_neon.h"
// clang-format off
#include "tile_attention.h"
// clang-format on

extern "C" NybbleStatus nybble_attention_neon(const NybbleAttentionArgs* args) { return attention(args); }
