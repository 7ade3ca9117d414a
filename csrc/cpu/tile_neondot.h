// Adds the dot product instructions of Armv8.2 to tile_neon.h.
#pragma once

#include "tile_neon.h"

namespace {

// acc += s8 x s8, four products per lane, wrapping: every lane of codes with word kLane of x. Inline asm, because GCC
// 12 copies accumulators before and after the intrinsic.
template <int kLane>
inline void dot_s8(VI& acc, VI codes, VI x) {
#if defined(__GNUC__) && !defined(__clang__)
  __asm__("sdot %0.4s, %1.16b, %2.4b[%3]" : "+w"(acc) : "w"(codes), "w"(x), "i"(kLane));
#else
  acc = vdotq_laneq_s32(acc, vreinterpretq_s8_s32(codes), vreinterpretq_s8_s32(x), kLane);
#endif
}

}  // namespace
