// The driver: prepares activations, splits the output over threads, calls the kernels.
#pragma once

#include <cstddef>
#include <cstdint>

#include "pack.h"
#include "table.h"

namespace nybble {

// A pointer with the bytes behind it.
struct Span {
  uintptr_t address = 0;
  size_t bytes = 0;
};

struct PrepareCall {
  const KernelEntry* kernel;
  NybblePanel panel_format;
  NybbleDtype dtype;
  Span x;  // [rows][stride] elements, the first k of each row used
  int64_t rows, stride, k, k_padded, block_rows, group;
  Span panel, scale, zero, sums;  // sums may be null
};

struct LinearCall {
  const KernelEntry* kernel;
  const KernelEntry* prepare;  // of the same target
  const KernelEntry* expand;   // null, or what turns the mask layout into the lines that the kernel reads
  const KernelEntry* few;      // null, or the kernel of a mask layout that serves a few rows instead of the two
  WeightShape shape;
  Span x, packed, bias, y;  // bias may be null
  int64_t rows, stride;
  NybbleDtype x_dtype, bias_dtype, y_dtype;
};

// Both throw std::invalid_argument where a span is too small or a number is out of range, std::bad_alloc without
// memory.
void run_prepare(const PrepareCall& call);
void run_linear(const LinearCall& call, int threads);

}  // namespace nybble
