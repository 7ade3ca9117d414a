// y = x w^T + bias for up to 32 tokens a block: x bf16 or f16 (M, K), w 4 bits in frag4, scales by group of 32 to K.
//
// mma.sync m16n8k16 with the weights as the left operand; fp32 sums. Weights are unpacked to 16 bits once a block, and
// multiplied with all its tokens. Bound by the read of w up to some 32 tokens, then by mma.sync.
#include "launch.cuh"

NYBBLE_TILES(w4a16_sm80, Frag4, F16)
