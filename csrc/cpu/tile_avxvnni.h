// Adds AVX-VNNI to tile_avx2.h: vpdpbusd for CPUs without AVX-512.
#pragma once

#include "tile_avx2.h"

namespace {

// acc += u8 x s8, four products per lane, wrapping. Inline asm for the reason given in tile_avx512vnni.h.
inline void dot_u8s8(VI& acc, VI u, VI s) {
#if defined(__GNUC__) && !defined(__clang__)
  __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(acc) : "x"(u), "x"(s));
#else
  acc = _mm256_dpbusd_avx_epi32(acc, u, s);
#endif
}

}  // namespace
