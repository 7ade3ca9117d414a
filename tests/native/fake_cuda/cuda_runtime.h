// What csrc/cuda/bindings.cpp asks of CUDA's runtime, for a test that has no GPU: one device, on which all succeeds.
#pragma once

typedef int cudaError_t;
typedef int cudaDeviceAttr;
constexpr cudaError_t cudaSuccess = 0;
constexpr cudaDeviceAttr cudaDevAttrMultiProcessorCount = 16;

inline const char* cudaGetErrorString(cudaError_t) { return "an error"; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = 132;
  return cudaSuccess;
}
