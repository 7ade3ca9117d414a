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
//
// Sparse weights (sparse.h) leave out codes that stand for 0; what depends on the weights' values comes last:
//
//   mask8   start [tiles + 1] u64: bytes before a tile's lines; scale and column_sum as n16k4
//           lines, eight at a time: masks [8] u64, bit i set where byte i of the n16k4 line is not 0, then those bytes
//           of all eight; a tile's last eight may end early, with masks 0. Then 64 bytes that may be read
//   mask4   as mask8 from the n16k8 lines: masks [8][2], of the low nibbles, then of the high ones; the low nibbles of
//           the bytes that follow are the low codes in order, the high nibbles the high ones; scale and weight_sum as
//           n16k8
//   gather8 k_padded: K up to a multiple of 64, at least 128; 16 columns a tile, one in each lane, in any order
//           start [tiles + 1] u64: steps before a tile's, then a word: whether the order is not the identity
//           order [tiles * 16] s32: the column in each place; scale and column_sum by place
//           window [steps] u16: the step's 128 ks start at 64 times this, ascending in a tile
//           steps [2][64] u8 places within the window, [64] s8 codes: lane l has bytes 4 l .. 4 l + 3; code 0 fills up
//   blocks8 blocks of r columns x c ks, a multiple of 16 and of 4, N and K padded to them
//           start [columns / r + 1] u64: blocks before a strip of columns; scale and column_sum as n16k4
//           index [blocks] s32: the block's place along K, ascending in a strip
//           codes [blocks][r / 16][c / 4][16][4] s8
#pragma once

#include <cstddef>
#include <cstdint>

namespace nybble {

enum class Form { dense, mask, gather, blocks };

struct WeightShape {
  int bits = 0;  // 8 or 4
  int64_t n = 0, k = 0;
  int64_t group_size = 0;  // 0: one group spans K
  bool symmetric = true;
  Form form = Form::dense;
  int64_t block_n = 0, block_k = 0;  // of blocks

  // Throws std::invalid_argument, naming the number and the rule.
  void validate() const;
  int64_t strip() const { return form == Form::blocks ? block_n / 16 : 1; }  // tiles that lie together
  int64_t tiles() const { return (n + 16 * strip() - 1) / (16 * strip()) * strip(); }
  int64_t k_padded() const;
  int64_t group() const { return group_size ? group_size : k_padded(); }
  int64_t groups() const { return k_padded() / group(); }
  // Bytes of the portable tensors: qweight [n][k] or [n][(k + 1) / 2], scale [n][groups], zero_point [n][groups].
  size_t qweight_bytes() const { return static_cast<size_t>(n * (bits == 8 ? k : (k + 1) / 2)); }
  size_t scale_bytes() const { return static_cast<size_t>(n * groups()) * (bits == 8 ? 4 : 2); }
  size_t zero_point_bytes() const { return symmetric ? 0 : static_cast<size_t>(n * groups()); }
};

// Byte offsets; sum: column_sum or weight_sum. Of sparse forms, codes are the values, steps or blocks, index
// the windows or block places before them, and total is what does not depend on how many there are.
struct Sections {
  size_t codes = 0, scale = 0, zero_point = 0, sum = 0, start = 0, order = 0, index = 0, total = 0;
};

Sections sections_of(const WeightShape& shape);

struct Portable {
  uint8_t* qweight;
  uint8_t* scale;
  uint8_t* zero_point;
};

// Of dense forms.
void pack(const WeightShape& shape, const Portable& from, uint8_t* to, int threads);
void unpack(const WeightShape& shape, const uint8_t* from, const Portable& to, int threads);

}  // namespace nybble
