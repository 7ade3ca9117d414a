// y = x w^T + bias for 9 to 192 tokens: x bf16 or f16 (M, K), w 4 bits in layout frag4, one scale per group of 32, 64,
// 128 or K inputs.
//
// Built on mma.sync m16n8k16 with the weights as the left operand and fp32 accumulators. Weights are unpacked to 16
// bits once per block of up to 64 tokens. Bound by reading w up to about 32 tokens, then by mma.sync.
#include "launch.cuh"

using namespace nybble::cuda;

NYBBLE_KERNEL(w4a16_sm80, TilesOf, Frag4Forms, Floats, 2, 4, 8)
