// Weights of tile_float.h by conversions from fixed point, which divide by a power of two: a code is converted where it
// lies in its 32 bits, and needs neither a second shift nor a scale of its own. The same floats. Include after
// tile_neon.h.
#pragma once

#include "tile_float.h"

namespace {

// The bytes of one k, each at the top of its lane above zeros: tbl gives 0 for an index that is out of its table.
template <int kByte>
NYBBLE_INLINE VI top_bytes(VI codes) {
  if constexpr (kByte == 0) return vi_shift_left_32<24>(codes);
  constexpr uint8_t none = 255;
  const uint8x16_t places = {none, none, none, kByte,     none, none, none, kByte + 4,
                             none, none, none, kByte + 8, none, none, none, kByte + 12};
  return vreinterpretq_s32_u8(vqtbl1q_u8(vreinterpretq_u8_s32(codes), places));
}

// A byte is moved to the top, and divided by 2^24.
struct Byte8 : Weight8 {
  static constexpr int kEach = 0, kShared = 5;  // registers of constants of a vector, and of all
  template <int i>
  VF decode(const uint8_t* line) const {
    const VI codes = vi_load(line);
    if constexpr (i == 3)
      return vf_of_int(vi_byte_s<3>(codes));
    else
      return vcvtq_n_f32_s32(top_bytes<i>(codes), 24);
  }
};

// A nibble stays where it is, and is divided by its power of 16.
struct Nibble4 : Weight4 {
  static constexpr int kEach = 2, kShared = 6;  // as above
  template <int i>
  VF decode(const uint8_t* line) const {
    constexpr int low = i % 4 * 4;
    VI codes = vi_load(line);
    if constexpr (i >= 4) codes = vi_shift_right_32<16>(codes);
    codes = vi_and(codes, vi_set1(15 << low));
    if constexpr (low == 0)
      return vf_fma_fast(vf_of_int(codes), scale[0], offset);
    else
      return vf_fma_fast(vcvtq_n_f32_s32(codes, low), scale[0], offset);
  }
};

// Register tiles that leave place for lines, codes and constants, which Neon's instructions read from registers alone.
template <class Weight>
struct FixedTile : FloatTile<Weight> {
  static constexpr int vectors(int rows) {
    return fitting_vectors(rows * FloatTile<Weight>::splits(rows) + 2 + Weight::kEach, Weight::kShared);
  }
};

template <class Weight, int kRows>
inline NybbleStatus run_fixed(const NybbleLinearArgs* a) {
  if constexpr (!kPlanes)
    if (a->decoded) return run_tiles<DecodedTile<Weight>, kRows>(a);
  return run_tiles<FixedTile<Weight>, kRows>(a);
}

}  // namespace
