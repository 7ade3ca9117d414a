// y = x w^T + bias for up to 32 tokens a block: x bf16 or f16 (M, K), w 4 bits in frag4, scales by group of 32 to K.
//
// mma.sync m16n8k16 with the weights as the left operand; fp32 sums. Weights are unpacked to 16 bits once a block, and
// multiplied with all its tokens. Bound by the read of w up to some 32 tokens, then by mma.sync.
#include "launch.cuh"

using namespace nybble::cuda;

namespace {

// The registers of a lane hold the sums of 32 tokens.
template <class X>
int run(const NybbleCudaProduct& product, const NybbleCudaLaunch& how) {
  return how.token_groups == 2 ? launch<TilesOf<Frag4, X, 2>>(product, how)
                               : launch<TilesOf<Frag4, X, 4>>(product, how);
}

}  // namespace

extern "C" int nybble_w4a16_sm80_load(int32_t* clusters) {
  return load<TilesOf<Frag4, Bf16, 2>, TilesOf<Frag4, Bf16, 4>, TilesOf<Frag4, F16, 2>, TilesOf<Frag4, F16, 4>>(
      clusters);
}

extern "C" int nybble_w4a16_sm80(const NybbleCudaProduct* product, const NybbleCudaLaunch* how) {
  return how->x_dtype == NYBBLE_BF16 ? run<Bf16>(*product, *how) : run<F16>(*product, *how);
}
