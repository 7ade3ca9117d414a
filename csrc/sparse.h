// Packs and unpacks sparse weights (forms mask, gather and blocks of pack.h).
#pragma once

#include <vector>

#include "pack.h"

namespace nybble {

// Packs in two steps, because the size depends on the weights. `from` must outlive the object.
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
  std::vector<uint8_t> dense_;    // mask: the packed dense form
  std::vector<uint64_t> start_;   // contents of the section
  std::vector<int32_t> order_;    // gather: contents of the section
  std::vector<uint16_t> window_;  // gather: contents of the section
  std::vector<int32_t> index_;    // blocks: contents of the section
};

// The offsets of the sections of a packed sparse weight. Throws std::invalid_argument if it is truncated.
Sections sparse_sections(const WeightShape& shape, const uint8_t* packed, size_t bytes);

// Throws std::invalid_argument, naming the section, if an offset or index that a kernel follows is out of range.
void check_packed(const WeightShape& shape, const uint8_t* packed, size_t bytes);

void unpack_sparse(const WeightShape& shape, const uint8_t* packed, size_t bytes, const Portable& to, int threads);

}  // namespace nybble
