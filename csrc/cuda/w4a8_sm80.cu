// y = act_scale * (sum_g scale_g * sum_k q (n - z_g) - act_zero * weight_sum) + bias: q int8 codes of dynamically
// rounded activations, one scale and zero a token; n 4 bits in frag4.
//
// mma.sync m16n8k32, s8 x s8, of 16 (n - 8): two integer operations give four weights. int32 sums of 32 products,
// exact, then fp32 in one order. quantize_kernel rounds the activations first, into the order in which the tiles read
// them. Bound by the read of w up to some 64 tokens, then by the multiplies.
#include "launch.cuh"
#include "quantize.cuh"

using namespace nybble::cuda;

extern "C" int nybble_w4a8_sm80_load(int32_t* clusters) {
  return load<TilesOf<Frag4, S8, 1>, TilesOf<Frag4, S8, 2>, TilesOf<Frag4, S8, 4>>(clusters);
}

extern "C" int nybble_w4a8_sm80(const NybbleCudaProduct* product, const NybbleCudaLaunch* how) {
  switch (how->token_groups) {
    case 1:
      return launch<TilesOf<Frag4, S8, 1>>(*product, *how);
    case 2:
      return launch<TilesOf<Frag4, S8, 2>>(*product, *how);
    default:
      return launch<TilesOf<Frag4, S8, 4>>(*product, *how);
  }
}

extern "C" int nybble_quantize_rows(const NybbleCudaRows* rows, void* stream) {
  quantize_kernel<<<rows->m, kThreads, 3 * kThreads * sizeof(float), static_cast<cudaStream_t>(stream)>>>(*rows);
  return cudaGetLastError();
}
