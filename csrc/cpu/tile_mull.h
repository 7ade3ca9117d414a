// Adds products of 8 bits to tile_neon.h, for CPUs without dot product instructions: the functions of tile_neondot.h.
#pragma once

#include "tile_neon.h"

namespace {

// A sum of four products is two lanes, of two products each: those of lanes 0 and 1 in the first register.
constexpr int kParts = 2;

inline void start_s8(VI (&acc)[kParts], VI sum) {
  acc[0] = vzip1q_s32(sum, vi_set1(0));
  acc[1] = vzip2q_s32(sum, vi_set1(0));
}

// Inline asm for the reason given in tile_neondot.h.
template <int kLane>
inline void dot_s8(VI (&acc)[kParts], VI codes, VI x) {
  const VI word = vdupq_laneq_s32(x, kLane);
#if defined(__GNUC__) && !defined(__clang__)
  VI product;
  __asm__("smull %1.8h, %2.8b, %3.8b\n\tsadalp %0.4s, %1.8h" : "+w"(acc[0]), "=&w"(product) : "w"(codes), "w"(word));
  __asm__("smull2 %1.8h, %2.16b, %3.16b\n\tsadalp %0.4s, %1.8h" : "+w"(acc[1]), "=&w"(product) : "w"(codes), "w"(word));
#else
  const int8x16_t w = vreinterpretq_s8_s32(codes), xs = vreinterpretq_s8_s32(word);
  acc[0] = vpadalq_s16(acc[0], vmull_s8(vget_low_s8(w), vget_low_s8(xs)));
  acc[1] = vpadalq_s16(acc[1], vmull_high_s8(w, xs));
#endif
}

inline VI total_s8(const VI (&acc)[kParts]) { return vpaddq_s32(acc[0], acc[1]); }

}  // namespace
