// A weight's shape from plain words, as Python and plans give it.
#pragma once

#include <stdexcept>
#include <string>
#include <vector>

#include "pack.h"

namespace nybble {

// As the fields of WeightShape; layout: its name, or "" for a dense one. group_scale: a NybbleDtype.
struct ShapeWords {
  int bits = 0;
  int64_t n = 0, k = 0, group_size = 0;
  bool symmetric = true;
  std::string layout;
  int64_t block_n = 0, block_k = 0;
  bool ordered = false;
  int group_scale = NYBBLE_BF16;
  bool minimum = false, book = false, levels = false;
};

// What the name of a packed layout says of a shape. Other names (plain, and none) are of codes that lie in no tiles:
// any dense shape.
struct LayoutRow {
  const char* name;
  int bits;
  Form form;
  bool grouped, paired;
};

// The table's rows of a form.
std::vector<LayoutRow> layouts_of(Form form);

// Throws std::invalid_argument for a number that is no dtype of weights, activations or outputs.
inline NybbleDtype dtype_of(int value) {
  if (value < NYBBLE_F32 || value > NYBBLE_S32) throw std::invalid_argument("dtype=" + std::to_string(value));
  return static_cast<NybbleDtype>(value);
}

// Throws std::invalid_argument as WeightShape::validate.
WeightShape shape_of(const ShapeWords& words);

// The name of the layout of a shape.
const char* layout_of(const WeightShape& shape);

}  // namespace nybble
