// bf16 multiplies with tdpbf16ps: 16 x 16 sums of 32 products. Never run on a CPU with AMX: on Sapphire Rapids, by its
// manual, one such multiply takes 16 cycles, 1024 operations each.
#include "tiles.h"

extern "C" uint64_t nybble_probe_bf16_amx(const void*, uint64_t rounds) { return multiply_in_tiles<Bf16Op, 2>(rounds); }
