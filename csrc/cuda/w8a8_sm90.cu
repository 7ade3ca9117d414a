// y = (q w^T - act_zero * column_sum) * (act_scale * scale) + bias for many tokens: q int8 codes of dynamically rounded
// activations (M, k_padded), one scale and zero a token; w int8 in rows8, a scale an output.
//
// wgmma m64n256k32, s8 x s8, both operands from shared memory, in tiles of 128 tokens x 256 outputs; int32 sums, exact:
// the bits of the other w8a8 kernels. A ring of four stages of 128 inputs, 48 KiB each, filled by the TMA; one step's
// wgmma is always under way while the next is issued. Bound by wgmma, then by the second-level cache: a tile reads 48
// bytes for each 1024 clocks of wgmma and multiprocessor.
#include "w8a8_sm90.cuh"

#include "hopper_launch.cuh"

using namespace nybble::cuda;

namespace {

template <int Dtype>
cudaError_t load_one() {
  return cudaFuncSetAttribute(w8a8_sm90_kernel<Dtype>, cudaFuncAttributeMaxDynamicSharedMemorySize, W8A8::kShared);
}

}  // namespace

extern "C" int nybble_w8a8_sm90_load(int32_t* clusters) {
  *clusters = 0;
  for (const auto load : {load_one<NYBBLE_F32>, load_one<NYBBLE_BF16>, load_one<NYBBLE_F16>})
    if (const cudaError_t error = load()) return error;
  return cudaSuccess;
}

extern "C" int nybble_w8a8_sm90(const NybbleCudaProduct* product, const NybbleCudaLaunch* how) {
  const NybbleCudaProduct& p = *product;
  CUtensorMap x, w;
  unsigned blocks = 0;
  cudaError_t error = map_codes(&x, p.x, p.m, p.k_padded, W8A8::kTokens);
  if (error == cudaSuccess) error = map_codes(&w, p.codes, p.n_padded, p.k_padded, W8A8::kOutputs);
  if (error == cudaSuccess) error = persistent_blocks(w8a8_tiles(p).count, &blocks);
  if (error != cudaSuccess) return error;
  const auto kernel = p.y_dtype == NYBBLE_F32    ? w8a8_sm90_kernel<NYBBLE_F32>
                      : p.y_dtype == NYBBLE_BF16 ? w8a8_sm90_kernel<NYBBLE_BF16>
                                                 : w8a8_sm90_kernel<NYBBLE_F16>;
  kernel<<<blocks, W8A8::kThreads, W8A8::kShared, static_cast<cudaStream_t>(how->stream)>>>(p, x, w);
  return cudaGetLastError();
}
