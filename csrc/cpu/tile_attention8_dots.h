// Codes of attention as bytes, for multiplies of s8 by s8 and of u8 by u8: the weights of values have no sign. Include
// after a target's header.
#pragma once

#include "tile_attention8_fours.h"

namespace {

struct Codes : Fours {
  static constexpr int kQueries = NYBBLE_PANEL_S8;
  static constexpr int32_t kOffset = 0;          // added to the codes of queries
  static constexpr int32_t kValueOffset = 128;   // and of values
  static constexpr int32_t kOnes = -0x7e7e7e7f;  // values of 1: bytes of 129
  NYBBLE_INLINE void dot(VI& acc, VI lanes, VI one) { dot_s8s8(acc, lanes, one); }
  NYBBLE_INLINE void dot_values(VI& acc, VI lanes, VI one) { dot_u8u8(acc, lanes, one); }
  NYBBLE_INLINE VI value_word(const VI (&codes)[kCodes]) {
    VI moved[kCodes];
    for (int i = 0; i < kCodes; i++) moved[i] = vi_add(codes[i], vi_set1(kValueOffset));
    return word_of_weights(moved);
  }
};

}  // namespace

#include "tile_attention8.h"
