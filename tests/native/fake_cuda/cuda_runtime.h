// A fake CUDA runtime with one device, with the functions that csrc/cuda/bindings.cpp uses, for tests without a GPU. As
// in the real one, an error persists until cudaGetLastError.
#pragma once

typedef int cudaError_t;
typedef int cudaDeviceAttr;
constexpr cudaError_t cudaSuccess = 0, cudaErrorInvalidDeviceFunction = 98, cudaErrorNoKernelImageForDevice = 209;
constexpr cudaDeviceAttr cudaDevAttrMultiProcessorCount = 16;

inline cudaError_t& fake_last_error() {
  static cudaError_t last = cudaSuccess;
  return last;
}
inline cudaError_t cudaGetLastError() {
  const cudaError_t last = fake_last_error();
  fake_last_error() = cudaSuccess;
  return last;
}
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
