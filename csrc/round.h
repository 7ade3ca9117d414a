// Weights rounded to nearest, and the error of rounding. The definition is python/nybble/weights/rounding.py; codes,
// scales and zero points equal it bit for bit.
#pragma once

#include "abi.h"
#include "pack.h"

namespace nybble {

// Rows of a dense float weight [n][k], each contiguous.
struct DenseRows {
  const void* data;
  int64_t stride;  // elements from one row to the next
  NybbleDtype dtype;
};

// Sums over all weights w: of w^2, and of (w - w')^2 with w' the rounded weight in the dtype of w.
struct SquaredSums {
  double signal = 0, noise = 0;
};

// shape: of a dense form. False if a value is NaN or Inf; then `to` is not defined.
bool round_weight(const WeightShape& shape, const DenseRows& from, const Portable& to, int threads);

// Equal for any number of threads.
SquaredSums squared_sums(const WeightShape& shape, const DenseRows& from, const Portable& rounded, int threads);

// Whether n rows of k values have neither NaN nor Inf.
bool all_finite(int64_t n, int64_t k, const DenseRows& from, int threads);

}  // namespace nybble
