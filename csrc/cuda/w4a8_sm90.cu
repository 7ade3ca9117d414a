// y = act_scale * (sum_g scale_g * sum_k q (n - z_g) - act_zero * weight_sum) + bias for many tokens: q int8 activation
// codes, quantized dynamically with one scale and zero point per token; n 4-bit weight codes in layout frag4, one scale
// per group of 32, 64, 128 or K inputs.
//
// Built on wgmma m64n64k32, s8 x s8. The weights are the left operand, unpacked from shared memory to registers (six
// integer operations per 16 weights, eight with zero points); tiles have 128 tokens. A group's int32 sums are exact and
// converted to float once, in the order of the groups: bit-identical to w4a8_triton. The TMA fills a ring of stages of
// 128 inputs. Bound by wgmma for groups of 128 or more, by converting sums for smaller ones.
#include "w4a8_sm90.cuh"

#include "hopper_launch.cuh"

using namespace nybble::cuda;

namespace {

template <class T>
struct Instance {
  static constexpr auto kernel = &w4a8_sm90_kernel<T>;

  static int load(NybbleCudaInstance& found) {
    char name[sizeof found.name];
    const char* zeros = T::kSymmetric || T::kWhole ? "" : " zero points";
    std::snprintf(name, sizeof name, "tokens%d outputs%d group%d%s", T::kTokens, T::kOutputs, T::kWhole ? 0 : T::kUnit,
                  zeros);
    return load_instance(kernel, T::kThreads, T::kShared, T::kTokens / kTokens, name, found);
  }
  static cudaError_t run(const NybbleCudaProduct& p, int at_once, void* stream) {
    CUtensorMap x;
    const cudaError_t error = map_codes(&x, p.x, p.m, p.k_padded, T::kShare);
    if (error != cudaSuccess) return error;
    const int64_t pairs = std::min<int64_t>(w4a8_tiles<T>(p).count, at_once);
    return launch_pairs(kernel, pairs, T::kThreads, T::kShared, stream, p, x);
  }
};

struct Functions {
  int (*load)(NybbleCudaInstance&);
  cudaError_t (*run)(const NybbleCudaProduct&, int at_once, void* stream);
};
template <class T>
constexpr Functions functions() {
  return {Instance<T>::load, Instance<T>::run};
}

// Groups of 32, 64 and 128, each with zero points and symmetric; then one group for all inputs, for either.
constexpr int kForms = 7;
template <int Warpgroups>
constexpr Functions kFunctions[kForms] = {
    functions<W4A8<Warpgroups, 1, false, false>>(), functions<W4A8<Warpgroups, 1, false, true>>(),
    functions<W4A8<Warpgroups, 2, false, false>>(), functions<W4A8<Warpgroups, 2, false, true>>(),
    functions<W4A8<Warpgroups, 4, false, false>>(), functions<W4A8<Warpgroups, 4, false, true>>(),
    functions<W4A8<Warpgroups, 4, true, false>>(),
};

template <int Warpgroups>
int64_t tiles(const NybbleCudaProduct& p) {
  return w4a8_tiles<W4A8<Warpgroups, 4, true, false>>(p).count;
}

}  // namespace

extern "C" int nybble_w4a8_sm90_load(NybbleCudaInstance* found, int32_t most, int32_t* count) {
  *count = 0;
  for (const auto& functions : {kFunctions<1>, kFunctions<2>})
    for (int i = 0; i < kForms && *count < most; i++)
      if (const int error = functions[i].load(found[(*count)++])) return error;
  return cudaSuccess;
}

extern "C" int nybble_w4a8_sm90(const NybbleCudaProduct* product, const NybbleCudaLaunch* how) {
  int at_once = 0;
  const cudaError_t error = count_pairs(&at_once);
  if (error != cudaSuccess) return error;
  const NybbleCudaProduct& p = *product;
  const int form = p.group_shift > 7 ? kForms - 1 : 2 * (p.group_shift - 5) + (p.zero_point == nullptr);
  // An estimate, not measured: a narrow tile has half the wgmma work and reads three quarters of the bytes.
  const bool narrow = time_of(tiles<1>(p), at_once, 3) < time_of(tiles<2>(p), at_once, 4);
  const Functions& chosen = narrow ? kFunctions<1>[form] : kFunctions<2>[form];
  return chosen.run(p, at_once, how->stream);
}
