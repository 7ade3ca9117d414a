// Codes of attention as 16 bits, two in a word of 32, for multiplies of s16. Include after a target's header.
#pragma once

#include "tile_codes.h"

namespace {

struct Codes {
  static constexpr int kCodes = 2;  // of a word
  static constexpr int kQueries = NYBBLE_PANEL_S16, kKeysAs = NYBBLE_PANEL_S16;
  static constexpr int32_t kOffset = 0;         // added to the codes of queries
  static constexpr int32_t kValueOffset = 0;    // and of values
  static constexpr int32_t kOnes = 0x00010001;  // values of 1
  NYBBLE_INLINE void dot(VI& acc, VI lanes, VI one) { dot_s16(acc, lanes, one); }
  NYBBLE_INLINE void dot_values(VI& acc, VI lanes, VI one) { dot_s16(acc, lanes, one); }
  NYBBLE_INLINE VI value_word(const VI (&codes)[kCodes]) {
    return vi_add(vi_and(codes[0], vi_set1(0xffff)), vi_shift_left_32<16>(codes[1]));
  }
  // The same for codes in [0, 255].
  NYBBLE_INLINE VI word_of_weights(const VI (&codes)[kCodes]) {
    return vi_add(codes[0], vi_shift_left_32<16>(codes[1]));
  }
};

}  // namespace

#include "tile_attention8.h"
