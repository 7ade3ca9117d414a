// Codes of attention as bytes, four in a word of 32 bits: what their multiplies share. Include after a target's header.
#pragma once

#include "tile_codes.h"

namespace {

struct Fours {
  static constexpr int kCodes = 4;  // of a word
  static constexpr int kKeysAs = NYBBLE_PANEL_S8;
  NYBBLE_INLINE VI word(const VI (&codes)[kCodes]) {
    const VI low = vi_set1(255);
    const VI first = vi_add(vi_and(codes[0], low), vi_shift_left_32<8>(vi_and(codes[1], low)));
    return vi_add(first, vi_add(vi_shift_left_32<16>(vi_and(codes[2], low)), vi_shift_left_32<24>(codes[3])));
  }
  // The same for codes in [0, 255].
  NYBBLE_INLINE VI word_of_weights(const VI (&codes)[kCodes]) {
    const VI first = vi_add(codes[0], vi_shift_left_32<8>(codes[1]));
    return vi_add(first, vi_shift_left_32<16>(vi_add(codes[2], vi_shift_left_32<8>(codes[3]))));
  }
};

}  // namespace
