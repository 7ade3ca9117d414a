// y = x w^T + bias for up to eight tokens: x bf16 or f16 (M, K), w 4 bits, two of each four inputs, in quads4, scales
// by group of 32, 64, 128 or K.
//
// mma.sp m16n8k32 with the weights as the left operand; as w4a16_sm80_gemv otherwise. A weight takes 3 bits and its
// share of a scale. Bound by the read of w.
#include "launch.cuh"

using namespace nybble::cuda;

NYBBLE_KERNEL(sp24w4a16_sm80_gemv, StreamOf, Quads4Forms, Floats, 1)
