// The C entry of linear layers, for processes without Python: a plan says which kernels serve a weight, and runs them.
//
// The text of a plan, which nybble.export.aot writes: a line "nybble-plan 1", then a line for each choice, the first
// one that fits is taken. The words of a line, numbers unless said:
//   dtype of x (NybbleDtype), least and most rows (0: any number), features of the CPU that it needs (names with commas
//   between, or -), names of the kernels linear, prepare, expand and few (- for none), static_activations, act_steps,
//   then the shape of the weight: bits n k group_size symmetric layout (a name) block_n block_k ordered group_scale
//   minimum book levels
#pragma once

#include <cstddef>
#include <cstdint>

#include "abi.h"

extern "C" {

struct NybblePlan;

struct NybbleMemory {
  const void* data;
  size_t bytes;
};

// x: rows of k elements, `stride` elements apart; bias: null, or n elements; y: [rows][n] of x's dtype.
struct NybbleProduct {
  NybbleMemory x, packed, bias, y;
  NybbleDtype dtype, bias_dtype;
  int64_t rows, stride;
};

// Both write a message to error and give null or 0 where something does not fit; a plan is never freed.
__attribute__((visibility("default"))) NybblePlan* nybble_plan_make(const char* text, size_t bytes, char* error,
                                                                    size_t error_bytes);
__attribute__((visibility("default"))) int nybble_plan_run(const NybblePlan* plan, const NybbleProduct* product,
                                                           int threads, char* error, size_t error_bytes);
// The inputs and outputs of the layer.
__attribute__((visibility("default"))) int64_t nybble_plan_inputs(const NybblePlan* plan);
__attribute__((visibility("default"))) int64_t nybble_plan_outputs(const NybblePlan* plan);

}  // extern "C"
