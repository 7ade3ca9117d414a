// y = act_scale * (sum_g scale_g * sum_k q (n - z_g) - act_zero * weight_sum) + bias for up to 64 tokens: q int8 codes
// of dynamically rounded activations, one scale and zero a token; n 4 bits in frag4.
//
// mma.sync m16n8k32, s8 x s8, of 16 (n - 8): six integer operations give 16 weights. int32 sums of up to 128 products,
// exact, are converted once and added in fp32 in one order. quantize_kernel rounds the activations first, into the
// order in which the tiles read them. Bound by the read of w up to some 32 tokens, then by the multiplies.
#include "launch.cuh"
#include "quantize.cuh"

using namespace nybble::cuda;

NYBBLE_KERNEL(w4a8_sm80, TilesOf, Frag4FormsS8, Each<S8>, 1, 2, 4, 8)

// Of every kernel whose activations are 8-bit codes.
extern "C" int nybble_quantize_rows(const NybbleCudaRows* rows, void* stream) {
  return launch_plain(&quantize_kernel, dim3(rows->m), 3 * kThreads * sizeof(float), static_cast<cudaStream_t>(stream),
                      *rows);
}
