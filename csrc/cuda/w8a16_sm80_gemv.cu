// y = (x w^T) * scale + bias for up to eight tokens: x bf16 or f16 (M, K), w int8 in rows8, a scale an output.
//
// As w4a16_sm80_gemv; the scale is applied to the whole sum. Bound by the read of w.
#include "launch.cuh"

using namespace nybble::cuda;

extern "C" int nybble_w8a16_sm80_gemv_load(int32_t* clusters) {
  return load<StreamOf<Rows8, Bf16>, StreamOf<Rows8, F16>>(clusters);
}

extern "C" int nybble_w8a16_sm80_gemv(const NybbleCudaProduct* product, const NybbleCudaLaunch* how) {
  return how->x_dtype == NYBBLE_BF16 ? launch<StreamOf<Rows8, Bf16>>(*product, *how)
                                     : launch<StreamOf<Rows8, F16>>(*product, *how);
}
