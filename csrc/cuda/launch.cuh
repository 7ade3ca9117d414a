// Launches the mma.sync kernels; split-K uses clusters, or a second kernel that adds the partial sums.
// NYBBLE_KERNEL defines the two functions of a line of kernels.def.
#pragma once

#include <cuda_runtime.h>

#include <cstdio>

#include "instances.cuh"

namespace nybble {
namespace cuda {

// A launch without attributes. Returns the error of this launch only.
template <class... Arguments>
cudaError_t launch_plain(void (*kernel)(Arguments...), const dim3& grid, int shared, cudaStream_t stream,
                         const Arguments&... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

// Launch configuration; as_cluster: the blocks of a split-K sum form a cluster.
template <class Of>
cudaLaunchConfig_t config_of(const dim3& grid, cudaLaunchAttribute& attribute, bool as_cluster) {
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = attribute.val.clusterDim.z = 1;
  attribute.val.clusterDim.y = grid.y;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(Of::kBlockThreads);
  config.dynamicSmemBytes = Of::kShared;
  config.attrs = &attribute;
  config.numAttrs = as_cluster;
  return config;
}

// Prepares the current device for an instance, and queries its resources and occupancy.
template <class Of>
int load(NybbleCudaInstance& found) {
  cudaFuncAttributes attributes{};
  int error = cudaFuncGetAttributes(&attributes, Of::kernel);
  if (!error) error = cudaFuncSetAttribute(Of::kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Of::kShared);
  if (!error)
    error = cudaFuncSetAttribute(Of::kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                 cudaSharedmemCarveoutMaxShared);
  found = {};
  if (!error)
    error =
        cudaOccupancyMaxActiveBlocksPerMultiprocessor(&found.blocks_per_sm, Of::kernel, Of::kBlockThreads, Of::kShared);
  if (error) return error;
  found.token_groups = Of::kGroups;
  found.shared_bytes = Of::kShared;
  found.registers = attributes.numRegs;
  std::snprintf(found.name, sizeof found.name, "x%d tokens%d%s%s", Of::X::kElementBytes == 1 ? 8 : Of::X::kDtype,
                Of::kTokensOfBlock, Of::W::kSymmetric ? "" : " zero points", Of::W::kParts > 1 ? " fine groups" : "");
  if (attributes.ptxVersion < 90 || found.blocks_per_sm < 1) return cudaSuccess;
  for (int blocks = 2; blocks <= kMaxSplits; blocks++) {
    cudaLaunchAttribute attribute{};
    const cudaLaunchConfig_t config = config_of<Of>(dim3(1, blocks), attribute, true);
    int active = 0;
    // A device that cannot run such a cluster reports an error. It is cleared: partial sums then go through memory.
    if (cudaOccupancyMaxActiveClusters(&active, Of::kernel, &config) != cudaSuccess) {
      cudaGetLastError();
      active = 0;
    }
    found.clusters[blocks] = active;
  }
  return cudaSuccess;
}

template <class Of>
int launch(const NybbleCudaProduct& product, const NybbleCudaLaunch& how) {
  const NybbleCudaPlan& plan = how.plan;
  cudaLaunchAttribute attribute{};
  const dim3 grid(static_cast<unsigned>(plan.columns) * plan.token_tiles, plan.splits);
  cudaLaunchConfig_t config = config_of<Of>(grid, attribute, plan.splits > 1 && product.clusters);
  config.stream = static_cast<cudaStream_t>(how.stream);
  const cudaError_t error = cudaLaunchKernelEx(&config, Of::kernel, product);
  if (error != cudaSuccess || plan.splits == 1 || product.clusters) return error;
  constexpr int kTokensOfBlock = Of::kTokensOfBlock, kItems = Of::kRows * kTokensOfBlock / 4;
  const dim3 items(grid.x, (kItems + kThreads - 1) / kThreads);
  const auto finish = &finish_kernel<EndingOf<typename Of::W, typename Of::X>, Of::kRows, kTokensOfBlock>;
  return launch_plain(finish, items, 0, config.stream, product);
}

// A kernel: a list of instances.
template <class... Of>
struct Kernel {
  static int load_all(NybbleCudaInstance* found, int32_t most, int32_t* count) {
    *count = 0;
    int error = cudaSuccess;
    (void)((error == cudaSuccess && *count < most && (error = load<Of>(found[(*count)++]), true)) && ...);
    return error;
  }
  static int run(const NybbleCudaProduct& product, const NybbleCudaLaunch& how) {
    int error = cudaErrorInvalidValue;  // if no instance serves the product
    (void)((serves<Of>(product, how) && (error = launch<Of>(product, how), true)) || ...);
    return error;
  }
};

template <class List>
struct KernelOf;
template <class... Of>
struct KernelOf<Each<Of...>> {
  using Type = Kernel<Of...>;
};
}  // namespace cuda
}  // namespace nybble

// Defines the functions of a line of kernels.def: NYBBLE_KERNEL(name, StreamOf or TilesOf, weights, activations, groups
// of 8 tokens per block...).
#define NYBBLE_KERNEL(name, ...)                                                                                  \
  extern "C" int nybble_##name##_load(NybbleCudaInstance* found, int32_t most, int32_t* count) {                  \
    return nybble::cuda::KernelOf<nybble::cuda::Compiled<__VA_ARGS__>::Type>::Type::load_all(found, most, count); \
  }                                                                                                               \
  extern "C" int nybble_##name(const NybbleCudaProduct* product, const NybbleCudaLaunch* how) {                   \
    return nybble::cuda::KernelOf<nybble::cuda::Compiled<__VA_ARGS__>::Type>::Type::run(*product, *how);          \
  }
