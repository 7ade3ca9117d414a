// From a product to launches: which instance of a kernel, with how much shared memory, as clusters or with a second
// kernel that adds the splits.
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

}  // namespace cuda
}  // namespace nybble
