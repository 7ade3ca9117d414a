// y = (q w^T - act_zero * column_sum) * (act_scale * scale) + bias for many tokens: q int8 codes of dynamically rounded
// activations (M, k_padded), one scale and zero a token; w int8 in rows8, a scale an output.
//
// wgmma m64n256k32 or m64n128k32, s8 x s8, both operands from shared memory, in tiles of 128 tokens x 256 or 128
// outputs; int32 sums, exact: the bits of the other w8a8 kernels. A ring of stages of 128 inputs is filled by the TMA;
// one step's wgmma is always under way while the next is issued. Bound by wgmma and by the second-level cache: for 1024
// clocks of wgmma a multiprocessor reads 48 KiB for wide tiles and 64 KiB for narrow ones; blocks in pairs, which share
// their weights, read 32 and 48.
#include "w8a8_sm90.cuh"

#include "hopper_launch.cuh"

using namespace nybble::cuda;

namespace {

template <class T, int Dtype>
int load(NybbleCudaInstance& found) {
  char name[sizeof found.name];
  std::snprintf(name, sizeof name, "y%d tokens%d outputs%d%s", Dtype, T::kTokens, T::kOutputs,
                T::kBlocks > 1 ? " pairs" : "");
  return load_instance(w8a8_sm90_kernel<T, Dtype>, T::kThreads, T::kShared, T::kTokens / kTokens, name, found);
}

// Clusters that the device runs at once, of T's size.
template <class T>
int64_t clusters(int multiprocessors) {
  return multiprocessors / T::kBlocks;
}

template <class T>
cudaError_t run(const NybbleCudaProduct& p, int multiprocessors, void* stream) {
  CUtensorMap x, w;
  cudaError_t error = map_codes(&x, p.x, p.m, p.k_padded, T::kTokens);
  if (error == cudaSuccess) error = map_codes(&w, p.codes, p.n_padded, p.k_padded, T::kShare);
  if (error != cudaSuccess) return error;
  const auto kernel = p.y_dtype == NYBBLE_F32    ? w8a8_sm90_kernel<T, NYBBLE_F32>
                      : p.y_dtype == NYBBLE_BF16 ? w8a8_sm90_kernel<T, NYBBLE_BF16>
                                                 : w8a8_sm90_kernel<T, NYBBLE_F16>;
  const int64_t count = std::min(w8a8_tiles<T>(p).count, clusters<T>(multiprocessors));
  return launch_clusters<T::kBlocks>(kernel, count, T::kThreads, T::kShared, stream, p, x, w);
}

// Time of the tiles that a block takes in turn, where one costs `Cost`.
template <class T, int Cost>
int64_t time(const NybbleCudaProduct& p, int multiprocessors) {
  const int64_t at_once = clusters<T>(multiprocessors);
  return (w8a8_tiles<T>(p).count + at_once - 1) / at_once * Cost;
}

struct Form {
  int (*load[3])(NybbleCudaInstance&);  // by type of y
  int64_t (*time)(const NybbleCudaProduct&, int multiprocessors);
  cudaError_t (*run)(const NybbleCudaProduct&, int multiprocessors, void* stream);
};
template <class T, int Cost>
constexpr Form form() {
  return {{load<T, NYBBLE_F32>, load<T, NYBBLE_BF16>, load<T, NYBBLE_F16>}, time<T, Cost>, run<T>};
}

// What a step of a tile costs, in 256 clocks: of wgmma, or of the second-level cache, if a multiprocessor gets 32 bytes
// a clock from it.
constexpr Form kForms[] = {form<W8A8<256, 2>, 4>(), form<W8A8<256, 1>, 6>(), form<W8A8<128, 2>, 3>(),
                           form<W8A8<128, 1>, 4>()};

}  // namespace

extern "C" int nybble_w8a8_sm90_load(NybbleCudaInstance* found, int32_t most, int32_t* count) {
  *count = 0;
  for (const Form& each : kForms)
    for (const auto load : each.load)
      if (*count < most)
        if (const int error = load(found[(*count)++])) return error;
  return cudaSuccess;
}

extern "C" int nybble_w8a8_sm90(const NybbleCudaProduct* product, const NybbleCudaLaunch* how) {
  int multiprocessors = 0;
  const cudaError_t error = count_multiprocessors(&multiprocessors);
  if (error != cudaSuccess) return error;
  const auto sooner = [&](const Form& a, const Form& b) {
    return a.time(*product, multiprocessors) < b.time(*product, multiprocessors);
  };
  const Form& best = *std::min_element(std::begin(kForms), std::end(kForms), sooner);
  return best.run(*product, multiprocessors, how->stream);
}
