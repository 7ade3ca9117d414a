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

// How static activations are rounded: see NybblePrepareArgs.
struct Given {
  float scale = 0;
  int32_t zero = 0;
};

// Bytes before a packed weight that hold its activations' Given: float32 scale, int32 zero, then 0.
constexpr size_t kGivenBytes = 64;

struct PrepareCall {
  const KernelEntry* kernel;
  NybblePanel panel_format;
  NybbleDtype dtype;
  Span x;  // [rows][stride] elements, the first k of each row used
  int64_t rows, stride, k, k_padded, block_rows, group;
  Span panel, scale, zero, sums;  // sums may be null
  Given given{};                  // scale 0: found row by row
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
  bool static_activations;  // packed begins with a Given
  Given given;              // what run_linear finds there
};

// Both throw std::invalid_argument where a span is too small or a number is out of range, std::bad_alloc without
// memory.
void run_prepare(const PrepareCall& call);
void run_linear(const LinearCall& call, int threads);

}  // namespace nybble
