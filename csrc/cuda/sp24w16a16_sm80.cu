// y = x w^T + bias for up to 32 tokens a block: x and w bf16, of w two of each four inputs, in quads16.
//
// mma.sp m16n8k32; as w4a16_sm80 otherwise. Bound by the read of w.
#include "launch.cuh"

using namespace nybble::cuda;

NYBBLE_KERNEL(sp24w16a16_sm80, TilesOf, Each<Quads16>, Each<Bf16>, 2, 4)
