// A layer of an LSTM or GRU over whole sequences: the products with the input for many steps at once, then step by step
// the product with the state and the cell, on what was just written. The rows of a step lie together, and no step has
// more rows than the one before, as torch packs sequences of unequal lengths.
#pragma once

#include <vector>

#include "pieces.h"
#include "rows.h"

namespace nybble {

struct RecurrentDirection {
  // Kernels, shapes, packed weights and biases; the rest is filled in. input may have no kernel, if that of the other
  // direction has none either.
  LinearCall input{}, hidden{};
};

struct RecurrentCall {
  const KernelEntry* rows = nullptr;           // the row kernels
  bool gru = false;                            // else an LSTM
  NybbleDtype dtype = NYBBLE_F32;              // of x, y and h
  std::vector<RecurrentDirection> directions;  // the second, if any, runs backwards
  std::vector<int64_t> sizes;                  // rows of each step
  Span x;                                      // [all rows][stride], the first inputs of each row used
  int64_t stride = 0;
  Span y;  // [all rows][directions * units]
  Span h;  // [directions][rows][units]: the first states, then the last ones of each sequence
  Span c;  // likewise, float32; of an LSTM only
  bool multiplied() const { return !directions[0].input.kernel; }
  int64_t gates() const { return gru ? 3 : 4; }
  int64_t units() const { return directions[0].hidden.shape.k; }
};

// The result does not depend on the number of threads. Throws std::invalid_argument, naming what is wrong.
void run_recurrent(const RecurrentCall& call, int threads);

}  // namespace nybble
