// y = x w^T + bias for up to 32 tokens a block: x and w bf16, of w two of each four inputs, in quads16.
//
// mma.sp m16n8k32; as w4a16_sm80 otherwise. Bound by the read of w.
#include "launch.cuh"

NYBBLE_TILES(sp24w16a16_sm80, Quads16, Bf16)
