// int8 multiplies with tdpbssd: 16 x 16 sums of 64 products. Never run on a CPU with AMX: on Sapphire Rapids, by its
// manual, one such multiply takes 16 cycles, 2048 operations each.
#include "tiles.h"

extern "C" uint64_t nybble_probe_int8_amx(const void*, uint64_t rounds) {
  return multiply_in_tiles<CodesOp, 4>(rounds);
}
