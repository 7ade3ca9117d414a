// The driver: packs the activations, splits the output over threads, calls the kernels.
#pragma once

#include "blocking.h"
#include "memory.h"
#include "pack.h"
#include "table.h"

namespace nybble {

// Scale and zero point of static activation quantization: see NybblePrepareArgs.
struct Given {
  float scale = 0;
  int32_t zero = 0;
};

// Bytes in front of a packed weight that hold a Given: float32 scale, int32 zero point, zero padding.
constexpr size_t kGivenBytes = 64;

struct PrepareCall {
  const KernelEntry* kernel;
  NybblePanel panel_format;
  NybbleDtype dtype;
  Span x;  // [rows][stride] elements, the first k of each row used
  int64_t rows, stride, k, k_padded, block_rows, group;
  Span panel, scale, zero, sums;  // sums may be null
  Given given{};                  // scale 0: dynamic quantization
  int act_steps = 255;            // see NybblePrepareArgs
  Span order{};                   // likewise; null: none
};

struct LinearCall {
  const KernelEntry* kernel;
  const KernelEntry* prepare;  // of the same target
  const KernelEntry* expand;   // null, or the kernel that expands the mask layout for `kernel`
  const KernelEntry* few;      // null, or the mask-layout kernel that replaces both for few rows
  WeightShape shape;
  Span x, packed, bias, y;  // bias may be null
  int64_t rows, stride;
  NybbleDtype x_dtype, bias_dtype, y_dtype;
  bool static_activations;  // packed begins with a Given
  int act_steps = 255;      // see NybblePrepareArgs; for integer activations
  Given given;              // filled in by run_linear
  // Where `packed` is a larger dense weight, of so many outputs, and `shape` the rows of it from `first_row` on, a
  // multiple of 16; 0: it is all of it.
  int64_t first_row = 0, all_rows = 0;
  WeightShape packed_shape() const {
    WeightShape all = shape;
    if (all_rows) all.n = all_rows;
    return all;
  }
};

// The product of so many rows of activations with a weight, as cut_for takes it.
Product product_of(const KernelEntry& kernel, const WeightShape& shape, int64_t rows, int threads);

// Both throw std::invalid_argument for a span that is too small or a number out of range, and std::bad_alloc.
void run_prepare(const PrepareCall& call);
void run_linear(const LinearCall& call, int threads);

}  // namespace nybble
