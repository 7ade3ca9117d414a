// y = x w^T + bias for up to 8 tokens: x bf16 or f16 (M, K), w 4 bits, 2:4-sparse in layout quads4, one scale per group
// of 32, 64, 128 or K inputs.
//
// Built on mma.sp m16n8k32 with the weights as the left operand; otherwise like w4a16_sm80_gemv. 3 bits per weight,
// plus scales. Bound by reading w.
#include "launch.cuh"

using namespace nybble::cuda;

NYBBLE_KERNEL(sp24w4a16_sm80_gemv, StreamOf, Quads4Forms, Floats, 1)
