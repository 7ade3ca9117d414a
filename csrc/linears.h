// Several linear layers of one input in one call: a norm before, one panel for all weights that can share it, and the
// activation, product or residual that follows each, on what a piece just wrote while it is in a cache. The products
// have the bits of run_linear.
#pragma once

#include <vector>

#include "pieces.h"
#include "rows.h"

namespace nybble {

constexpr int kMostWeights = 8;

struct LinearsWeight {
  LinearCall call{};  // kernels, shape, packed weight and bias; the rest is filled in
  int act = NYBBLE_ACT_IDENTITY;
  std::vector<size_t> after;  // weights before it whose y it reads, as other or residual
};

// What does not change between calls. The norm reads x (+ residual); kind none without a residual leaves x as it is.
struct LinearsCall {
  const KernelEntry* rows = nullptr;  // the row kernels
  NybbleDtype dtype = NYBBLE_F32;
  Norm norm;
  std::vector<LinearsWeight> weights;
  int64_t k() const { return weights[0].call.shape.k; }
  // Whether the results do not depend on how rows are divided: float kernels add in another order for few rows.
  bool exact() const;
};

// Where rows come from and go to. y = act(x w^T + bias) * other + residual. Of the optional ones, `at` is null.
struct LinearsAt {
  NybbleMatrix x{}, residual{}, sum{}, normed{};
  struct Of {
    NybbleMatrix y{}, other{}, residual{};  // y has no gaps between rows
  };
  Of of[kMostWeights];
};

// Throws std::invalid_argument, naming what is wrong.
void check_linears(const LinearsCall& call);

// How so many rows run on so many threads.
class LinearsPlan {
 public:
  // Keeps a reference to the call.
  LinearsPlan(const LinearsCall& call, int64_t rows, int threads);
  int64_t scratch_bytes() const { return normed_bytes_ + panel_bytes_; }
  // Every thread of the team calls it with the same scratch. False if a kernel refuses its arguments or no memory is
  // left.
  bool run(const LinearsAt& at, Team& team, uint8_t* scratch) const;

 private:
  // A weight with the kernels for these rows, and how it is cut.
  struct Part {
    LinearCall call;
    Cut cut;
    size_t index;
    size_t root;  // index of the weight whose pieces it follows, since it reads what those wrote; else its own
  };
  using Group = std::vector<Part>;  // weights that share a panel
  // Pieces that the threads share; a weight that follows another has none of its own.
  static int64_t pieces_of(const Part& part) {
    return part.root == part.index ? part.cut.tile_parts * part.cut.block_parts : 0;
  }
  struct Running;
  // Row blocks of a chunk, and strips of a weight.
  struct Piece {
    int64_t block_begin, block_end, strip_begin, strip_end;
  };

  void add(size_t index, int threads);
  bool follows(const Group& group, const Part& part, size_t* root) const;
  void run_chunk(const Group& group, const Chunk& chunk, Running& running) const;
  void prepare(const Group& group, const Chunk& chunk, Running& running, int64_t begin, int64_t end) const;
  void multiply(const Part& part, const Chunk& chunk, Running& running, const Piece& piece) const;
  bool finishes(const Part& part, const LinearsAt& at) const;
  NybbleActivateArgs finish_args(const Part& part, const LinearsAt& at, int64_t row, int64_t rows) const;
  NybbleNormArgs norm_args(const LinearsAt& at) const;

  const LinearsCall& call_;
  int64_t rows_;
  std::vector<Group> groups_;
  int64_t normed_bytes_ = 0, panel_bytes_ = 0;
};

}  // namespace nybble
