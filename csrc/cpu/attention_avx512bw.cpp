// Attention, see tile_attention.h.
#include "tile_avx512bw.h"
// clang-format off
#include "tile_attention.h"
// clang-format on

extern "C" NybbleStatus nybble_attention_avx512bw(const NybbleAttentionArgs* args) { return attention(args); }
