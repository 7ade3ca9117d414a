// y = (x w^T) * scale + bias for up to 32 tokens a block: x bf16 or f16 (M, K), w int8, two of each four inputs, in
// quads8, a scale an output.
//
// mma.sp m16n8k32; as w8a16_sm80 otherwise. Bound by the read of w.
#include "launch.cuh"

using namespace nybble::cuda;

NYBBLE_KERNEL(sp24w8a16_sm80, TilesOf, Each<Quads8>, Floats, 2, 4)
