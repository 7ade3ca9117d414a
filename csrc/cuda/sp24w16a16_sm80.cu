// y = x w^T + bias for up to 32 tokens per block: x and w bf16, w 2:4-sparse in layout quads16.
//
// Built on mma.sp m16n8k32; otherwise like w4a16_sm80. Bound by reading w.
#include "launch.cuh"

using namespace nybble::cuda;

NYBBLE_KERNEL(sp24w16a16_sm80, TilesOf, Each<Quads16>, Each<Bf16>, 2, 4)
