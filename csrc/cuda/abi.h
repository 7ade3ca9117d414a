// The contract between the driver and the CUDA kernels: plain C structs, device pointers, no ownership, no exceptions.
// Each line of kernels.def has two functions: nybble_<name>_load makes the current device ready for it and tells how
// much of it the device runs at once, and nybble_<name> launches it. Both return a cudaError_t.
#pragma once

#include <stdint.h>

#include "../abi.h"

// y[m][n] = sum_k x[m][k] * w[n][k] + bias[n]. The weights are the sections of a packed layout (layouts_gpu.py).
struct NybbleCudaProduct {
  const void* x;            // [m][ldx] of the kernel's activation type; rows 16-byte aligned
  const float* act_scale;   // [m] and
  const int32_t* act_zero;  // [m]: of 8-bit activations, else null
  const uint8_t* codes;
  const uint8_t* places;      // of weights of which two in four are kept, else null
  const uint16_t* scale;      // bf16 [groups][n_padded] of 4-bit weights
  const float* row_scale;     // [n_padded] of 8-bit weights
  const uint8_t* zero_point;  // [groups][n_padded], or null: 8
  const float* weight_sum;    // [n_padded] of 4-bit weights
  const int32_t* column_sum;  // [n_padded] of 8-bit weights
  const void* bias;           // [n] elements of bias_dtype, or null
  void* y;                    // [m][n] elements of y_dtype
  float* parts;               // plan's parts_bytes, where splits are not a cluster
  int64_t ldx, n_padded, k_padded;
  int32_t m, n, k;
  int32_t group_shift;  // k >> group_shift is k's group; 31: one group
  int32_t bias_dtype, y_dtype;
  int32_t splits;       // blocks that share K
  int32_t token_tiles;  // blocks along the tokens
  int32_t clusters;     // whether splits add their sums as a cluster, else through `parts`
};

// Of an activation row's codes: as they come, or as maps.h puts them for frag4 and mma.sync, or wgmma.
enum { NYBBLE_PLAIN_ORDER, NYBBLE_FRAG4_ORDER, NYBBLE_WGMMA_ORDER };

// How a product is cut into blocks: a function of the shape and of what the device runs at once.
struct NybbleCudaPlan {
  int32_t columns, token_tiles, splits;
  int64_t parts_bytes;  // of the sums of all splits; 0 where nothing is split
};

// Activations of rows to codes: x (m, ldx) of dtype -> codes [m][k_padded], scale [m], zero [m].
struct NybbleCudaRows {
  const void* x;
  int64_t ldx;
  int32_t dtype, m, k;
  int64_t k_padded;
  int32_t order;  // NYBBLE_PLAIN_ORDER and so on
  int8_t* codes;
  float* act_scale;
  int32_t* act_zero;
};

struct NybbleCudaLaunch {
  int32_t x_dtype;       // NYBBLE_BF16 or NYBBLE_F16; of 8-bit codes, any
  int32_t token_groups;  // eights of tokens of a block
  struct NybbleCudaPlan plan;
  void* stream;
};

// One compiled form of a kernel on the current device.
#define NYBBLE_MAX_SPLITS 8
struct NybbleCudaInstance {
  char name[64];
  int32_t token_groups;  // eights of tokens of a block
  int32_t shared_bytes, registers;
  int32_t blocks_per_sm;
  int32_t whole_k;                          // whether each of its blocks takes all of K
  int32_t clusters[NYBBLE_MAX_SPLITS + 1];  // by blocks of a cluster: how many run at once; 0: none, or one block
};

typedef int (*NybbleCudaLoadFn)(struct NybbleCudaInstance* found, int32_t most, int32_t* count);
typedef int (*NybbleCudaRunFn)(const struct NybbleCudaProduct*, const struct NybbleCudaLaunch*);
