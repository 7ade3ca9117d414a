// Launches the wgmma kernels: tensor maps for the TMA, and persistent blocks, one per multiprocessor.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>

#include "abi.h"
#include "ring.cuh"

namespace nybble {
namespace cuda {

// The tensor map of a matrix of 8-bit integers, row size a multiple of 16 bytes, read in boxes of 128 columns with the
// swizzle of wgmma_maps.h. The driver function is looked up at run time, because the library does not link libcuda.
inline cudaError_t map_codes(CUtensorMap* map, const void* codes, int64_t rows, int64_t columns, int box_rows) {
  static const auto encode = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
    return error == cudaSuccess && result == cudaDriverEntryPointSuccess
               ? reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found)
               : nullptr;
  }();
  if (!encode) return cudaErrorInsufficientDriver;
  const cuuint64_t size[2] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t stride[1] = {static_cast<cuuint64_t>(columns)};
  const cuuint32_t box[2] = {kRowBytes, static_cast<cuuint32_t>(box_rows)}, step[2] = {1, 1};
  const CUresult result = encode(map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 2, const_cast<void*>(codes), size, stride, box,
                                 step, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                 CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

// Prepares the current device for an instance with `token_groups` groups of 8 tokens, and queries its occupancy.
template <class Kernel>
int load_instance(Kernel kernel, int threads, int shared, int token_groups, const char* name,
                  NybbleCudaInstance& found) {
  cudaFuncAttributes attributes{};
  int error = cudaFuncGetAttributes(&attributes, kernel);
  if (!error) error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  found = {};
  if (!error) error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&found.blocks_per_sm, kernel, threads, shared);
  if (error) return error;
  found.token_groups = token_groups;
  found.shared_bytes = shared;
  found.registers = attributes.numRegs;
  found.whole_k = 1;
  std::snprintf(found.name, sizeof found.name, "%s", name);
  return cudaSuccess;
}

// Launches `pairs` clusters of two blocks.
template <class... Arguments>
cudaError_t launch_pairs(void (*kernel)(Arguments...), int64_t pairs, int threads, int shared, void* stream,
                         const Arguments&... arguments) {
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = kPair;
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(pairs * kPair));
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &cluster;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

// Upper bound of the clusters of two that run at the same time, when a block fills a multiprocessor.
inline cudaError_t count_pairs(int* pairs) {
  int device = 0, multiprocessors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  *pairs = multiprocessors / kPair;
  return error;
}

// Modelled time of `count` tiles of cost `cost` each, `at_once` at a time.
inline int64_t time_of(int64_t count, int at_once, int cost) { return (count + at_once - 1) / at_once * cost; }

}  // namespace cuda
}  // namespace nybble
