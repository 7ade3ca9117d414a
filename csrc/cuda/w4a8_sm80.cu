// y = act_scale * (sum_g scale_g * sum_k q (n - z_g) - act_zero * weight_sum) + bias for up to 64 tokens: q int8
// activation codes, quantized dynamically with one scale and zero point per token; n 4-bit weight codes in layout
// frag4.
//
// Built on mma.sync m16n8k32, s8 x s8. Weights with zero point 8 are unpacked to 16 (n - 8), 16 of them in six integer
// operations. Exact int32 sums of up to 128 products are converted to fp32 and added in a fixed order. quantize_kernel
// first quantizes the activations, in the order in which the tiles read them. Bound by reading w up to about 32 tokens,
// then by the multiplies.
#include "launch.cuh"
#include "quantize.cuh"

using namespace nybble::cuda;

NYBBLE_KERNEL(w4a8_sm80, TilesOf, Frag4FormsS8, Each<S8>, 1, 2, 4, 8)

// Used by all kernels with 8-bit activations.
extern "C" int nybble_quantize_rows(const NybbleCudaRows* rows, void* stream) {
  return launch_plain(&quantize_kernel, dim3(rows->m), 3 * kThreads * sizeof(float), static_cast<cudaStream_t>(stream),
                      *rows);
}
