// Sparse weights: codes with zeros to packed forms (pack.h) and back.
#pragma once

#include <vector>

#include "pack.h"

namespace nybble {

// Packs in two steps, since the size depends on the weights. `from` must outlive it.
class SparsePack {
 public:
  SparsePack(const WeightShape& shape, const Portable& from, int threads);
  size_t bytes() const { return at_.codes + code_bytes_; }
  void write(uint8_t* to) const;

 private:
  void plan_mask();
  void plan_gather();
  void plan_blocks();
  void write_mask(uint8_t* to) const;
  void write_gather(uint8_t* to) const;
  void write_blocks(uint8_t* to) const;

  WeightShape shape_;
  Portable from_;
  int threads_;
  Sections at_;
  size_t code_bytes_ = 0;
  std::vector<uint8_t> dense_;    // mask: the packed dense form, whose lines are thinned
  std::vector<uint64_t> start_;   // as the section
  std::vector<int32_t> order_;    // gather: as the section
  std::vector<uint16_t> window_;  // gather: as the section
  std::vector<int32_t> index_;    // blocks: as the section
};

// Where the sections of a packed sparse weight lie. Throws std::invalid_argument where it has fewer bytes than it says.
Sections sparse_sections(const WeightShape& shape, const uint8_t* packed, size_t bytes);

// Throws std::invalid_argument, naming the section, unless every number that a kernel follows is in its range.
void check_packed(const WeightShape& shape, const uint8_t* packed, size_t bytes);

void unpack_sparse(const WeightShape& shape, const uint8_t* packed, size_t bytes, const Portable& to, int threads);

}  // namespace nybble
