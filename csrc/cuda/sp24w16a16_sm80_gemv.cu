// y = x w^T + bias for up to 8 tokens: x and w bf16, w 2:4-sparse in layout quads16.
//
// Built on mma.sp m16n8k32 with the weights as the left operand; otherwise like w4a16_sm80_gemv. 9 bits per weight.
// Bound by reading w.
#include "launch.cuh"

using namespace nybble::cuda;

NYBBLE_KERNEL(sp24w16a16_sm80_gemv, StreamOf, Each<Quads16>, Each<Bf16>, 1)
