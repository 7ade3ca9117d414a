// The experts of a layer in one call: the tokens are sorted by expert, and each expert that got some multiplies them
// with its weights. Experts that got none are not read. The products have the bits of run_linear.
#pragma once

#include <vector>

#include "pieces.h"
#include "rows.h"

namespace nybble {

// The kernels of a weight from so many rows on.
struct KernelsFrom {
  int64_t least;
  LinearCall call;  // kernels and shape; the rest is filled in
};

// One of an expert's two weights, for all experts: of one shape and scheme.
struct ExpertsSide {
  std::vector<KernelsFrom> kernels;  // ascending, the first from 1 row on
  std::vector<Span> packed;          // by expert
  std::vector<Vector> bias;          // by expert; address 0: none
  const WeightShape& shape() const { return kernels[0].call.shape; }
};

// Between the two products: act(gate) * up, or act(up) without a gate. The first weight's outputs are gates, then ups;
// or, interleaved, a gate and an up in turns. limit and other_offset as in NybbleActivateArgs.
struct Gate {
  int act = NYBBLE_ACT_IDENTITY;
  bool gated = true, interleaved = false;
  float limit = 0, other_offset = 0;
};

struct ExpertsCall {
  const KernelEntry* rows = nullptr;  // the row kernels
  NybbleDtype dtype = NYBBLE_F32;     // of x and y
  ExpertsSide up, down;
  Gate gate;
};

// x [tokens][stride], index [tokens][top_k] int64, weight [tokens][top_k] float32, y [tokens][outputs]. An index that
// is the number of experts is left out.
struct ExpertsAt {
  int64_t tokens, stride, top_k;
  Span x, index, weight, y;
};

class Experts {
 public:
  // Throws std::invalid_argument, naming what is wrong.
  explicit Experts(ExpertsCall call);
  // Throws std::invalid_argument for a span that is too small, a number out of range or an unknown expert.
  void run(const ExpertsAt& at, int threads) const;

 private:
  ExpertsCall call_;
};

}  // namespace nybble
