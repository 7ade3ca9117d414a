// The driver of the row kernels: the same step for some of the rows, and in parallel.
#pragma once

#include <algorithm>

#include "memory.h"
#include "parallel.h"
#include "table.h"

namespace nybble {

// A float vector of a model, such as the weight of a norm. Address 0: none.
struct Vector {
  Span span;
  NybbleDtype dtype = NYBBLE_F32;
};

// The norm of rows; kind NYBBLE_NORM_NONE only adds.
struct Norm {
  int kind = NYBBLE_NORM_NONE;
  Vector weight, bias;
  float eps = 0, weight_offset = 0;
  NybbleScale scale() const;
};

// Throws std::invalid_argument unless the vectors have so many elements, and the numbers are in range.
void check_norm(const Norm& norm, int64_t columns);
// The number of an activation: "" (identity), "gelu", "gelu_tanh", "quick_gelu", "silu", "relu", "tanh"; of a norm:
// "none", "layer", "rms". Throw std::invalid_argument.
int act_of(const std::string& name);
int norm_of(const std::string& name);

// The matrix from a row and a column on; none stays none.
inline NybbleMatrix part_of(const NybbleMatrix& matrix, int64_t row, int64_t column, int dtype) {
  if (!matrix.at) return matrix;
  return {static_cast<uint8_t*>(matrix.at) + (row * matrix.stride + column) * dtype_bytes(dtype), matrix.stride};
}

// The rows [begin, end).
NybbleNormArgs rows_of(NybbleNormArgs args, int64_t begin, int64_t end);
NybbleActivateArgs rows_of(NybbleActivateArgs args, int64_t begin, int64_t end);
NybbleRotateArgs rows_of(NybbleRotateArgs args, int64_t begin, int64_t end);
NybbleMixArgs rows_of(NybbleMixArgs args, int64_t begin, int64_t end);

inline int64_t columns_of(const NybbleNormArgs& args) { return args.columns; }
inline int64_t columns_of(const NybbleActivateArgs& args) { return args.columns; }
inline int64_t columns_of(const NybbleRotateArgs& args) { return args.heads * args.head_dim; }
inline int64_t columns_of(const NybbleMixArgs& args) { return args.columns * args.terms; }

// Runs a kernel over all rows, a few at a time by each thread. False if it refuses its arguments.
template <class Args>
bool each_rows(Team& team, NybbleStatus (*kernel)(const Args*), const Args& args) {
  // A piece has at least so many elements, which take longer than handing it out.
  constexpr int64_t kLeastElements = 4096;
  const int64_t columns = columns_of(args);
  const int64_t most = (args.rows * columns + kLeastElements - 1) / kLeastElements;
  const int64_t wanted = team.workers() == 1 ? 1 : 4 * team.workers();
  const int64_t pieces = std::max<int64_t>(1, std::min({most, wanted, args.rows}));
  std::atomic<bool> ok{true};
  team.each(pieces, [&](int64_t i) {
    const Args part = rows_of(args, args.rows * i / pieces, args.rows * (i + 1) / pieces);
    if (kernel(&part) != NYBBLE_OK) ok.store(false, std::memory_order_relaxed);
  });
  return ok.load();
}

}  // namespace nybble
