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

// acc += s8 x s8, wrapping, lane by lane. Inline asm for the reason given in tile_neondot.h.
inline void dot_each(VI (&acc)[kParts], VI codes, VI x) {
#if defined(__GNUC__) && !defined(__clang__)
  VI product;
  __asm__("smull %1.8h, %2.8b, %3.8b\n\tsadalp %0.4s, %1.8h" : "+w"(acc[0]), "=&w"(product) : "w"(codes), "w"(x));
  __asm__("smull2 %1.8h, %2.16b, %3.16b\n\tsadalp %0.4s, %1.8h" : "+w"(acc[1]), "=&w"(product) : "w"(codes), "w"(x));
#else
  const int8x16_t w = vreinterpretq_s8_s32(codes), xs = vreinterpretq_s8_s32(x);
  acc[0] = vpadalq_s16(acc[0], vmull_s8(vget_low_s8(w), vget_low_s8(xs)));
  acc[1] = vpadalq_s16(acc[1], vmull_high_s8(w, xs));
#endif
}

// The same with every lane of codes and word kLane of x.
template <int kLane>
inline void dot_s8(VI (&acc)[kParts], VI codes, VI x) {
  dot_each(acc, codes, vdupq_laneq_s32(x, kLane));
}

// acc += s8 x s8, none of which is -128, or u8 x u8: four products per lane. Pairs of those of s8 fit in 16 bits.
inline void dot_s8s8(VI& acc, VI a, VI b) {
  const int8x16_t x = vreinterpretq_s8_s32(a), y = vreinterpretq_s8_s32(b);
  acc = vpadalq_s16(acc, vpaddq_s16(vmull_s8(vget_low_s8(x), vget_low_s8(y)), vmull_high_s8(x, y)));
}
inline void dot_u8u8(VI& acc, VI a, VI b) {
  const uint8x16_t x = vreinterpretq_u8_s32(a), y = vreinterpretq_u8_s32(b);
  const uint16x8_t low = vmull_u8(vget_low_u8(x), vget_low_u8(y)), high = vmull_high_u8(x, y);
  const uint32x4_t even = vpadalq_u16(vreinterpretq_u32_s32(acc), vuzp1q_u16(low, high));
  acc = vreinterpretq_s32_u32(vpadalq_u16(even, vuzp2q_u16(low, high)));
}

inline VI total_s8(const VI (&acc)[kParts]) { return vpaddq_s32(acc[0], acc[1]); }

}  // namespace
