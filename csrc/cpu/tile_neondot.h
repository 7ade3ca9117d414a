// Adds the dot product instructions of Armv8.2 to tile_neon.h.
#pragma once

#include "tile_neon.h"

namespace {

// Registers of a sum of products s8 x s8, four for each lane.
constexpr int kParts = 1;

inline void start_s8(VI (&acc)[kParts], VI sum) { acc[0] = sum; }

// acc += s8 x s8, wrapping: every lane of codes with word kLane of x. Inline asm, because GCC 12 copies accumulators
// before and after the intrinsic.
template <int kLane>
inline void dot_s8(VI (&acc)[kParts], VI codes, VI x) {
#if defined(__GNUC__) && !defined(__clang__)
  __asm__("sdot %0.4s, %1.16b, %2.4b[%3]" : "+w"(acc[0]) : "w"(codes), "w"(x), "i"(kLane));
#else
  acc[0] = vdotq_laneq_s32(acc[0], vreinterpretq_s8_s32(codes), vreinterpretq_s8_s32(x), kLane);
#endif
}

// acc += s8 x s8, or u8 x u8, four products per lane, wrapping.
inline void dot_s8s8(VI& acc, VI a, VI b) { acc = vdotq_s32(acc, vreinterpretq_s8_s32(a), vreinterpretq_s8_s32(b)); }
inline void dot_u8u8(VI& acc, VI a, VI b) {
  acc = vreinterpretq_s32_u32(vdotq_u32(vreinterpretq_u32_s32(acc), vreinterpretq_u8_s32(a), vreinterpretq_u8_s32(b)));
}

inline void dot_each(VI (&acc)[kParts], VI codes, VI x) { dot_s8s8(acc[0], codes, x); }

inline VI total_s8(const VI (&acc)[kParts]) { return acc[0]; }

}  // namespace
