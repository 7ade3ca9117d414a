// y = x w^T + bias for up to 8 tokens: x bf16 or f16 (M, K), w 4 bits in layout frag4, one scale per group of 32, 64,
// 128 or K inputs.
//
// Built on mma.sync m16n8k16 with the weights as the left operand, so that tokens are padded to 8, not 16, and fp32
// accumulators. Code minus zero point is exact in 16 bits; sums are scaled in fp32. Split-K depends on N and K only, so
// results are deterministic and a token's result does not depend on its batch. Bound by reading w.
#include "launch.cuh"

using namespace nybble::cuda;

NYBBLE_KERNEL(w4a16_sm80_gemv, StreamOf, Frag4Forms, Floats, 1)
