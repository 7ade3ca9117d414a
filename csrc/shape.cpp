#include "shape.h"

#include "memory.h"

namespace nybble {

namespace {

constexpr LayoutRow kLayouts[] = {
    {"n16k4", 8, Form::dense, false, false},    {"n16k16", 8, Form::dense, false, true},
    {"n16k4g", 8, Form::dense, true, false},    {"n16k16g", 8, Form::dense, true, true},
    {"n16k8", 4, Form::dense, false, false},    {"n16k16n", 4, Form::dense, false, true},
    {"n16k32", 3, Form::dense, false, false},   {"mask8", 8, Form::mask, false, false},
    {"mask4", 4, Form::mask, false, false},     {"gather8", 8, Form::gather, false, false},
    {"blocks8", 8, Form::blocks, false, false},
};

LayoutRow row_of(const ShapeWords& words) {
  for (const LayoutRow& row : kLayouts) {
    if (row.name != words.layout) continue;
    if (row.bits != words.bits)
      throw std::invalid_argument("layout=\"" + words.layout + "\": its weights have " + std::to_string(row.bits) +
                                  " bits, not " + std::to_string(words.bits));
    return row;
  }
  return {"", words.bits, Form::dense, false, false};
}

}  // namespace

std::vector<LayoutRow> layouts_of(Form form) {
  std::vector<LayoutRow> rows;
  for (const LayoutRow& row : kLayouts)
    if (row.form == form) rows.push_back(row);
  return rows;
}

const char* layout_of(const WeightShape& s) {
  for (const LayoutRow& row : kLayouts)
    if (row.bits == s.bits && row.form == s.form && row.grouped == s.grouped && row.paired == s.paired) return row.name;
  throw std::logic_error("a shape without a layout");
}

WeightShape shape_of(const ShapeWords& w) {
  const LayoutRow row = row_of(w);
  const WeightShape shape{w.bits,    w.n,       w.k,       w.group_size, w.symmetric,
                          row.form,  w.block_n, w.block_k, w.ordered,    dtype_of(w.group_scale),
                          w.minimum, w.book,    w.levels,  row.grouped,  row.paired};
  shape.validate();
  return shape;
}

}  // namespace nybble
