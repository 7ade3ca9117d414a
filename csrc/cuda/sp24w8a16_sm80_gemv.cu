// y = (x w^T) * scale + bias for up to eight tokens: x bf16 or f16 (M, K), w int8, two of each four inputs, in quads8,
// a scale an output.
//
// mma.sp m16n8k32 with the weights as the left operand; as w8a16_sm80_gemv otherwise. A weight takes 5 bits, 4 of them
// its code's half and one its place's. Bound by the read of w.
#include "launch.cuh"

using namespace nybble::cuda;

NYBBLE_KERNEL(sp24w8a16_sm80_gemv, StreamOf, Each<Quads8>, Floats, 1)
