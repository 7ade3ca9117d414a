// From a product to launches: which instance of a kernel, with how much shared memory, as clusters or with a second
// kernel that adds the splits. NYBBLE_STREAM and NYBBLE_TILES define the functions of a line of kernels.def.
#pragma once

#include <cuda_runtime.h>

#include "stream.cuh"
#include "tiles.cuh"

namespace nybble {
namespace cuda {

template <class W_, class X_>
struct StreamOf {
  using W = W_;
  using X = X_;
  static constexpr int kRows = Stream<W>::kRows, kTokensOfBlock = kTokens, kShared = Stream<W>::kShared;
  static constexpr auto kernel = &stream_kernel<W, X>;
};

template <class W_, class X_, int MT>
struct TilesOf {
  using W = W_;
  using X = X_;
  static constexpr int kRows = Tiles<W, X, MT>::kRows, kTokensOfBlock = Tiles<W, X, MT>::kBlockTokens;
  static constexpr int kShared = Tiles<W, X, MT>::kShared;
  static constexpr auto kernel = &tiles_kernel<W, X, MT>;
};

// Lets the current device run an instance, and says whether its code for this device has clusters.
template <class Of>
int load(int32_t* clusters) {
  cudaFuncAttributes attributes;
  cudaError_t error = cudaFuncGetAttributes(&attributes, Of::kernel);
  if (error == cudaSuccess)
    error = cudaFuncSetAttribute(Of::kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Of::kShared);
  *clusters = attributes.ptxVersion >= 90;
  return error;
}

template <class First, class Second, class... More>
int load(int32_t* clusters) {
  const int error = load<First>(clusters);
  return error == cudaSuccess ? load<Second, More...>(clusters) : error;
}

template <class Of>
int launch(const NybbleCudaProduct& product, const NybbleCudaLaunch& how) {
  const NybbleCudaPlan& plan = how.plan;
  const bool split = plan.splits > 1;
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = cluster.val.clusterDim.z = 1;
  cluster.val.clusterDim.y = static_cast<unsigned>(plan.splits);
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(plan.columns, plan.splits, plan.token_tiles);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = Of::kShared;
  config.stream = static_cast<cudaStream_t>(how.stream);
  config.attrs = &cluster;
  config.numAttrs = split && how.clusters;
  const cudaError_t error = cudaLaunchKernelEx(&config, Of::kernel, product);
  if (error != cudaSuccess || !split || how.clusters) return error;
  constexpr int kItems = Of::kRows * Of::kTokensOfBlock / 4;
  const dim3 grid(static_cast<unsigned>(plan.columns) * plan.token_tiles, (kItems + kThreads - 1) / kThreads);
  finish_kernel<typename Of::W, typename Of::X, Of::kRows, Of::kTokensOfBlock>
      <<<grid, kThreads, 0, config.stream>>>(product, plan.columns);
  return cudaGetLastError();
}

// The instance for the activations of a launch.
template <class ForBf16, class ForF16>
int launch_of(const NybbleCudaProduct& product, const NybbleCudaLaunch& how) {
  return how.x_dtype == NYBBLE_BF16 ? launch<ForBf16>(product, how) : launch<ForF16>(product, how);
}

// Up to eight tokens, of weights W. Other: the second type of activations that they are multiplied with.
template <class W, class Other>
struct StreamKernels {
  static int load_all(int32_t* clusters) { return load<StreamOf<W, Bf16>, StreamOf<W, Other>>(clusters); }
  static int run(const NybbleCudaProduct& product, const NybbleCudaLaunch& how) {
    return launch_of<StreamOf<W, Bf16>, StreamOf<W, Other>>(product, how);
  }
};

// More, in blocks of 16 or 32 tokens: a lane's registers hold the sums of 32.
template <class W, class Other>
struct TilesKernels {
  static int load_all(int32_t* clusters) {
    return load<TilesOf<W, Bf16, 2>, TilesOf<W, Bf16, 4>, TilesOf<W, Other, 2>, TilesOf<W, Other, 4>>(clusters);
  }
  static int run(const NybbleCudaProduct& product, const NybbleCudaLaunch& how) {
    return how.token_groups == 2 ? launch_of<TilesOf<W, Bf16, 2>, TilesOf<W, Other, 2>>(product, how)
                                 : launch_of<TilesOf<W, Bf16, 4>, TilesOf<W, Other, 4>>(product, how);
  }
};

}  // namespace cuda
}  // namespace nybble

#define NYBBLE_KERNELS_(name, ...)                                                                                 \
  extern "C" int nybble_##name##_load(int32_t* clusters) { return nybble::cuda::__VA_ARGS__::load_all(clusters); } \
  extern "C" int nybble_##name(const NybbleCudaProduct* product, const NybbleCudaLaunch* how) {                    \
    return nybble::cuda::__VA_ARGS__::run(*product, *how);                                                         \
  }
// Weights W of both types of activations, or of bfloat16 alone (Other: Bf16).
#define NYBBLE_STREAM(name, W, Other) NYBBLE_KERNELS_(name, StreamKernels<nybble::cuda::W, nybble::cuda::Other>)
#define NYBBLE_TILES(name, W, Other) NYBBLE_KERNELS_(name, TilesKernels<nybble::cuda::W, nybble::cuda::Other>)
