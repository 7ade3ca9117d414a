// y = (x w^T) * scale + bias for up to 32 tokens a block: x bf16 or f16 (M, K), w int8 in rows8, a scale an output.
//
// As w4a16_sm80; the scale is applied to the whole sum.
#include "launch.cuh"

using namespace nybble::cuda;

namespace {

// The registers of a lane hold the sums of 32 tokens.
template <class X>
int run(const NybbleCudaProduct& product, const NybbleCudaLaunch& how) {
  return how.token_groups == 2 ? launch<TilesOf<Rows8, X, 2>>(product, how)
                               : launch<TilesOf<Rows8, X, 4>>(product, how);
}

}  // namespace

extern "C" int nybble_w8a16_sm80_load(int32_t* clusters) {
  return load<TilesOf<Rows8, Bf16, 2>, TilesOf<Rows8, Bf16, 4>, TilesOf<Rows8, F16, 2>, TilesOf<Rows8, F16, 4>>(
      clusters);
}

extern "C" int nybble_w8a16_sm80(const NybbleCudaProduct* product, const NybbleCudaLaunch* how) {
  return how->x_dtype == NYBBLE_BF16 ? run<Bf16>(*product, *how) : run<F16>(*product, *how);
}
