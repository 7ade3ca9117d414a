// The functions of the CUDA kernels, which launch nothing and succeed; of each the device runs as much as an H100
// might.
#include "../../../csrc/cuda/abi.h"

#include <algorithm>
#include <cstring>

// A form for each size of a block. Kernels for wgmma keep K whole, and no clusters share it.
static int load_fake(const char* name, NybbleCudaInstance* found, int32_t* count) {
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
int nybble_quantize_rows(const NybbleCudaRows*, void*) { return 0; }
}
