// Fake CUDA kernels that launch nothing, with an occupancy like an H100's. All succeed, except the kernel named by the
// environment variable FAKE_REFUSES, which returns the error code in FAKE_ERROR.
#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "../../../csrc/cuda/abi.h"
#include "cuda_runtime.h"

// One instance per number of token groups. wgmma kernels do not split K, and have no clusters for it.
static int load_fake(const char* name, NybbleCudaInstance* found, int32_t* count) {
  const char* refused = std::getenv("FAKE_REFUSES");
  if (refused && !std::strcmp(refused, name)) {
    *count = 0;
    return fake_last_error() = std::atoi(std::getenv("FAKE_ERROR"));
  }
  const bool whole_k = std::strstr(name, "sm90");
  const int32_t clusters[] = {0, 0, 190, 120, 90, 70, 60, 50, 40};
  *count = 5;
  for (int i = 0; i < *count; i++) {
    found[i] = {};
    found[i].token_groups = 1 << i;
    found[i].blocks_per_sm = 3;
    found[i].whole_k = whole_k;
    if (!whole_k) std::copy(clusters, clusters + NYBBLE_MAX_SPLITS + 1, found[i].clusters);
  }
  return 0;
}

extern "C" {
#define NYBBLE_CUDA(name, ...)                                                   \
  int nybble_##name##_load(NybbleCudaInstance* found, int32_t, int32_t* count) { \
    return load_fake(#name, found, count);                                       \
  }                                                                              \
  int nybble_##name(const NybbleCudaProduct*, const NybbleCudaLaunch*) { return 0; }
#include "cuda_built.def"
#undef NYBBLE_CUDA
int nybble_quantize_rows(const NybbleCudaRows*, void*) { return cudaGetLastError(); }
}
