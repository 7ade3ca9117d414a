// The parts of a product that run_linear and run_linears share: its checks, its panel, and a piece of its output.
#pragma once

#include "linear.h"

namespace nybble {

// Below this many multiply-adds a call runs on one thread: waking others gains little on an idle machine and costs much
// on a busy one.
constexpr int64_t kSerialProducts = 1 << 19;

// Consecutive rows, how to cut their product, and their buffers in the scratch buffer.
struct Chunk {
  int64_t row, rows;
  Cut cut;
  uint8_t* panel;
  float* act_scale;
  int32_t* act_zero;
  int32_t* act_sum;
};

// Bytes of the buffers of a chunk of so many rows.
int64_t chunk_bytes(const LinearCall& call, int64_t rows);
// The chunk that starts at a row, with buffers of chunk_bytes(call, cut.chunk_rows) from `base` on.
Chunk carve(const LinearCall& call, int64_t row, const Cut& cut, uint8_t* base);

// Elements that `rows` rows of k elements span.
int64_t strided_extent(int64_t rows, int64_t stride, int64_t k);

// Throw std::invalid_argument.
void check_steps(int panel, int act_steps);
void check_given(const Given& given, int act_steps);
// Reads the static quantization parameters in front of the packed weight, and advances `packed` past them.
void take_given(LinearCall& call);
// The kernels, the packed weight and the bias.
void check_weight(const LinearCall& call);
// The call with the kernels for its number of rows, and with its static quantization parameters, which `packed` then no
// longer begins with. Throws std::invalid_argument if something other than x and y is wrong.
LinearCall resolved(const LinearCall& asked);

// What the sums of a row's codes are multiplied with: see NybbleLinearArgs::act_sum.
int32_t sum_factor(const WeightShape& shape);

// The arguments for all blocks of the chunk.
NybblePrepareArgs prepare_args(const LinearCall& call, const Chunk& chunk);
NybbleLinearArgs linear_args(const LinearCall& call, const Chunk& chunk);
// The arguments of one of the cut's tile_parts * block_parts pieces, from those for all blocks.
NybbleLinearArgs piece_args(const LinearCall& call, const Chunk& chunk, const NybbleLinearArgs& all, int64_t piece);

// Runs the kernel on one piece of the output. Weights in the mask layout are expanded a few columns at a time. False if
// a kernel rejects its arguments, or no memory is left.
bool run_piece(const LinearCall& call, const Cut& cut, NybbleLinearArgs args);

}  // namespace nybble
