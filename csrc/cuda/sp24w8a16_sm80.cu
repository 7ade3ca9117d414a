// y = (x w^T) * scale + bias for up to 32 tokens per block: x bf16 or f16 (M, K), w int8, 2:4-sparse in layout quads8,
// one scale per output.
//
// Built on mma.sp m16n8k32; otherwise like w8a16_sm80. Bound by reading w.
#include "launch.cuh"

using namespace nybble::cuda;

NYBBLE_KERNEL(sp24w8a16_sm80, TilesOf, Each<Quads8>, Floats, 2, 4)
