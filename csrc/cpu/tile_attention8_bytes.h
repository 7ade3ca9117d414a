// Codes of attention as bytes, for multiplies of u8 by s8. Include after a target's header.
#pragma once

#include "tile_attention8_fours.h"

namespace {

struct Codes : Fours {
  static constexpr int kQueries = NYBBLE_PANEL_U8;
  static constexpr int32_t kOffset = 128;       // added to the codes of queries
  static constexpr int32_t kValueOffset = 0;    // and of values
  static constexpr int32_t kOnes = 0x01010101;  // values of 1
  NYBBLE_INLINE void dot(VI& acc, VI lanes, VI one) { dot_u8s8(acc, lanes, one); }
  NYBBLE_INLINE void dot_values(VI& acc, VI lanes, VI one) { dot_u8s8(acc, lanes, one); }
  NYBBLE_INLINE VI value_word(const VI (&codes)[kCodes]) { return word(codes); }
};

}  // namespace

#include "tile_attention8.h"
