// Packed weights: one blob of sections, each aligned to 64 bytes. Columns (output features) lie in tiles of 16, padded
// with code 0 and scale 0; ks lie in 64-byte blocks, padded to k_padded with code 0, which meets activation code 0.
//
//   n16k4  8 bits  codes [tiles][k_padded / 4][16][4] s8    k_padded: K up to a multiple of 4
//                  scale [tiles * 16] f32; column_sum [tiles * 16] s32 of the codes
//   n16k8  4 bits  codes [tiles][k_padded / 8][16][4]: byte j holds k = j (low nibble) and k = j + 4 (high) of the
//   block
//                  k_padded: K up to a multiple of the group, or of 8 where one group spans K
//                  scale [tiles][groups][16] bf16; zero_point [tiles][groups][16] u8, absent where symmetric (8)
//                  weight_sum [tiles * 16] f32 of the weights (code - zero_point) * scale over K
#pragma once

#include <cstddef>
#include <cstdint>

namespace nybble {

struct WeightShape {
  int bits = 0;  // 8 or 4
  int64_t n = 0, k = 0;
  int64_t group_size = 0;  // 0: one group spans K
  bool symmetric = true;

  // Throws std::invalid_argument, naming the number and the rule.
  void validate() const;
  int64_t tiles() const { return (n + 15) / 16; }
  int64_t k_padded() const;
  int64_t group() const { return group_size ? group_size : k_padded(); }
  int64_t groups() const { return k_padded() / group(); }
  // Bytes of the portable tensors: qweight [n][k] or [n][(k + 1) / 2], scale [n][groups], zero_point [n][groups].
  size_t qweight_bytes() const { return static_cast<size_t>(n * (bits == 8 ? k : (k + 1) / 2)); }
  size_t scale_bytes() const { return static_cast<size_t>(n * groups()) * (bits == 8 ? 4 : 2); }
  size_t zero_point_bytes() const { return symmetric ? 0 : static_cast<size_t>(n * groups()); }
};

struct Sections {
  size_t codes = 0, scale = 0, zero_point = 0, sum = 0, total = 0;  // byte offsets; sum: column_sum or weight_sum
};

Sections sections_of(const WeightShape& shape);

struct Portable {
  uint8_t* qweight;
  uint8_t* scale;
  uint8_t* zero_point;
};

void pack(const WeightShape& shape, const Portable& from, uint8_t* to, int threads);
void unpack(const WeightShape& shape, const uint8_t* from, const Portable& to, int threads);

}  // namespace nybble
