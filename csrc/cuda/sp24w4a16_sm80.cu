// y = x w^T + bias for up to 32 tokens per block: x bf16 or f16 (M, K), w 4 bits, 2:4-sparse in layout quads4, one
// scale per group of 32, 64, 128 or K inputs.
//
// Built on mma.sp m16n8k32; otherwise like w4a16_sm80. Bound by reading w.
#include "launch.cuh"

using namespace nybble::cuda;

NYBBLE_KERNEL(sp24w4a16_sm80, TilesOf, Quads4Forms, Floats, 2, 4)
