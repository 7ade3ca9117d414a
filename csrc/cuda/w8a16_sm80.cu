// y = (x w^T) * scale + bias for 9 to 192 tokens: x bf16 or f16 (M, K), w int8 (N, K) in layout rows8, one scale per
// output.
//
// Built on mma.sync m16n8k16 like w4a16_sm80; codes are widened to 16 bits once per block of up to 64 tokens.
#include "launch.cuh"

using namespace nybble::cuda;

NYBBLE_KERNEL(w8a16_sm80, TilesOf, Each<Rows8>, Floats, 2, 4, 8)
