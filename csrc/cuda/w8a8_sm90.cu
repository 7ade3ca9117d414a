// y = (q w^T - act_zero * column_sum) * (act_scale * scale) + bias for many tokens: q int8 activation codes (M,
// k_padded), quantized dynamically with one scale and zero point per token; w int8 in layout rows8, one scale per
// output.
//
// Built on wgmma m64n256k32 or m64n128k32, s8 x s8, both operands in shared memory, in tiles of 128 tokens x 256 or 128
// outputs. int32 sums are exact: bit-identical to the other w8a8 kernels. The TMA fills a ring of stages of 128 inputs;
// one step's wgmma is always in flight while the next is issued. Bound by wgmma and by the L2 cache: per 1024 clocks of
// wgmma, a multiprocessor reads 32 KiB for wide tiles and 48 KiB for narrow ones (48 and 64 KiB without multicast).
#include "w8a8_sm90.cuh"

#include "hopper_launch.cuh"

using namespace nybble::cuda;

namespace {

template <class T, int Dtype>
int load(NybbleCudaInstance& found) {
  char name[sizeof found.name];
  std::snprintf(name, sizeof name, "y%d tokens%d outputs%d", Dtype, T::kTokens, T::kOutputs);
  return load_instance(w8a8_sm90_kernel<T, Dtype>, T::kThreads, T::kShared, T::kTokens / kTokens, name, found);
}

template <class T>
cudaError_t run(const NybbleCudaProduct& p, int at_once, void* stream) {
  CUtensorMap x, w;
  cudaError_t error = map_codes(&x, p.x, p.m, p.k_padded, T::kTokens);
  if (error == cudaSuccess) error = map_codes(&w, p.codes, p.n_padded, p.k_padded, T::kShare);
  if (error != cudaSuccess) return error;
  const auto kernel = p.y_dtype == NYBBLE_F32    ? w8a8_sm90_kernel<T, NYBBLE_F32>
                      : p.y_dtype == NYBBLE_BF16 ? w8a8_sm90_kernel<T, NYBBLE_BF16>
                                                 : w8a8_sm90_kernel<T, NYBBLE_F16>;
  const int64_t pairs = std::min<int64_t>(w8a8_tiles<T>(p).count, at_once);
  return launch_pairs(kernel, pairs, T::kThreads, T::kShared, stream, p, x, w);
}

using Wide = W8A8<256>;
using Narrow = W8A8<128>;

}  // namespace

extern "C" int nybble_w8a8_sm90_load(NybbleCudaInstance* found, int32_t most, int32_t* count) {
  *count = 0;
  for (const auto each : {load<Wide, NYBBLE_F32>, load<Wide, NYBBLE_BF16>, load<Wide, NYBBLE_F16>,
                          load<Narrow, NYBBLE_F32>, load<Narrow, NYBBLE_BF16>, load<Narrow, NYBBLE_F16>})
    if (*count < most)
      if (const int error = each(found[(*count)++])) return error;
  return cudaSuccess;
}

extern "C" int nybble_w8a8_sm90(const NybbleCudaProduct* product, const NybbleCudaLaunch* how) {
  const NybbleCudaProduct& p = *product;
  int at_once = 0;
  const cudaError_t error = count_pairs(&at_once);
  if (error != cudaSuccess) return error;
  // An estimate, not measured: a narrow tile has half the wgmma work and reads three quarters of the bytes.
  const bool wide = time_of(w8a8_tiles<Wide>(p).count, at_once, 4) <= time_of(w8a8_tiles<Narrow>(p).count, at_once, 3);
  return wide ? run<Wide>(p, at_once, how->stream) : run<Narrow>(p, at_once, how->stream);
}
