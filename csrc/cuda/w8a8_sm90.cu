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

using Wide = W8A8<256>;
using Narrow = W8A8<128>;

template <class T, int Dtype>
int load(NybbleCudaInstance& found) {
  char name[sizeof found.name];
  std::snprintf(name, sizeof name, "y%d tokens%d outputs%d", Dtype, T::kTokens, T::kOutputs);
  return load_instance(w8a8_sm90_kernel<T, Dtype>, T::kThreads, T::kShared, T::kTokens / kTokens, name, found);
}

constexpr int (*kLoads[])(NybbleCudaInstance&) = {load<Wide, NYBBLE_F32>,    load<Wide, NYBBLE_BF16>,
                                                  load<Wide, NYBBLE_F16>,    load<Narrow, NYBBLE_F32>,
                                                  load<Narrow, NYBBLE_BF16>, load<Narrow, NYBBLE_F16>};

template <class T>
cudaError_t run(const NybbleCudaProduct& p, void* stream, int multiprocessors) {
  CUtensorMap x, w;
  cudaError_t error = map_codes(&x, p.x, p.m, p.k_padded, T::kTokens);
  if (error == cudaSuccess) error = map_codes(&w, p.codes, p.n_padded, p.k_padded, T::kOutputs);
  if (error != cudaSuccess) return error;
  const auto blocks = static_cast<unsigned>(std::min<int64_t>(w8a8_tiles<T>(p).count, multiprocessors));
  const auto kernel = p.y_dtype == NYBBLE_F32    ? w8a8_sm90_kernel<T, NYBBLE_F32>
                      : p.y_dtype == NYBBLE_BF16 ? w8a8_sm90_kernel<T, NYBBLE_BF16>
                                                 : w8a8_sm90_kernel<T, NYBBLE_F16>;
  kernel<<<blocks, T::kThreads, T::kShared, static_cast<cudaStream_t>(stream)>>>(p, x, w);
  return cudaGetLastError();
}

// Clocks that the tiles which a multiprocessor takes in turn cost, in those of a narrow one. A wide one multiplies
// twice as much, but reads three quarters as much for it, which narrow ones wait for.
int64_t cost(int64_t tiles, int multiprocessors, int of_one) {
  return (tiles + multiprocessors - 1) / multiprocessors * of_one;
}

}  // namespace

extern "C" int nybble_w8a8_sm90_load(NybbleCudaInstance* found, int32_t most, int32_t* count) {
  *count = 0;
  for (const auto each : kLoads)
    if (*count < most)
      if (const int error = each(found[(*count)++])) return error;
  return cudaSuccess;
}

extern "C" int nybble_w8a8_sm90(const NybbleCudaProduct* product, const NybbleCudaLaunch* how) {
  int multiprocessors = 0;
  const cudaError_t error = count_multiprocessors(&multiprocessors);
  if (error != cudaSuccess) return error;
  const bool wide = cost(w8a8_tiles<Wide>(*product).count, multiprocessors, 7) <=
                    cost(w8a8_tiles<Narrow>(*product).count, multiprocessors, 4);
  return wide ? run<Wide>(*product, how->stream, multiprocessors) : run<Narrow>(*product, how->stream, multiprocessors);
}
