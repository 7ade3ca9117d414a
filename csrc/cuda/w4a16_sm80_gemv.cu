// y = x w^T + bias for up to eight tokens: x bf16 or f16 (M, K), w 4 bits in frag4, scales by group of 32, 64, 128 or
// K.
//
// mma.sync m16n8k16 with the weights as the left operand, so that tokens are padded to 8, not 16; fp32 sums. The code
// less its zero point is exact in 16 bits; a half tile's sum is scaled in fp32. K is split by N and K alone:
// deterministic, and a token's result does not depend on its batch. Bound by the read of w.
#include "launch.cuh"

using namespace nybble::cuda;

extern "C" int nybble_w4a16_sm80_gemv_load(int32_t* clusters) {
  return load<StreamOf<Frag4, Bf16>, StreamOf<Frag4, F16>>(clusters);
}

extern "C" int nybble_w4a16_sm80_gemv(const NybbleCudaProduct* product, const NybbleCudaLaunch* how) {
  return how->x_dtype == NYBBLE_BF16 ? launch<StreamOf<Frag4, Bf16>>(*product, *how)
                                     : launch<StreamOf<Frag4, F16>>(*product, *how);
}
