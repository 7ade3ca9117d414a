// The interface between the driver and the CUDA kernels: plain C structs, device pointers, no ownership, no exceptions.
// Each line of kernels.def has two functions: nybble_<name>_load prepares the current device for the kernel and returns
// its occupancy, and nybble_<name> launches it. Both return a cudaError_t.
#pragma once

#include <stdint.h>

#include "../abi.h"

// y[m][n] = sum_k x[m][k] * w[n][k] + bias[n]. The weight pointers are the sections of a packed layout
// (nybble/layouts).
struct NybbleCudaProduct {
  const void* x;            // [m][ldx] of the kernel's activation type; rows 16-byte aligned
  const float* act_scale;   // [m]; for 8-bit activations, else null
  const int32_t* act_zero;  // [m]; for 8-bit activations, else null
  const uint8_t* codes;
  const uint8_t* places;      // positions of the stored weights of 2:4 sparsity, else null
  const uint16_t* scale;      // bf16 [groups][n_padded], for 4-bit weights
  const float* row_scale;     // [n_padded], for 8-bit weights
  const uint8_t* zero_point;  // [groups][n_padded], or null: 8
  const float* weight_sum;    // [n_padded], for 4-bit weights
  const int32_t* column_sum;  // [n_padded], for 8-bit weights
  const void* bias;           // [n] elements of bias_dtype, or null
  void* y;                    // [m][n] elements of y_dtype
  float* parts;               // parts_bytes of the plan: partial sums of split-K, unless a cluster adds them
  int64_t ldx, n_padded, k_padded;
  int32_t m, n, k;
  int32_t group_shift;  // k >> group_shift is the group of k; 31: one group
  int32_t bias_dtype, y_dtype;
  int32_t splits;       // thread blocks along K (split-K)
  int32_t token_tiles;  // thread blocks along the tokens
  int32_t clusters;     // whether a cluster adds the partial sums, else they go through `parts`
};

// Order of a row's activation codes along K: unchanged, or permuted (maps.h) for frag4 with mma.sync, or with wgmma.
enum { NYBBLE_PLAIN_ORDER, NYBBLE_FRAG4_ORDER, NYBBLE_WGMMA_ORDER };

// The grid of a product: a function of the shape and of the device's occupancy.
struct NybbleCudaPlan {
  int32_t columns, token_tiles, splits;
  int64_t parts_bytes;  // size of the partial sums of all splits; 0 without split-K
};

// Arguments of activation quantization: x (m, ldx) of dtype -> codes [m][k_padded], scale [m], zero [m].
struct NybbleCudaRows {
  const void* x;
  int64_t ldx;
  int32_t dtype, m, k;
  int64_t k_padded;
  int32_t order;  // NYBBLE_PLAIN_ORDER, NYBBLE_FRAG4_ORDER or NYBBLE_WGMMA_ORDER
  int8_t* codes;
  float* act_scale;
  int32_t* act_zero;
};

struct NybbleCudaLaunch {
  int32_t x_dtype;       // NYBBLE_BF16 or NYBBLE_F16; ignored for 8-bit activations
  int32_t token_groups;  // groups of 8 tokens per block
  struct NybbleCudaPlan plan;
  void* stream;
};

// One template instance of a kernel, and its resources and occupancy on the current device.
#define NYBBLE_MAX_SPLITS 8
struct NybbleCudaInstance {
  char name[64];
  int32_t token_groups;  // groups of 8 tokens per block
  int32_t shared_bytes, registers;
  int32_t blocks_per_sm;
  int32_t whole_k;                          // whether each block takes all of K, so that K cannot be split
  int32_t clusters[NYBBLE_MAX_SPLITS + 1];  // active clusters by cluster size; 0: unsupported, or size below 2
};

typedef int (*NybbleCudaLoadFn)(struct NybbleCudaInstance* found, int32_t most, int32_t* count);
typedef int (*NybbleCudaRunFn)(const struct NybbleCudaProduct*, const struct NybbleCudaLaunch*);
