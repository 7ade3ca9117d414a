// The driver of lookups: rows of a packed weight by their numbers, and sums, means and maxima of such rows.
#pragma once

#include "memory.h"
#include "pack.h"
#include "table.h"

namespace nybble {

struct LookupCall {
  const KernelEntry* kernel;  // of the op "rows"
  WeightShape shape;          // dense
  bool tiled;                 // a layout in tiles; else plain: the portable tensors, each aligned to 64 bytes
  Span packed, ids;
  int id_bytes;  // 4 or 8
  int64_t count;
  Span y;  // [count or bags][k] elements
  NybbleDtype dtype;
  // Of bags only: bag i has the ids [start[i], start[i + 1]), see NybbleLookupArgs.
  int bag = NYBBLE_BAG_NONE;
  int64_t bags = 0;
  Span start, weights;  // int64 [bags + 1]; float32 [count], or none
  int64_t left_out = -1;
};

// The number of a mode: "sum", "mean", "max". Throws std::invalid_argument.
int bag_of(const std::string& mode);

// Throws std::out_of_range for an id that is no row, std::invalid_argument for a span that is too small, bags that
// overlap, or a number out of range.
void run_lookup(const LookupCall& call, int threads);

}  // namespace nybble
