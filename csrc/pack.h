// Packed weights: one buffer of sections, each aligned to 64 bytes. Columns (output features) are stored in tiles of
// 16, padded with code 0 and scale 0. Along K, a tile is a sequence of 64-byte lines, padded to k_padded with code 0.
//
//   n16k4  8 bits  codes [tiles][k_padded / 4][16][4] s8    k_padded: K rounded up to a multiple of 4
//                  scale [tiles * 16] f32; column_sum [tiles * 16] s32: sum of the codes over K
//                  large [tiles][k_padded / 64, rounded up] u8: bit i stands for the lines 2 i and 2 i + 1 of 64 k. It
//                  is set where, in some column, the two codes of each at k and k + 1, k even, have positive ones, or
//                  negative ones, that sum to more than 258: 127 times 258 is the most that fits in 16 bits
//   n16k16 8 bits  the words of n16k4, of which words i and i + 2 of 16 k lie side by side in a column: codes
//                  [tiles][k_padded / 16][2][16][2][4] s8; k_padded: K rounded up to a multiple of 16; the rest as
//                  n16k4, without large
//   n16k4g 8 bits  with scales by group, as in n16k8: codes [tiles][k_padded / 4][16][4] u8, and zero_point
//                  [tiles][groups][16] u8, absent if symmetric: both plus 128. k_padded: K rounded up to a multiple of
//                  the group size, or of 4. scale, minimum and weight_sum as in n16k8
//   n16k8  4 bits  codes [tiles][k_padded / 8][16][4]: byte j holds k = j (low nibble) and k = j + 4 (high nibble)
//                  k_padded: K rounded up to a multiple of the group size, or of 8 if one group spans K
//                  scale [tiles][groups][16] of scale_dtype; zero_point [tiles][groups][16] u8, absent if symmetric
//                  (8); or minimum, as scale: weight = code * scale + minimum
//                  weight_sum [tiles * 16] f32: sum of (code - zero_point) * scale over K
//                  If codes index a table: no weight_sum, and book [16] f32 at the end
//                  With levels: scale and minimum [tiles][blocks][16] f16, a block of 8 groups each, and after them
//                  levels [tiles][groups][2][16] u8: weight = code * (scale * first) - minimum * second
//   n16k16g 8 bits the lines of n16k4g side by side, as those of n16k16; k_padded: K rounded up to a multiple of the
//                  group size, or of 16; the rest as n16k4g
//   n16k16n 4 bits the lines of n16k8, of which the two of 16 k lie side by side in a column: codes
//                  [tiles][k_padded / 16][16][2][4]; k_padded: K rounded up to a multiple of the group size, or of 16
//                  if one group spans K; the rest as n16k8
//   n16k32 3 bits  codes [tiles][k_padded / 32][3][16][4]: the lines of n16k8 of 32 k as planes. Bit i of a nibble of
//                  line l is bit i + 2 (l % 2) of that half of line l / 2, and bit 2 bit l of that half of line 2
//                  k_padded: K rounded up to a multiple of the group size; the rest as n16k8, the middle is 4
//
// They end with order [k] s32 if the columns of the weight are in another order than the inputs: which input each has.
//
// Sparse weights (sparse.h) store no zero weights. Sections whose size depends on the weights come last:
//
//   mask8   start [tiles + 1] u64: byte offset of a tile's lines; scale and column_sum as in n16k4
//           lines, in groups of eight: masks [8] u64, bit i set where byte i of the n16k4 line is not 0, then those
//           bytes of all eight lines. Missing lines of a tile's last group have mask 0. 64 readable bytes follow
//   mask4   like mask8, from the n16k8 lines: masks [8][2], for the low nibbles, then for the high ones. In the bytes
//           that follow, the low nibbles are the low codes in order, the high nibbles the high codes; scale and
//           weight_sum as in n16k8
//   gather8 k_padded: K rounded up to a multiple of 64, at least 128. A tile has 16 columns, one per lane, in any order
//           start [tiles + 1] u64: index of a tile's first step; then a u64: 1 if order is not the identity, else 0
//           order [tiles * 16] s32: the column at each position; scale and column_sum by position
//           window [steps] u16: a step covers 128 k, from 64 times this; ascending within a tile
//           steps [2]: [64] u8 positions within the window, [64] s8 codes: lane l has bytes 4 l .. 4 l + 3; unused
//           entries have code 0
//   blocks8 blocks of r columns x c k, r a multiple of 16, c of 4; N and K padded to whole blocks
//           start [columns / r + 1] u64: index of the first block of a strip of r columns; scale and column_sum as in
//           n16k4
//           index [blocks] s32: the block's position along K, ascending within a strip
//           codes [blocks][r / 16][c / 4][16][4] s8
#pragma once

#include <cstddef>
#include <cstdint>

#include "abi.h"

namespace nybble {

enum class Form { dense, mask, gather, blocks };

struct WeightShape {
  int bits = 0;  // 8, 4 or 3
  int64_t n = 0, k = 0;
  int64_t group_size = 0;  // 0: one group spans K
  bool symmetric = true;
  Form form = Form::dense;
  int64_t block_n = 0, block_k = 0;       // Form::blocks only
  bool ordered = false;                   // Form::dense only: columns are in an order of their own
  NybbleDtype group_scale = NYBBLE_BF16;  // of the scales where they are by group: bf16, or dense f16 or f32
  bool minimum = false;  // by group, Form::dense and symmetric only: weights are code * scale + minimum
  bool book = false;     // 4 bits, Form::dense only: codes index a table
  bool levels = false;   // with minimum and groups of 32: scales and minimums have two levels, see NybbleLinearArgs
  bool grouped = false;  // 8 bits, Form::dense only: the layout n16k4g or n16k16g
  bool paired = false;   // the layout n16k16, n16k16g or n16k16n

  // Throws std::invalid_argument, naming the field, its value and the rule.
  void validate() const;
  int64_t strip() const { return form == Form::blocks ? block_n / 16 : 1; }  // tiles of a strip
  int64_t tiles() const { return (n + 16 * strip() - 1) / (16 * strip()) * strip(); }
  int64_t k_padded() const;
  // The byte of a code of 8 bits among those of a dense weight.
  int64_t place_of(int64_t column, int64_t at_k) const;
  int64_t group() const { return group_size ? group_size : k_padded(); }
  int64_t groups() const { return k_padded() / group(); }
  // Whether scales and zero points are by group, whose sums are scaled one by one. Else a column has one scale.
  bool by_group() const { return bits != 8 || grouped; }
  NybbleDtype scale_dtype() const { return by_group() ? group_scale : NYBBLE_F32; }
  size_t scale_item() const { return scale_dtype() == NYBBLE_F32 ? 4 : 2; }
  // Bytes of the portable tensors: qweight [n][k] or [n][(k + 1) / 2], scale and minimum [n][scales], zero_point
  // [n][groups], levels [n][groups][2].
  size_t qweight_bytes() const { return static_cast<size_t>(n * (bits == 8 ? k : (k + 1) / 2)); }
  int64_t scales() const { return levels ? nybble_scale_blocks(groups()) : groups(); }  // of a row
  size_t scale_bytes() const { return static_cast<size_t>(n * scales()) * scale_item(); }
  size_t zero_point_bytes() const { return symmetric ? 0 : static_cast<size_t>(n * groups()); }
  size_t minimum_bytes() const { return minimum ? scale_bytes() : 0; }
  size_t levels_bytes() const { return levels ? static_cast<size_t>(n * groups()) * 2 : 0; }
  // The zero point of weights without a tensor of them.
  int zero() const { return bits == 8 || minimum ? 0 : 1 << (bits - 1); }
  // Codes and zero points as they are packed have these bits changed: of n16k4g and n16k16g, 128 is added to them.
  uint8_t flipped() const { return grouped ? 0x80 : 0; }
  size_t book_bytes() const { return book ? 64 : 0; }
  size_t order_bytes() const { return ordered ? static_cast<size_t>(k) * 4 : 0; }
};

// Byte offsets of the sections. sum: weight_sum if scales are by group, else column_sum. large: of n16k4 only. For
// sparse forms, codes is the values, steps or blocks, index the windows or block positions, and total the size without
// these two.
struct Sections {
  size_t codes = 0, scale = 0, zero_point = 0, minimum = 0, levels = 0, sum = 0, large = 0, start = 0, order = 0,
         book = 0, index = 0, total = 0;
};

Sections sections_of(const WeightShape& shape);

struct Portable {
  uint8_t* qweight;
  uint8_t* scale;
  uint8_t* zero_point;
  uint8_t* minimum = nullptr;  // as scale
  uint8_t* order = nullptr;    // [k] s32, a permutation
  uint8_t* book = nullptr;     // [16] f32
  uint8_t* levels = nullptr;   // [n][groups][2]
};

// The zero point of a place among the portable ones of a weight, and the scale.
int zero_point_at(const WeightShape& shape, const uint8_t* zero_points, int64_t place);
float scale_at(const WeightShape& shape, const uint8_t* scales, int64_t place);

// Dense forms only. Throws std::invalid_argument if the order is no permutation.
void pack(const WeightShape& shape, const Portable& from, uint8_t* to, int threads);
void unpack(const WeightShape& shape, const uint8_t* from, const Portable& to, int threads);

}  // namespace nybble
