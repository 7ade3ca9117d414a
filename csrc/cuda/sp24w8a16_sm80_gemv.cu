// y = (x w^T) * scale + bias for up to 8 tokens: x bf16 or f16 (M, K), w int8, 2:4-sparse in layout quads8, one scale
// per output.
//
// Built on mma.sp m16n8k32 with the weights as the left operand; otherwise like w8a16_sm80_gemv. 5 bits per weight: 4
// for codes, 1 for positions. Bound by reading w.
#include "launch.cuh"

using namespace nybble::cuda;

NYBBLE_KERNEL(sp24w8a16_sm80_gemv, StreamOf, Each<Quads8>, Floats, 1)
