// y = x w^T + bias for 9 to 192 tokens: x bf16 or f16 (M, K), w 4 bits in frag4, scales by group of 32 to K.
//
// mma.sync m16n8k16 with the weights as the left operand; fp32 sums. Weights are unpacked to 16 bits once for a block
// of up to 64 tokens. Bound by the read of w up to some 32 tokens, then by mma.sync.
#include "launch.cuh"

using namespace nybble::cuda;

NYBBLE_KERNEL(w4a16_sm80, TilesOf, Frag4Forms, Floats, 2, 4, 8)
