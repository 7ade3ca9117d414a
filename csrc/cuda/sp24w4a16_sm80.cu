// y = x w^T + bias for up to 32 tokens a block: x bf16 or f16 (M, K), w 4 bits, two of each four inputs, in quads4,
// scales by group of 32, 64, 128 or K.
//
// mma.sp m16n8k32; as w4a16_sm80 otherwise. Bound by the read of w.
#include "launch.cuh"

using namespace nybble::cuda;

NYBBLE_KERNEL(sp24w4a16_sm80, TilesOf, Quads4Forms, Floats, 2, 4)
