// y = x w^T + bias for up to eight tokens: x and w bf16, of w two of each four inputs, in quads16.
//
// mma.sp m16n8k32 with the weights as the left operand; as w4a16_sm80_gemv otherwise. A weight takes 9 bits. Bound by
// the read of w.
#include "launch.cuh"

using namespace nybble::cuda;

NYBBLE_KERNEL(sp24w16a16_sm80_gemv, StreamOf, Each<Quads16>, Each<Bf16>, 1)
