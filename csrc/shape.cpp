#include "shape.h"

#include "memory.h"

namespace nybble {

namespace {

Form form_of(const std::string& layout) {
  if (layout == "mask8" || layout == "mask4") return Form::mask;
  if (layout == "gather8") return Form::gather;
  return layout == "blocks8" ? Form::blocks : Form::dense;
}

}  // namespace

WeightShape shape_of(const ShapeWords& w) {
  WeightShape shape{w.bits,      w.n,
                    w.k,         w.group_size,
                    w.symmetric, form_of(w.layout),
                    w.block_n,   w.block_k,
                    w.ordered,   dtype_of(w.group_scale),
                    w.minimum,   w.book,
                    w.levels,    w.bits == 8 && w.layout == "n16k4g"};
  shape.paired = w.layout == "n16k16";
  shape.validate();
  return shape;
}

}  // namespace nybble
