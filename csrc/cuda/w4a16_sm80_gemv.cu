// y = x w^T + bias for up to eight tokens: x bf16 or f16 (M, K), w 4 bits in frag4, scales by group of 32, 64, 128 or
// K.
//
// mma.sync m16n8k16 with the weights as the left operand, so that tokens are padded to 8, not 16; fp32 sums. The code
// less its zero point is exact in 16 bits; a half tile's sum is scaled in fp32. K is split by N and K alone:
// deterministic, and a token's result does not depend on its batch. Bound by the read of w.
#include "launch.cuh"

using namespace nybble::cuda;

NYBBLE_KERNEL(w4a16_sm80_gemv, StreamOf, Frag4Forms, Floats, 1)
